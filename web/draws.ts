// SPDX-License-Identifier: MIT
//
// Numbers drawn at random from many, and what each of them stands for, so that sums over the few that are drawn are on average those
// over all. Draws may be continued: what was drawn before stays, and stands for less.

/** A number that was drawn, and for how many it stands. */
export interface Drawn {
  row: number;
  weight: number;
}

/** Where so many times what is drawn would be all, all of them are. */
const NEARLY_ALL = 3;

/** Up to `count` different numbers below `total`: those of `first`, then random ones. */
export function draw(count: number, total: number, first: readonly number[], next: () => number): number[] {
  const drawn = new Set(first);
  while (drawn.size < Math.min(count, total)) {
    let n = Math.floor(next() * total);
    while (drawn.has(n)) n = (n + 1) % total; // the next free one, so that this ends soon
    drawn.add(n);
  }
  return [...drawn];
}

/** Numbers below `total` that are not `taken`; sums over all that are not taken are, on average, the weighted sums over those drawn. */
export class WeightedDraws {
  readonly #total: number;
  readonly #length: number | null;
  readonly #taken: ReadonlySet<number>;
  readonly #next: () => number;
  /** How often each was drawn. */
  readonly #times = new Map<number, number>();
  #evenly = 0;
  #byLogarithm = 0;
  #all = false;

  /**
   * @param length null: all are drawn evenly. Else numbers are rows in runs of this length, of which the first see few keys and have the
   *   larger gradients (of squares that fall as 1 / row): half as many again are drawn evenly in the logarithm of the row.
   */
  constructor(total: number, length: number | null, taken: ReadonlySet<number>, next: () => number) {
    this.#total = total;
    this.#length = length;
    this.#taken = taken;
    this.#next = next;
  }

  /** Draws about `count` more; all that are left, where there are few. */
  add(count: number): this {
    const byLogarithm = this.#length === null ? 0 : Math.ceil(count / 2);
    this.#evenly += count;
    this.#byLogarithm += byLogarithm;
    if (this.#total <= this.#taken.size + NEARLY_ALL * (this.#evenly + this.#byLogarithm)) {
      this.#all = true;
      const known = [...this.#taken, ...this.#times.keys()];
      for (const row of draw(this.#total, this.#total, known, this.#next).slice(known.length)) this.#times.set(row, 1);
      return this;
    }
    const run = this.#run;
    for (let n = 0; n < count + byLogarithm; n++) {
      const [u, w] = [this.#next(), this.#next()];
      const place = n < count ? Math.floor(u * run) : Math.min(Math.floor((run + 1) ** u), run) - 1;
      const row = Math.floor(w * (this.#total / run)) * run + place;
      if (!this.#taken.has(row)) this.#times.set(row, (this.#times.get(row) ?? 0) + 1);
    }
    return this;
  }

  /** In the order in which they were drawn; one that was drawn twice counts twice. */
  get rows(): Drawn[] {
    const drawn: Drawn[] = [];
    for (const [row, times] of this.#times) drawn.push({ row, weight: this.#all ? 1 : times / this.#expected(row) });
    return drawn;
  }

  get #run(): number {
    return this.#length ?? this.#total;
  }

  /** How often a row is drawn on average. */
  #expected(row: number): number {
    const run = this.#run;
    const share = this.#byLogarithm > 0 ? Math.log1p(1 / ((row % run) + 1)) * (run / this.#total / Math.log(run + 1)) : 0;
    return this.#evenly / this.#total + this.#byLogarithm * share;
  }
}

/** Numbers in [0, 1) by mulberry32, from a seed and two more integers. */
export function random(seed: number, head: number, stream: number): () => number {
  let state = (seed ^ Math.imul(head + 1, 0x9e3779b1) ^ Math.imul(stream, 0x85ebca6b)) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
