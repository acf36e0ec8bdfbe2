// SPDX-License-Identifier: MIT
//
// The one file that touches WebAssembly memory. A call reserves all it needs, grows the memory once, copies in, runs, copies
// out, and is forgotten by the next `reset`. Every view is made for one copy and dropped: growth detaches older ones.

const PAGE = 65536;

/** The last page is left out, so that no address, and no address just past an array, exceeds 32 bits. */
export const MEMORY_LIMIT = 2 ** 32 - PAGE;

/** The fields of a C struct in order; each takes 4 bytes in wasm32. `address` is a pointer; an i32 is only written. */
type Fields = Readonly<Record<string, 'u32' | 'i32' | 'f32' | 'address'>>;
export type Values<F extends Fields> = Record<keyof F, number>;

/** ra_problem of rope_attention.h. */
export const PROBLEM = {
  batch: 'u32',
  heads: 'u32',
  kv_heads: 'u32',
  query_length: 'u32',
  key_length: 'u32',
  head_dim: 'u32',
  value_dim: 'u32',
  rotary_dim: 'u32',
  interleaved: 'u32',
  causal: 'u32',
  query_offset: 'i32',
  scale: 'f32',
  frequencies: 'address',
  method: 'u32',
  degree: 'u32',
  coefficients: 'address',
  layout: 'u32',
  rotary_factor: 'f32',
  query_positions: 'address',
  key_positions: 'address',
  position_batches: 'u32',
  cos_table: 'address',
  sin_table: 'address',
  table_rows: 'u32',
  window_left: 'i32',
  window_right: 'i32',
  segments: 'address',
  segment_count: 'u32',
  alibi: 'address',
  softcap: 'f32',
  bias: 'address',
  bias_heads: 'u32',
  mask: 'address',
  allowed: 'address',
  mask_batch: 'u32',
  mask_head: 'u32',
  mask_row: 'u32',
  sinks: 'address',
  score_bound: 'f32',
  relative_positions: 'address',
  support: 'address',
  support_count: 'u32',
  weights: 'address',
  outlier_queries: 'address',
  outlier_keys: 'address',
  outlier_query_count: 'u32',
  outlier_key_count: 'u32',
  decay_rates: 'address',
  decay_weights: 'address',
  decay_tops: 'address',
  decay_count: 'u32',
  decay_from: 'u32',
  lag_coefficients: 'address',
  lag_degree: 'u32',
  dv_by_derivative: 'u32',
} as const satisfies Fields;

/** ra_arrays. */
export const ARRAYS = {
  q: 'address',
  k: 'address',
  v: 'address',
  out: 'address',
  lse: 'address',
  dout: 'address',
  dq: 'address',
  dk: 'address',
  dv: 'address',
  dbias: 'address',
  dalibi: 'address',
  dsinks: 'address',
  dweights: 'address',
  means: 'address',
} as const satisfies Fields;

/** ra_bounds. */
export const BOUNDS = {
  q_entry: 'f32',
  k_entry: 'f32',
  q_norm: 'f32',
  k_norm: 'f32',
  q_plain_norm: 'f32',
  k_centred_norm: 'f32',
  q_squares: 'f32',
  k_squares: 'f32',
  v_entry: 'f32',
  v_half_range: 'f32',
  q_argmax: 'u32',
  k_argmax: 'u32',
  finite: 'u32',
  q_mean_norm: 'f32',
} as const satisfies Fields;

/** ra_distance. */
export const DISTANCE = { out: 'f32', outEntry: 'f32', lse: 'f32', lseEntry: 'f32', dq: 'f32', dqSize: 'f32' } as const satisfies Fields;

/** ra_spread. */
export const SPREAD = { scores: 'f32', keys: 'f32', gain: 'f32', rows: 'u32' } as const satisfies Fields;

/** Bytes of a struct. */
export function sizeOf(fields: Fields): number {
  return 4 * layoutOf(fields).size;
}

interface Place {
  at: number;
  kind: Fields[string];
}

const layouts = new WeakMap<Fields, Map<string, Place>>();

/** Where each field is, kept for every struct. */
function layoutOf(fields: Fields): Map<string, Place> {
  let known = layouts.get(fields);
  if (!known) {
    known = new Map(Object.entries(fields).map(([name, kind], n) => [name, { at: 4 * n, kind }]));
    layouts.set(fields, known);
  }
  return known;
}

/** All memory above the module's own data, handed out from the bottom up and taken back as a whole. */
export class Arena {
  readonly #memory: WebAssembly.Memory;
  readonly #base: number;
  readonly #limit: number;
  #top: number;

