// SPDX-License-Identifier: MIT
//
// Numbers as the report writes them, in sentences, tables and on axes. Pure; used in Node and in the page.

const SUPERSCRIPTS = { '-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵', 6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹' };

const superscript = (value) => [...String(value)].map((c) => SUPERSCRIPTS[c]).join('');

/** 4096 -> 4,096 */
export const integer = (value) => Math.round(value).toLocaleString('en');

/** 8.1e-7 -> 8.1 × 10⁻⁷, 0.012 -> 0.012; 'none' where there is no number. */
export function error(value) {
  if (value === null || !Number.isFinite(value)) return 'none';
  if (value === 0) return '0';
  if (Math.abs(value) >= 0.01 && Math.abs(value) < 1000) return String(Number(value.toPrecision(2)));
  const [mantissa, exponent] = value.toExponential(1).split('e');
  if (mantissa === '1.0') return `10${superscript(Number(exponent))}`;
  return `${mantissa} × 10${superscript(Number(exponent))}`;
}

/** Up to `digits` significant digits, thousands apart. */
export function number(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return 'none';
  const rounded = Number(value.toPrecision(digits));
  return Math.abs(rounded) >= 1000 ? rounded.toLocaleString('en') : Math.abs(rounded) < 1e-3 ? error(value) : String(rounded);
}

/** Milliseconds in the unit that suits. */
export function duration(milliseconds) {
  if (milliseconds === null || !Number.isFinite(milliseconds)) return 'none';
  if (milliseconds < 0.9995) return `${number(milliseconds * 1000)} µs`;
  if (milliseconds < 999.5) return `${number(milliseconds)} ms`;
  return `${number(milliseconds / 1000)} s`;
}

/** A ratio: 5.93 -> 5.9x, 0.256 -> 0.26x */
export const ratio = (value) => (value === null || !Number.isFinite(value) ? 'none' : `${number(value, 2)}x`);

/** Nothing but all of it is 100 %. */
export function percent(share) {
  if (share === null || !Number.isFinite(share)) return 'none';
  return share < 1 && share > 0.9995 ? 'over 99.9 %' : `${number(100 * share, 3)} %`;
}

export const powerOfTen = (value) => `10${superscript(Math.round(Math.log10(value)))}`;

/** "a, b and c" */
export const list = (parts) => (parts.length < 2 ? parts.join('') : `${parts.slice(0, -1).join(', ')} and ${parts.at(-1)}`);

/** By the `kind` of a column. */
const WRITERS = {
  integer,
  error,
  number: (value) => number(value),
  ms: duration,
  ratio,
  percent,
  slope: (value) => value.toFixed(2),
};

/** A cell of a table. */
export function write(value, kind) {
  if (value === null || value === undefined || value === false) return '–';
  if (value === true) return 'yes';
  return typeof value === 'number' && kind in WRITERS ? WRITERS[kind](value) : String(value);
}
