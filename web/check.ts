// SPDX-License-Identifier: MIT
//
// One value of unknown kind at a time: what it must be, and the error that says so. TypeError: wrong kind, or an option that
// does not exist; RangeError: wrong size or value. Every message is "function: rule and value".

export type Given = Readonly<Record<string, unknown>>;

export function readRecord(name: string, option: string, value: unknown, known: readonly string[]): Given {
  if (typeof value !== 'object' || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) {
    throw wrong(name, option, 'an object', value, false);
  }
  for (const key of Object.keys(value)) {
    if (known.includes(key)) continue;
    if (key === 'signal' || key === 'onProgress') {
      throw new TypeError(`${name}: ${key} is only for createRopeAttentionWorker; this instance computes at once`);
    }
    const inside = option === 'its argument' ? '' : `${option}.`;
    throw new TypeError(`${name}: there is no option ${inside}${key}; known are ${known.join(', ')}`);
  }
  return value as Given;
}

/** 'Float32Array' and so on for a typed array, of another realm too; '' for anything else. */
export function tagOf(value: unknown): string {
  return ArrayBuffer.isView(value) ? ((value as Float32Array)[Symbol.toStringTag] ?? '') : '';
}

export function readFloats(name: string, option: string, value: unknown, values: number, needs = 'shape'): Float32Array {
  if (tagOf(value) !== 'Float32Array') throw wrong(name, option, 'a Float32Array', value, false);
  const array = value as Float32Array;
  if (array.length !== values)
    throw new RangeError(`${name}: ${option} has ${array.length} values, ${needs} needs ${values}`);
  return array;
}

/** A copy. `many` takes so many numbers; `needs` says what decides that. */
export function readNumbers(
  name: string,
  option: string,
  value: unknown,
  many: (values: number) => boolean,
  needs: string,
): Float64Array {
  const typed = /^(Float|U?[Ii]nt)\d\d?Array$/.test(tagOf(value));
  if (!typed && !Array.isArray(value)) throw wrong(name, option, 'a typed array or an array of numbers', value, false);
  const numbers = Float64Array.from(value as ArrayLike<unknown>, (one, n) => readNumber(name, `${option}[${n}]`, one));
  if (!many(numbers.length)) throw new RangeError(`${name}: ${option} has ${numbers.length} values, ${needs}`);
  return readFinite(name, option, numbers);
}

/** The array itself. @throws RangeError with the place of the first NaN or infinity. */
export function readFinite<T extends Float32Array | Float64Array>(name: string, option: string, values: T): T {
  const bad = values.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw wrong(name, `${option}[${bad}]`, 'finite', values[bad], true);
  return values;
}

export function readNumber(name: string, option: string, value: unknown): number {
  if (typeof value !== 'number') throw wrong(name, option, 'a number', value, false);
  return value;
}

export function readInteger(name: string, option: string, value: unknown, least: number, most: number): number {
  const number = readNumber(name, option, value);
  if (!Number.isInteger(number) || number < least || number > most) {
    throw wrong(name, option, `an integer from ${least} to ${most}`, number, true);
  }
  return number;
}

export function readBoolean(name: string, option: string, value: unknown, absent: boolean): boolean {
  if (value === undefined) return absent;
  if (typeof value !== 'boolean') throw wrong(name, option, 'true or false', value, false);
  return value;
}

/** One of the texts, the first by default. */
export function readChoice<T extends string>(name: string, option: string, value: unknown, texts: readonly [T, ...T[]]): T {
  if (value === undefined) return texts[0];
  const found = texts.find((text) => text === value);
  if (found === undefined)
    throw wrong(name, option, `one of '${texts.join("', '")}'`, value, typeof value === 'string');
  return found;
}

/** The error of a value that breaks a rule; of the right kind: RangeError, else TypeError. */
export function wrong(name: string, option: string, rule: string, value: unknown, rightKind: boolean): Error {
  const message = `${name}: ${option} must be ${rule}, got ${describe(value)}`;
  return rightKind ? new RangeError(message) : new TypeError(message);
}

function describe(value: unknown): string {
  if (typeof value === 'string') return `'${value}'`;
  if (Array.isArray(value)) return 'an array';
  if (typeof value === 'function') return 'a function';
  if (typeof value === 'object' && value !== null) return `a ${Object.prototype.toString.call(value).slice(8, -1)}`;
  return String(value);
}
