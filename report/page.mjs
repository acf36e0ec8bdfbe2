// SPDX-License-Identifier: MIT
//
// The report as one HTML page that needs nothing else: sentences, tables, the numbers as JSON, the style sheets and the script
// that draws the figures (bundle.mjs). Without the script everything but the drawings is there. Pure.

import { duration, integer, write } from './words.mjs';

const ENTITIES = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };

const escape = (value) => String(value).replace(/[&<>"']/g, (c) => ENTITIES[c]);
/** Text as HTML; `code` between back quotes. No line ends inside "n = 4,096", "8.1 × 10⁻⁷", "50 %" and "(ln n)". */
const text = (value) =>
  escape(
    String(value)
      .replace(/ (=|×) /g, '\u00a0$1\u00a0')
      .replaceAll(' %', '\u00a0%')
      .replaceAll('ln n)', 'ln\u00a0n)'),
  ).replace(/`([^`]+)`/g, '<code>$1</code>');
const plain = (value) => escape(String(value).replaceAll('`', ''));

/** JSON that no HTML parser sees the end of a script in. */
export const embed = (value) =>
  JSON.stringify(value).replaceAll('<', '\\u003c').replaceAll('\u2028', '\\u2028').replaceAll('\u2029', '\\u2029');

/** A script that no HTML parser sees its own end in. */
const enclose = (script) => script.replace(/<\/(script)/gi, '<\\/$1').replaceAll('<!--', '<\\!--');

const tableOf = ({ columns, rows }) => `<table>
<thead><tr>${columns.map(({ label }) => `<th scope="col">${text(label)}</th>`).join('')}</tr></thead>
<tbody>
${rows.map((row) => `<tr>${columns.map(({ key, kind }) => `<td>${plain(write(row[key], kind))}</td>`).join('')}</tr>`).join('\n')}
</tbody>
</table>`;

const quotesOf = ({ quotes }) =>
  quotes === undefined
    ? ''
    : `<div class="quotes" tabindex="0" role="region" aria-label="What auto said"><table>
<thead><tr><th scope="col">asked</th><th scope="col">what <code>auto</code> said</th></tr></thead>
<tbody>${quotes.map(({ label, text: said }) => `<tr><th scope="row">${text(label)}</th><td>${text(said)}</td></tr>`).join('\n')}</tbody>
</table></div>`;

const scrolling = (figure) => `<div class="scroll" tabindex="0" role="region" aria-label="${plain(`Numbers: ${figure.title}`)}">
${tableOf(figure)}
</div>`;

/** A figure that is a table shows its numbers; others keep them folded up below the drawing. */
const figureOf = (figure) =>
  figure.kind === 'table'
    ? `<figure id="${figure.id}">
<figcaption><h3>${text(figure.title)}</h3>
<p>${text(figure.sentence)}</p></figcaption>
${scrolling(figure)}
<p class="note">${text(figure.note)}</p>
</figure>`
    : `<figure id="${figure.id}">
<figcaption><h3>${text(figure.title)}</h3>
<p>${text(figure.sentence)}</p></figcaption>
<div class="key" aria-hidden="true"></div>
<div class="panels" role="img" aria-label="${plain(`${figure.title}. ${figure.sentence}`)}"></div>
<p class="note">${text(figure.note)}</p>
${quotesOf(figure)}
<details><summary>The numbers (${integer(figure.rows.length)} rows)</summary>
${scrolling(figure)}</details>
</figure>`;

/**
 * @param {{ report: object, script: string, style: string }} parts The report as report.mjs makes it.
 * @returns {string} HTML
 */
export function buildPage({ report, script, style }) {
  const { title, machine, seconds, version, date, quick, experiments } = report;
  const parts = experiments.map((one) => `${one.id} ${duration(1000 * one.seconds)}`);
  const short = quick ? ' A quick run, with small sizes: do not quote it.' : '';
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="Fast RoPE attention, forward and backward: time, error, rank, scores, stability, the frontier and the papers’ route, measured.">
<title>${text(title)}</title>
<link rel="icon" href="data:,">
<style>${style}</style>
</head>
<body>
<header class="text">
<h1>${text(title)}</h1>
<p class="lead">Attention with rotary positions, forward and backward, takes almost linear time where the entries of queries and keys are
small: so <a href="https://arxiv.org/abs/2505.11892"><cite>Fast RoPE Attention</cite></a> by Alman and Song and
<a href="https://arxiv.org/abs/2412.17316"><cite>RoPE Attention Can Be Trained in Almost Linear Time</cite></a>. These are measurements of
that, of where exact attention is the better choice, and of where the promise ends.${text(short)}</p>
</header>
<nav class="contents" aria-label="Contents">
<h2>In short</h2>
<ol>
${experiments.map(({ id, title: name, finding }) => `<li><a href="#${id}">${text(name)}</a>. ${text(finding)}</li>`).join('\n')}
</ol>
</nav>
<main class="report">
${experiments
  .map(
    ({ id, title: name, about, figures }, n) => `<section id="${id}" aria-labelledby="${id}-title">
<h2 id="${id}-title">${n + 1}. ${text(name)}</h2>
<p>${text(about)}</p>
${figures.map(figureOf).join('\n')}
</section>`,
  )
  .join('\n')}
</main>
<footer class="colophon report">
<p>rope-attention ${text(version)}, ${text(machine)}, ${text(date)}; ${text(duration(1000 * seconds))} in all: ${text(parts.join(', '))}.
Every sentence is made from the numbers below its figure; <code>make report</code> makes all of it again. Inputs are seeded, times are
of this machine.</p>
</footer>
<script type="application/json" id="report-data">${embed(report)}</script>
<script>${enclose(script)}</script>
</body>
</html>
`;
}
