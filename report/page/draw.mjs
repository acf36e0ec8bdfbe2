// SPDX-License-Identifier: MIT
//
// Draws the figures of the report in the page, from the JSON that the page holds, with Observable Plot. Colours are variables of
// the style sheet: light and dark need no second drawing. A figure is drawn again when its width changes.
//
//   lines    one frame for each value of `panel`, one curve for each value of `series`
//   cells    the plane of lengths and bounds: colour by degree, stronger with the gain; curves through it
//   table    nothing to draw: the page has its numbers

import * as Plot from '@observablehq/plot';
import { integer, powerOfTen, ratio, write } from '../words.mjs';

const FRAME = { background: 'none', fontFamily: 'var(--sans)', fontSize: '12px', color: 'var(--ink)', overflow: 'visible' };
const HALO = { stroke: 'var(--paper)', strokeWidth: 4 };
const PALETTE = ['degree-5', 'degree-1', 'degree-3', 'degree-6', 'degree-2', 'degree-4', 'exact'];

const distinct = (values) => [...new Set(values)];

/** What a curve looks like: colour, dashes, dots. */
function styleOf(figure, series, index) {
  const own = figure.styles?.[series] ?? {};
  const [, degree] = /^degree ([1-6])$/.exec(series) ?? [];
  const fallback = degree ? `degree-${degree}` : series === 'exact' ? 'exact' : PALETTE[index % PALETTE.length];
  return { dots: !figure.thin, dash: false, ...own, colour: `var(--${own.colour ?? fallback})` };
}

/** Ticks of a logarithmic axis, about `most` of them. */
function logTicks([low, high], base, most) {
  const exponents = [];
  for (let n = Math.ceil(Math.log(low) / Math.log(base) - 1e-9); base ** n <= high * (1 + 1e-9); n++) exponents.push(n);
  if (base === 10 && exponents.length < 3) {
    const steps = exponents.flatMap((n) => [n - 1, n]).concat(exponents.length === 0 ? [Math.floor(Math.log10(low))] : []);
    const fine = distinct(steps.flatMap((n) => [1, 2, 5].map((m) => Number((m * 10 ** n).toPrecision(3)))));
    return fine.filter((x) => x >= low && x <= high).sort((a, b) => a - b);
  }
  const step = Math.ceil(exponents.length / most);
  return exponents.filter((n) => n % step === 0).map((n) => base ** n);
}

/** 16384 -> 16k */
const short = (value) => (value >= 1024 && value % 1024 === 0 ? `${value / 1024}k` : integer(value));

function tickFormat(axis) {
  if (axis.log === 2) return short;
  if (axis.kind === 'ms') return (value) => write(value, 'ms');
  if (axis.kind === 'error') return (value) => (Number.isInteger(Math.log10(value)) ? powerOfTen(value) : write(value, 'error'));
  if (axis.kind === 'integer') return integer;
  return (value) => (axis.log && value >= 1e4 ? powerOfTen(value) : write(value, axis.kind));
}

/** The range of an axis, the same in all panels, with a little room. */
function domainOf(axis, values) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (axis.zero) low = 0;
  if (axis.floor) low = Math.max(low, axis.floor);
  if (axis.top) high = Math.min(high, axis.top);
  if (!axis.log) {
    const room = (high - low) * 0.04;
    return [axis.zero ? 0 : low - room, high + room];
  }
  const room = Math.max((high / low) ** 0.04, 1.12);
  return [low / room, high * room];
}

/** All of a row in lines, for the tip. Long texts are in the table. */
const describe = (figure, row) =>
  figure.columns
    .filter(
      ({ key }) => row[key] !== null && row[key] !== undefined && typeof row[key] !== 'boolean' && String(row[key]).length < 60,
    )
    .map(({ key, label, kind }) => `${label}: ${write(row[key], kind)}`)
    .join('\n');

/** What the nearest mark stands for, while it is pointed at. */
const tip = (figure, marks) =>
  Plot.tip(
    marks,
    Plot.pointer({
      ...{ x: 'x', y: 'y', title: ({ row }) => describe(figure, row) },
      ...{ fill: 'var(--paper)', stroke: 'var(--muted)', fontSize: 12, lineHeight: 1.3, textPadding: 9 },
    }),
  );

