// SPDX-License-Identifier: MIT
//
// What each figure says, in a sentence made from its points. Pure.

import type { Dataset } from './dataset.js';
import { about, errorText, integer } from './format.js';
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