  /** @param base first free byte (the module's __heap_base). @param limit bytes that the memory may reach. */
  constructor(memory: WebAssembly.Memory, base: number, limit: number) {
    this.#memory = memory;
    this.#base = align(base);
    this.#limit = Math.min(limit, MEMORY_LIMIT);
    this.#top = this.#base;
  }

  /** Bytes of memory held. */
  get bytes(): number {
    return this.#memory.buffer.byteLength;
  }

  /** Bytes of memory that what is reserved so far needs; not limited to 32 bits. */
  get needed(): number {
    return this.#top;
  }

  /** Bytes that can still be reserved. */
  get free(): number {
    return this.#limit - this.#top;
  }

  /** Takes everything back, or what was reserved since `needed` was `mark`. */
  reset(mark = this.#base): void {
    this.#top = mark;
  }

  /** An address, a multiple of 16, for `bytes` bytes that are there after the next `commit`. */
  reserve(bytes: number): number {
    const address = this.#top;
    this.#top = align(address + bytes);
    return address;
  }

  /** @throws RangeError naming `caller` and both numbers when the reserved bytes exceed the limit. */
  check(caller: string): void {
    if (this.#top <= this.#limit) return;
    const needed = Number.isFinite(this.#top) ? this.#top : `more than ${2 ** 32}`;
    throw new RangeError(`${caller}: needs ${needed} bytes of WebAssembly memory, the limit is ${this.#limit}`);
  }

  /** Makes the reserved bytes exist. @throws RangeError as `check`, and when the engine does not give them. */
  commit(caller: string): void {
    this.check(caller);
    const [needed, held] = [this.#top, this.bytes];
    if (needed <= held) return;
    try {
      this.#memory.grow(Math.ceil((needed - held) / PAGE));
    } catch (cause) {
      throw new RangeError(
        `${caller}: needs ${needed} bytes of WebAssembly memory, the engine gives no more than the present ${held}`,
        { cause },
      );
    }
  }

  writeFloats(address: number, values: ArrayLike<number>): void {
    new Float32Array(this.#memory.buffer, address, values.length).set(values);
  }

  writeDoubles(address: number, values: ArrayLike<number>): void {
    new Float64Array(this.#memory.buffer, address, values.length).set(values);
  }

  writeBytes(address: number, values: ArrayLike<number>): void {
    new Uint8Array(this.#memory.buffer, address, values.length).set(values);
  }

  writeIntegers(address: number, values: ArrayLike<number>): void {
    new Uint32Array(this.#memory.buffer, address, values.length).set(values);
  }

  /** A copy. */
  readIntegers(address: number, count: number): Uint32Array {
    return new Uint32Array(this.#memory.buffer, address, count).slice();
  }

  /** A copy. */
  readFloats(address: number, count: number): Float32Array {
    return new Float32Array(new Float32Array(this.#memory.buffer, address, count)); // slice() fills the new one with zeros first
  }

  /** Copies of rows, of `width` each, of an array that is there. */
  gatherFloats(address: number, rows: readonly number[], width: number): Float32Array {
    const view = new Float32Array(this.#memory.buffer, address);
    const gathered = new Float32Array(rows.length * width);
    for (let n = 0, at = 0; n < rows.length; n++) {
      for (let place = rows[n] * width; at < (n + 1) * width; place++) gathered[at++] = view[place];
    }
    return gathered;
  }

  /** Fields that `values` does not have keep what they held. */
  writeStruct<F extends Fields>(address: number, fields: F, values: Partial<Values<F>>): void {
    const view = new DataView(this.#memory.buffer, address, sizeOf(fields));
    const layout = layoutOf(fields);
    for (const name in values) {
      const value = values[name];
      if (value === undefined) continue;
      const { at, kind } = layout.get(name)!;
      if (kind === 'f32') view.setFloat32(at, value, true);
      else view.setUint32(at, value, true); // modulo 2^32, so right for i32 too
    }
  }

  readStruct<F extends Fields>(address: number, fields: F): Values<F> {
    const view = new DataView(this.#memory.buffer, address, sizeOf(fields));
    const values: Record<string, number> = {};
    for (const [name, { at, kind }] of layoutOf(fields)) {
      const number = kind === 'i32' ? view.getInt32(at, true) : view.getUint32(at, true);
      values[name] = kind === 'f32' ? view.getFloat32(at, true) : number;
    }
    return values as Values<F>;
  }
}

function align(address: number): number {
  return Math.ceil(address / 16) * 16;
}