function lines(figure) {
  const { rows, x, y, panel, series } = figure;
  const panels = panel ? distinct(rows.map((row) => row[panel])) : [null];
  const names = series ? distinct(rows.map((row) => row[series])) : [null];
  const styles = new Map(names.map((name, index) => [name, name === null ? styleOf(figure, '', 0) : styleOf(figure, name, index)]));
  const seen = rows.filter((row) => row[x.key] !== null && row[y.key] !== null && (!y.log || row[y.key] > 0));
  const rules = figure.rules ?? [];
  // What has no number is drawn all the same where the axis has an end
  const placed = y.top === undefined ? seen : rows;
  const domains = {
    x: domainOf(x, [...placed.map((row) => row[x.key]), ...rules.flatMap((rule) => rule.x ?? [])]),
    y: domainOf(y, [...seen.map((row) => row[y.key]), ...rules.flatMap((rule) => rule.y ?? [])]),
  };

  return panels.map((name) => {
    const inside = rows.filter((row) => (panel ? row[panel] === name : true));
    // No number, or one beyond the axis: a triangle at its end. Only where the axis has an end, else a gap.
    const points = inside.flatMap((row) => {
      if (row[x.key] === null) return [];
      const value = row[y.key];
      const style = styles.get(series ? row[series] : null);
      const beyond =
        y.top !== undefined && (value === null ? figure.lost === undefined || figure.lost === row[series] : value > y.top);
      if (value === null && !beyond) return [];
      if (y.floor && value !== null && value < y.floor) return [];
      return [{ row, x: row[x.key], y: beyond ? y.top : value, series: series ? row[series] : '', beyond, ...style }];
    });
    const dashed = points.filter(({ dash }) => dash);
    const solid = points.filter(({ dash }) => !dash);
    const dots = points.filter((point) => point.dots && !point.beyond);
    const channels = { x: 'x', y: 'y', stroke: 'colour' };
    return (width) =>
      Plot.plot({
        width,
        height: figure.small ? 220 : Math.round(Math.min(340, Math.max(260, width * 0.62))),
        marginLeft: 52,
        marginRight: 18,
        marginTop: name === null ? 14 : 30,
        marginBottom: 40,
        style: FRAME,
        x: { type: x.log ? 'log' : 'linear', ...(x.log && { base: x.log }), domain: domains.x },
        y: { type: y.log ? 'log' : 'linear', ...(y.log && { base: y.log }), domain: domains.y },
        color: { type: 'identity' },
        marks: [
          ...axes(figure, domains, width),
          name === null ? null : Plot.text([name], { frameAnchor: 'top-left', dx: -1, dy: -24, fontWeight: 600, fontSize: 13 }),
          ...rules.map((rule) => ruleMark(rule, domains)),
          Plot.line(solid, { ...channels, z: 'series', strokeWidth: 1.6 }),
          Plot.line(dashed, { ...channels, z: 'series', strokeWidth: 1.4, strokeDasharray: '5 4' }),
          Plot.dot(dots, {
            ...channels,
            r: 3,
            strokeWidth: 1.4,
            fill: (point) => (point.row[figure.hollow] ? 'var(--paper)' : point.colour),
          }),
          Plot.dot(
            points.filter((point) => point.beyond),
            { ...channels, r: 3.6, symbol: 'triangle', fill: 'var(--paper)', strokeWidth: 1.4 },
          ),
          tip(figure, points),
        ],
      });
  });

  function ruleMark(rule, { x: [, right], y: [, top] }) {
    const line = { stroke: 'var(--muted)', strokeDasharray: '1 4', strokeLinecap: 'round' };
    const text = { text: 'label', fill: 'var(--muted)', fontSize: 11, ...HALO };
    return rule.x !== undefined
      ? [Plot.ruleX([rule.x], line), Plot.text([rule], { x: 'x', y: () => top, ...text, dy: -7 })]
      : [Plot.ruleY([rule.y], line), Plot.text([rule], { y: 'y', x: () => right, ...text, dy: -8, textAnchor: 'end' })];
  }

  function axes({ x: xs, y: ys }, domain, width) {
    const xTicks = xs.log ? logTicks(domain.x, xs.log, width < 420 ? 5 : 9) : undefined;
    const yTicks = ys.log ? logTicks(domain.y, ys.log, 7) : undefined;
    const label = { labelAnchor: 'center', labelArrow: 'none', labelOffset: 36 };
    return [
      Plot.gridY({ ticks: yTicks, stroke: 'var(--rule)', strokeOpacity: 1 }),
      Plot.ruleY([domain.y[0]], { stroke: 'var(--edge)' }),
      Plot.axisX({ ticks: xTicks, tickFormat: tickFormat(xs), tickSize: 4, label: xs.label, ...label }),
      Plot.axisY({ ticks: yTicks, tickFormat: tickFormat(ys), tickSize: 0, label: null }),
    ];
  }
}

