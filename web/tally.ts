// SPDX-License-Identifier: MIT
//
// Sampled errors, added up over rows and heads, and what chance may hide of them: whether a sample decides, or a larger one is asked for.
//
// Where sums of squares decide, rows stand for others, and the squared error of all rows is known to some standard deviations of what other
// rows would have given. A sample may be enlarged once, where chance alone decides. To draw until an error fits would find one that does
// not; so the second look takes no notice of what the first one said, and asks for more deviations (src/MATH.md, section 7).

/** Sampled errors. */
export interface Measured {
  /** In the units of the tolerance; Infinity where the polynomial's weights are not positive. */
  error: number;
  /**
   * The same and what chance may hide: of gradients some standard deviations of what other rows would have given; of outputs with
   * slopes what the largest of all chunks may be over the largest of those that are looked at.
   */
  upper: number;
  /** Relative Frobenius error of the same rows. */
  relative: number;
  /** `upper` of gradients but dv, where these are what is measured. */
  besideDv?: number;
}

/** Samples: of rows, which outputs and dq have, and of keys, whose gradients are columns. */
export type Sample = 'rows' | 'columns';

const SAMPLE_OF = { out: 'rows', dq: 'rows', dk: 'columns', dv: 'columns' } as const;
type Name = keyof typeof SAMPLE_OF;

/** How a tally counts what chance may hide. */
export interface Chance {
  /** From the largest sampled error of an output to that of all rows. */
  hidden: number;
  /** Whether a sample is one that was enlarged. */
  enlarged: Record<Sample, boolean>;
}

/**
 * Standard deviations that a squared error may be larger than it was sampled: by a sample, and by one that was enlarged, so that an error that is
 * too large passes for one that is not in 2.3 of 100 cases at most by the first, and in 0.6 by the second. An error that is above a limit by more
 * than `above` of them is left at that.
 */
export const DEVIATIONS = { first: 2, enlarged: 2.5, above: 1 } as const;

/** Differences this small, relative to what was summed, are float32 rounding and count as none (see `outputError`). */
export const ROUNDING = 2 ** -18;

/** Adds up errors over heads. NaN anywhere counts as an infinite error. */
export class Tally {
  readonly #chance: Chance;
  #largest = 0;
  /** Of all rows, so that chance hides nothing of it. */
  #certain = 0;
  #squares = new Map<Name, Squares>();

  constructor(chance: Chance) {
    this.#chance = chance;
  }

  /** Weights that are not positive, or no polynomial at all. */
  fail(): void {
    this.#largest = Infinity;
  }

  /** @param weights rows that each of these stands for, in sums of squares. */
  output(exact: Float32Array, got: Float32Array, halfRange: number, weights: readonly number[]): void {
    this.#largest = worse(this.#largest, outputError(exact, got, halfRange));
    this.#add('out', exact, got, 0, weights);
  }

  /** An error of outputs that some row has, whichever it is. */
  certain(difference: number, halfRange: number): void {
    this.#certain = worse(this.#certain, halfRange > 0 ? difference / halfRange : 0);
  }

  gradient(
    name: 'dq' | 'dk' | 'dv',
    exact: Float32Array,
    got: Float32Array,
    rounding: number,
    weights: readonly number[],
  ): void {
    this.#add(name, exact, got, rounding, weights);
  }

