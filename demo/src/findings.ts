// SPDX-License-Identifier: MIT
//
// What each figure says, in a sentence made from its points. Pure.

import type { Dataset } from './dataset.js';
import { about, errorText, integer } from './format.js';
import { type Idea, TOKENS } from './idea.js';
import type { ErrorPoint, Omission } from './measure.js';
import { rank } from './measure.js';
import { BOUNDS, degreesOf, type Panel, type Settings } from './state.js';
import { timeCurves } from './trends.js';

const NOTHING_YET = 'The first points will be here in a moment.';
/** An error that one would call small: a thousandth of half the values' range. */
const SMALL = 1e-3;

const ofDegree = (points: readonly ErrorPoint[], degree: number) => points.filter((point) => point.degree === degree);

/** "a, b and c" */
function list(parts: readonly string[]): string {
  return parts.length < 2 ? parts.join('') : `${parts.slice(0, -1).join(', ')} and ${parts[parts.length - 1]}`;
}

function byLength(dataset: Dataset): string {
  const { settings } = dataset;
  const points = dataset.byLength();
  const longest = Math.max(...points.map((point) => point.length));
  const at = points.filter((point) => point.length === longest && Number.isFinite(point.output));
  if (at.length === 0) return NOTHING_YET;
  const shown = at.length > 2 ? at.slice(-2) : at;
  const errors = shown.map((point) => `${errorText(point.output)} with degree ${point.degree}`);
  const first = `With entries up to ${settings.entryBound} and N = ${integer(longest)}, the output is off by ${list(errors)}`;
  const along = ofDegree(points, shown[0]!.degree).map((point) => point.output);
  if (along.length < 3) return `${first}.`;
  const growth = along[along.length - 1]! / along[0]!;
  return growth < 2 ? `${first}. Longer sequences are no worse.` : `${first}, ${about(growth)} times the error of the shortest.`;
}

function byBound(dataset: Dataset): string {
  const { settings } = dataset;
  const points = dataset.byBound();
  if (new Set(points.map((point) => point.entryBound)).size < BOUNDS.length / 2) return NOTHING_YET;
  const limits = degreesOf(settings).flatMap((degree) => {
    const good = ofDegree(points, degree).filter((point) => point.output <= SMALL);
    return good.length === 0 ? [] : [{ degree, limit: Math.max(...good.map((point) => point.entryBound)) }];
  });
  if (limits.length === 0) return `No degree shown keeps the output within a thousandth of half the values’ range.`;
  const parts = limits.map(({ degree, limit }, i) => `degree ${degree} ${i === 0 ? 'holds up to B = ' : 'up to '}${limit}`);
  return `Asked for a thousandth of half the values’ range, ${list(parts)}.`;
}

function time(dataset: Dataset): string {
  const curves = timeCurves(dataset.times());
  const exact = curves.find((curve) => curve.degree === null);
  const polynomials = curves.filter((curve) => curve.degree !== null);
  // One length says nothing about others.
  if (!exact || exact.points.length < 2 || polynomials.length === 0) return NOTHING_YET;
  const always = polynomials.filter((curve) => curve.crossover === 'before').map((curve) => String(curve.degree));
  const wins = always.length === 0 ? [] : [`${always.length > 1 ? 'degrees' : 'degree'} ${list(always)} at every length shown`];
  for (const { degree, crossover } of polynomials) {
    if (crossover !== null && typeof crossover === 'object') wins.push(`degree ${degree} from N\u00a0≈\u00a0${about(crossover.x)}`);
  }
  const model = polynomials.find((curve) => curve.degree === 2 && curve.law) ?? polynomials.find((curve) => curve.law);
  const slopes =
    exact.law && model?.law
      ? `Exact rises with slope ${exact.law.slope.toFixed(2)}, degree ${model.degree} with ${model.law.slope.toFixed(2)}. `
      : '';
  return wins.length > 0 ? `${slopes}Faster than exact: ${list(wins)}.` : `${slopes}At these lengths exact is the fastest.`;
}

export function finding(panel: Panel, dataset: Dataset): string {
  return { length: byLength, bound: byBound, time }[panel](dataset);
}

/** What is missing from a figure, in a sentence; empty when nothing is. */
export function omissionText(omissions: readonly Omission[], settings: Settings): string {
  const parts = omissions.map(({ panel, degree, length }) => {
    const name = degree === null ? 'exact' : `degree ${degree} (${integer(rank(settings.headDim, degree))} features)`;
    return panel === 'bound' ? name : `${name} from N = ${integer(length)}`;
  });
  return parts.length === 0 ? '' : `Left out, as too much work for a page: ${list(parts)}.`;
}

/** Of an average weight, from which on one would say that the factors miss. */
const MISSED = 0.1;

/** The next number of two digits that is not smaller. */
function roundUp(value: number): number {
  const unit = 10 ** (Math.floor(Math.log10(value)) - 1);
  return Number((Math.ceil(value / unit) * unit).toPrecision(2));
}

/** "0.35 % of", "12 times": what is never exceeded. */
function ofAverage(worst: number): string {
  const bound = roundUp(worst);
  if (!Number.isFinite(bound)) return worst === 0 ? '0 % of' : 'more than any number of times';
  if (bound >= 1) return `${bound < 10 ? bound : bound < 1e6 ? integer(bound) : errorText(bound)} times`;
  return bound >= 1e-4 ? `${Number((100 * bound).toPrecision(2))} % of` : `${errorText(bound)} of`;
}

export function ideaFinding({ entryBound, degree, features, difference, product }: Idea): string {
  const worst = difference.reduce((most, value) => (Math.abs(value) <= most ? most : Math.abs(value)), 0);
  const rank = features.length;
  if (worst < MISSED) {
    return `With entries up to ${entryBound}, ${rank} features of each token give all ${integer(TOKENS ** 2)} weights to within ${ofAverage(worst)} an average one.`;
  }
  const negative = product.reduce((count, value) => count + (value < 0 ? 1 : 0), 0);
  const wrong = negative === 0 ? '' : `, and ${integer(negative)} ${negative === 1 ? 'is' : 'are'} negative`;
  return `With entries up to ${entryBound} the scores spread too far for degree ${degree}: weights are off by up to ${ofAverage(worst)} an average one${wrong}.`;
}

/** One weight in words. */
export function ideaReadout({ weights, product, difference, scores }: Idea, i: number, j: number): string {
  const at = i * TOKENS + j;
  const [score, exact, made] = [scores, weights, product].map((values) => String(Number(values[at]!.toPrecision(3))).replace('-', '−'));
  return `Query ${i + 1}, key ${j + 1}: score ${score}; weight ${exact} by exp, ${made} by the factors, off by ${errorText(Math.abs(difference[at]!))}`;
}
