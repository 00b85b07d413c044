/**
 * How the tokens of a text came about, as runs: [length in UTF-16 units, origin], one after another.
 * @typedef {"plain" | "drafted" | "corrected"} Origin
 * @typedef {[number, Origin]} Run
 */

/** @type {Record<Origin, string>} */
export const MEANINGS = {
  drafted: "accepted draft",
  corrected: "in place of a refused draft",
  plain: "without a draft",
};

/**
 * Make runs longer by a piece of text.
 * @param {Run[]} runs
 * @param {number} length
 * @param {Origin} origin
 */
export function grow(runs, length, origin) {
  const last = runs[runs.length - 1];
  if (last && last[1] === origin) last[0] += length;
  else if (length) runs.push([length, origin]);
}

/**
 * The parts of text[from, to) by origin. Text beyond the runs is plain.
 * @param {Run[]} runs
 * @param {number} from
 * @param {number} to
 * @returns {{from: number, to: number, origin: Origin}[]}
 */
export function cut(runs, from, to) {
  const found = [];
  let start = 0;
  for (const [length, origin] of runs) {
    const end = start + length;
    const a = Math.max(from, start);
    const b = Math.min(to, end);
    if (a < b) found.push({ from: a, to: b, origin });
    start = end;
    if (start >= to) break;
  }
  const told = Math.max(from, Math.min(start, to));
  if (told < to) found.push({ from: told, to, origin: /** @type {Origin} */ ("plain") });
  return found;
}

/** A reader of runs for ranges that come in order: each run is looked at once. */
export class Cutter {
  #runs;
  #index = 0;
  #start = 0;

  /** @param {Run[]} runs */
  constructor(runs) {
    this.#runs = runs;
  }

  /**
   * See `cut`.
   * @param {number} from
   * @param {number} to
   */
  cut(from, to) {
    if (from < this.#start) this.#index = this.#start = 0;
    for (;;) {
      const run = this.#runs[this.#index];
      if (!run || this.#start + run[0] > from) break;
      this.#start += run[0];
      this.#index += 1;
    }
    const start = this.#start;
    const parts = cut(this.#runs.slice(this.#index), from - start, to - start);
    return parts.map((part) => ({ ...part, from: part.from + start, to: part.to + start }));
  }
}