function cells(figure) {
  const { rows, x, y, panel, overlays } = figure;
  const step = (values) => Math.sqrt(values[1] / values[0]);
  const [wide, high] = [step(x.values), step(y.values)];
  const domains = {
    x: [x.values[0] / wide, x.values.at(-1) * wide],
    y: [y.values[0] / high, y.values.at(-1) * high],
  };
  const colour = ({ degree, gain }) =>
    degree === null || gain <= 1 ? 'var(--raised)' : degree >= 1 && degree <= 6 ? `var(--degree-${degree})` : 'var(--muted)';
  const strength = ({ gain }) => (gain === null || gain <= 1 ? 1 : 0.22 + 0.3 * Math.min(1, Math.log10(gain) / 2));
  return distinct(rows.map((row) => row[panel])).map((name) => {
    const inside = rows
      .filter((row) => row[panel] === name)
      .map((row) => ({
        row,
        x: row[x.key],
        y: row[y.key],
        x1: row[x.key] / wide,
        x2: row[x.key] * wide,
        y1: row[y.key] / high,
        y2: row[y.key] * high,
      }));
    return (width) => {
      const narrow = width < 420;
      const label = { labelAnchor: 'center', labelArrow: 'none', labelOffset: 36 };
      const edges = { x1: 'x1', x2: 'x2', y1: 'y1', y2: 'y2', inset: 1 };
      return Plot.plot({
        width,
        height: 80 + 42 * y.values.length,
        marginLeft: 40,
        marginRight: 8,
        marginTop: 30,
        marginBottom: 40,
        style: FRAME,
        x: { type: 'log', base: 2, domain: domains.x },
        y: { type: 'log', domain: domains.y },
        marks: [
          Plot.text([name], { frameAnchor: 'top-left', dx: -1, dy: -24, fontWeight: 600, fontSize: 13 }),
          Plot.axisX({ ticks: x.values, tickFormat: short, tickSize: 0, label: x.label, ...label }),
          Plot.axisY({ ticks: y.values, tickFormat: (value) => write(value, 'number'), tickSize: 0, label: null }),
          ...inside.map((cell) => Plot.rect([cell], { ...edges, fill: colour(cell.row), fillOpacity: strength(cell.row) })),
          ...overlays.map(({ points, dash }) =>
            Plot.line(points, {
              x: 'x',
              y: 'y',
              stroke: 'var(--ink)',
              strokeWidth: 2,
              ...(dash && { strokeDasharray: '5 4' }),
              clip: true,
            }),
          ),
          Plot.text(inside, {
            x: 'x',
            y: 'y',
            text: ({ row }) => (row.degree === null ? 'exact' : `${row.gain < 0.01 ? '< 0.01x' : ratio(row.gain)}\ng = ${row.degree}`),
            fill: ({ row }) => (row.gain === null || row.gain <= 1 ? 'var(--muted)' : 'var(--ink)'),
            fontSize: narrow ? 9 : 11,
            stroke: 'var(--paper)',
            strokeOpacity: 0.55,
            strokeWidth: 3,
            lineHeight: 1.25,
          }),
          tip(figure, inside),
        ],
      });
    };
  });
}

/** What the marks mean. */
function keyOf(figure) {
  const items = [];
  const item = (mark, text, colour) => {
    const span = document.createElement('span');
    const swatch = document.createElement('i');
    swatch.className = mark;
    if (colour) swatch.style.setProperty('--colour', colour);
    span.append(swatch, text);
    items.push(span);
  };
  const axis = document.createElement('span');
  axis.textContent = `↑ ${figure.y.label}`;
  items.push(axis);
  if (figure.kind === 'cells') {
    for (const { name, dash } of figure.overlays) item(dash ? 'dashes' : 'line', name, 'var(--ink)');
    const degrees = distinct(figure.rows.filter((row) => row.gain > 1).map((row) => row.degree)).sort();
    for (const degree of degrees)
      item('line', `degree ${degree}`, degree >= 1 && degree <= 6 ? `var(--degree-${degree})` : 'var(--muted)');
    return items;
  }
  const names = figure.series ? distinct(figure.rows.map((row) => row[figure.series])) : [];
  names.forEach((name, index) => {
    const { colour, dash } = styleOf(figure, name, index);
    item(dash ? 'dashes' : 'line', name, colour);
  });
  if (figure.hollow && figure.rows.some((row) => row[figure.hollow])) item('dot', 'scaled');
  return items;
}

const report = JSON.parse(document.getElementById('report-data').textContent);
for (const figure of report.experiments.flatMap((experiment) => experiment.figures).filter(({ kind }) => kind !== 'table')) {
  const place = document.getElementById(figure.id);
  const panels = place.querySelector('.panels');
  place.querySelector('.key').replaceChildren(...keyOf(figure));
  const drawings = (figure.kind === 'cells' ? cells : lines)(figure);
  panels.classList.toggle('one', drawings.length === 1);
  panels.style.setProperty('--panel', figure.small || drawings.length > 2 ? '15rem' : '21rem');
  panels.replaceChildren(...drawings.map(() => document.createElement('div')));
  const boxes = [...panels.children];
  let last = 0;
  const draw = () => {
    const width = Math.floor(boxes[0].clientWidth);
    if (width === last || width < 100) return;
    last = width;
    boxes.forEach((box, n) => box.replaceChildren(drawings[n](width)));
  };
  draw();
  new ResizeObserver(draw).observe(panels);
}
document.documentElement.dataset.drawn = 'yes';