  result(): Required<Measured> {
    let [error, upper] = [this.#largest, this.#chance.hidden * this.#largest].map((one) => worse(this.#certain, one));
    let besideDv = upper;
    const total = noSquares();
    for (const [name, squares] of this.#squares) {
      if (name !== 'out') {
        const own = this.#upper(name, squares);
        error = worse(error, ratio(squares));
        upper = worse(upper, own);
        if (name !== 'dv') besideDv = worse(besideDv, own);
      }
      total.difference += squares.difference;
      total.reference += squares.reference;
      total.rounding += squares.rounding;
    }
    return { error, upper, relative: worse(ratio(total), this.#largest === Infinity ? Infinity : 0), besideDv };
  }

  /** The samples that do not tell whether the errors keep within a limit: empty where all do, or where one most likely does not. */
  doubtful(limit: number): Sample[] {
    if (!(this.#largest <= limit && this.#certain <= limit)) return [];
    const doubts = new Set<Sample>();
    for (const [name, squares] of this.#squares) {
      if (name !== 'out' && this.#shifted(squares, -DEVIATIONS.above) > limit) return [];
      const upper = name === 'out' ? this.#chance.hidden * this.#largest : this.#upper(name, squares);
      if (upper > limit) doubts.add(SAMPLE_OF[name]);
    }
    return [...doubts];
  }

  #upper(name: Name, squares: Squares): number {
    return this.#shifted(squares, this.#chance.enlarged[SAMPLE_OF[name]] ? DEVIATIONS.enlarged : DEVIATIONS.first);
  }

  #shifted(squares: Squares, deviations: number): number {
    return ratio({ ...squares, difference: squares.difference + deviations * deviation(squares) });
  }

  #add(name: Name, exact: Float32Array, got: Float32Array, rounding: number, weights: readonly number[]): void {
    const squares = this.#squares.get(name) ?? noSquares();
    const width = exact.length / weights.length;
    for (let row = 0; row < weights.length; row++) {
      const weight = weights[row];
      let [difference, reference] = [0, 0];
      for (let n = row * width; n < (row + 1) * width; n++) {
        const off = got[n] - exact[n];
        difference += off * off;
        reference += exact[n] * exact[n];
      }
      squares.difference += weight * difference;
      squares.reference += weight * reference;
      const spread = weight * Math.max(weight - 1, 0);
      squares.spread.difference += spread * difference ** 2;
      squares.spread.both += spread * difference * reference;
      squares.spread.reference += spread * reference ** 2;
      squares.rounding += (weight * rounding ** 2) / weights.length;
    }
    this.#squares.set(name, squares);
  }
}

/** max |got - exact| over half the range of v. */
function outputError(exact: Float32Array, got: Float32Array, halfRange: number): number {
  let [difference, largest] = [0, 0];
  for (let n = 0; n < exact.length; n++) {
    const own = Math.abs(got[n] - exact[n]);
    if (!(own <= difference)) difference = worse(difference, own);
    const size = Math.abs(exact[n]);
    if (size > largest) largest = size;
  }
  return overRange(difference, largest, halfRange);
}

/**
 * A difference of outputs over half the range of v. Where v is constant (half range 0) the output is v whatever the weights: then
 * the error is 0 for differences at the rounding level of the largest |entry|, else infinite.
 */
export function overRange(difference: number, largest: number, halfRange: number): number {
  if (halfRange > 0) return difference / halfRange;
  return difference <= ROUNDING * largest ? 0 : Infinity;
}

/** Sums over rows, of squares; `spread`: sums of w (w - 1) times products of them, w being what a row stands for. */
interface Squares {
  difference: number;
  reference: number;
  rounding: number;
  spread: { difference: number; both: number; reference: number };
}

function noSquares(): Squares {
  return { difference: 0, reference: 0, rounding: 0, spread: { difference: 0, both: 0, reference: 0 } };
}

/**
 * Standard deviation of the difference, by the choice of rows, for a reference that is known: rows with larger gradients have larger
 * errors, so that most of what chance does to one it does to the other. By the variance of a ratio of sums, sum w (w - 1) (d - r D / R)^2.
 */
function deviation({ difference, reference, spread }: Squares): number {
  const ratio = reference > 0 ? difference / reference : 0;
  const variance = spread.difference - 2 * ratio * spread.both + ratio ** 2 * spread.reference;
  return Math.sqrt(Math.max(variance, 0));
}

/** Relative Frobenius error. */
function ratio({ difference, reference, rounding }: Squares): number {
  if (difference <= rounding) return 0; // 0 / 0 included
  return worse(0, Math.sqrt(difference / reference));
}

/** The larger one; NaN is worse than anything. */
export function worse(a: number, b: number): number {
  return Number.isNaN(b) ? Infinity : Math.max(a, b);
}
