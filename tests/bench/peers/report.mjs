// SPDX-License-Identifier: MIT
//
// The results as Markdown.

import { OURS, contenderOf, peers } from './contenders.mjs';

const short = { 'onnxruntime-web': 'ort', '@tensorflow/tfjs': 'tfjs', '@jax-js/jax': 'jax' };
const passes = { forward: 'fwd', both: 'fwd+bwd' };
const maskOf = ({ causal }) => (causal ? 'causal' : 'full');
const MiB = 2 ** 20;

const time = (x) => (x >= 100 ? x.toFixed(0) : x.toPrecision(3));
const percent = (x) => `${(100 * x).toFixed(0)}%`;
const times = (x) => (Number.isFinite(x) ? `${x.toPrecision(x < 10 ? 2 : 3)}x` : '');
const size = (bytes) => (bytes > 0 ? (bytes / MiB).toFixed(bytes < 100 * MiB ? 1 : 0) : '');

const table = (head, rows) => [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');

const isOrdinary = ({ contender }) => !contenderOf(contender).expert;
const isOf = (name) => ({ contender }) => contenderOf(contender).library === name;
const timed = (entries) => entries.filter(({ milliseconds }) => milliseconds);
const fastest = (entries) => timed(entries).sort((a, b) => a.milliseconds - b.milliseconds)[0];
const ratioOfFastest = (entries) => fastest(entries)?.ratio;

/** The fastest time, * when it had to run without its library's other forms; or why there is none; empty without such a pass. */
function cell(entries) {
  const best = fastest(entries);
  if (best) return `${time(best.milliseconds)}${best.apart ? '*' : ''}`;
  if (entries.length === 0) return '';
  return entries.find(({ skipped }) => skipped?.startsWith('>'))?.skipped ?? 'fails';
}

const columns = ['where', 'pass', 'mask', 'heads', 'D', 'N', 'ours ms', 'of peak'];
const peerColumns = peers.flatMap(({ name }) => [`${short[name]} best`, `${short[name]} ordinary`]);

const headOf = (names) => `| ${names.join(' | ')} |\n|${names.map(() => ' --- |').join('')}`;
export const timesHead = headOf([...columns, ...peerColumns, 'fastest best / ours', 'fastest ordinary / ours']);

export function timesLine(row) {
  const ours = row.contenders.find(({ contender }) => contender === OURS);
  const others = row.contenders.filter(({ contender }) => contender !== OURS);
  const cells = peers.flatMap(({ name }) => {
    const own = others.filter(isOf(name));
    return [cell(own), cell(own.filter(isOrdinary))];
  });
  const place = [row.where, passes[row.pass], maskOf(row), row.heads, row.headDim, row.length];
  const ratios = [times(ratioOfFastest(others)), times(ratioOfFastest(others.filter(isOrdinary)))];
  return `| ${[...place, time(ours.milliseconds), percent(row.ofPeak), ...cells, ...ratios].join(' | ')} |`;
}

export function summaryTable(rows) {
  const groups = new Map();
  for (const row of rows.filter(({ length }) => length >= 1024)) {
    const key = [row.where, row.headDim, passes[row.pass], maskOf(row)].join(' | ');
    groups.set(key, [...(groups.get(key) ?? []), row]);
  }
  const least = (rows, choose) => {
    const found = rows
      .map((row) => ({ row, entry: fastest(row.contenders.filter((entry) => entry.contender !== OURS && choose(entry))) }))
      .filter(({ entry }) => entry)
      .sort((a, b) => a.entry.ratio - b.entry.ratio)[0];
    if (!found) return '';
    const { library, form } = contenderOf(found.entry.contender);
    return `${times(found.entry.ratio)} (${short[library]} ${form}, ${found.row.heads} x ${found.row.length})`;
  };
  const lines = [...groups].map(([key, own]) => [
    key,
    least(own, () => true),
    least(own, isOrdinary),
    percent(Math.min(...own.map(({ ofPeak }) => ofPeak))),
  ]);
  return table(['where', 'D', 'pass', 'mask', 'fastest best / ours', 'fastest ordinary / ours', 'of peak'], lines);
}

const PLACE = ['contender', 'pass', 'mask', 'D', 'N'];
const placeOf = (row) => [row.contender, passes[row.pass], maskOf(row), row.headDim, row.length];

export function coldTable(rows) {
  const lines = rows.map((row) => [
    ...placeOf(row),
    ...(row.failed ? [row.failed, '', '', '', '', ''] : [row.load, row.setUp, row.first, row.second, row.steady].map(time)),
    ...(row.failed ? [] : [times(row.first / row.steady)]),
    row.oneToken ? (1000 * row.oneToken).toFixed(1) : '',
  ]);
  const head = [...PLACE, 'load ms', 'set-up', 'first call', 'second', 'steady', 'first / steady', 'N = 1, us'];
  return table(head, lines);
}

export function memoryTable(rows) {
  const lines = rows.map((row) => [
    ...placeOf(row),
    row.failed ?? (row.finite ? `${(row.milliseconds / 1000).toPrecision(3)}` : 'not finite'),
    size(row.wasmBytes),
    size(row.grownBytes),
    size(row.peakBytes),
  ]);
  const head = [...PLACE, 'first call s', 'wasm memory MiB', 'process grew by MiB', 'process peak MiB'];
  return table(head, lines);
}

/** What was not run or failed, one line a form, pass and reason; and timed results that differ from ours. */
export function notes(rows) {
  const groups = new Map();
  for (const row of rows) {
    for (const { contender, skipped, failed, message, difference } of row.contenders) {
      const differs = difference !== undefined && !(difference < 1e-4) ? `differs from ours by ${difference}` : null;
      const text = skipped ? `not run: ${skipped.replace(/ at N = \d+/, ' at a smaller size')}` : (failed ?? differs);
      if (!text) continue;
      const reason = skipped?.startsWith('>') ? text : `${text}${message ? ` (${message})` : ''}`;
      const key = `${row.where}: ${contender}, ${passes[row.pass]} ${maskOf(row)}: ${reason}`;
      groups.set(key, [...(groups.get(key) ?? []), `${row.heads} x ${row.headDim} x ${row.length}`]);
    }
  }
  return [...groups].map(([key, cases]) => `- ${key}: heads x D x N = ${cases.join(', ')}`).join('\n');
}
