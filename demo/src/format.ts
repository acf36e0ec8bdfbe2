// SPDX-License-Identifier: MIT
//
// Numbers as the page writes them. Pure.

const SUPERSCRIPTS: Record<string, string> = {
  '-': '⁻', '0': '⁰', '1': '¹', '2': '²', '3': '³', '4': '⁴', '5': '⁵', '6': '⁶', '7': '⁷', '8': '⁸', '9': '⁹', '.': '·',
};

export const superscript = (value: number | string): string => [...String(value)].map((c) => SUPERSCRIPTS[c] ?? c).join('');

/** 4096 -> 4,096 */
export const integer = (value: number): string => Math.round(value).toLocaleString('en');

/** 0.00000081 -> 8.1 × 10⁻⁷, 0.012 -> 0.012 */
export function errorText(value: number | null): string {
  if (value === null || !Number.isFinite(value)) return 'none';
  if (value === 0) return '0';
  if (value >= 0.01 && value < 1000) return value.toPrecision(2);
  const [mantissa, exponent] = value.toExponential(1).split('e');
  return `${mantissa} × 10${superscript(Number(exponent))}`;
}

/** The same for a screen reader or a plain string: 8.1e-7 */
export const plainError = (value: number | null): string =>
  value === null || !Number.isFinite(value) ? 'none' : Number(value.toPrecision(2)).toString();

/** Milliseconds in the unit that suits. */
export function duration(ms: number): string {
  if (ms < 0.9995) return `${Number((ms * 1000).toPrecision(3))} µs`;
  if (ms < 1000) return `${Number(ms.toPrecision(3))} ms`;
  return `${Number((ms / 1000).toPrecision(3))} s`;
}

/** Two digits that are worth saying: 1513 -> 1,500 */
export const about = (value: number): string => integer(Number(value.toPrecision(2)));

export const powerOfTen = (value: number): string => `10${superscript(Math.round(Math.log10(value)))}`;
