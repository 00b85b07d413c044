/**
 * How an answer fares while it comes.
 * @typedef {import("./runs.mjs").Origin} Origin
 * @typedef {{tokens: number, cycles: number, tokensPerCycle: number | null,
 *   tokensPerSecond: number | null, origins: Record<Origin, number>,
 *   prompt?: {kept_tokens: number, prompt_tokens: number} | null}} Figures
 */

/** Counts what the server tells with every piece of text. Times are in milliseconds. */
export class Live {
  #tokens = 0;
  #cycles = 0;
  #first = 0;
  #last = 0;
  /** @type {Figures["prompt"]} */
  #prompt = null;
  /** @type {Record<Origin, number>} */
  #origins = { drafted: 0, corrected: 0, plain: 0 };

  /**
   * @param {{origin: Origin, tokens: number, cycles: number}} told tokens and cycles so far
   * @param {number} now
   */
  push(told, now) {
    const more = told.tokens - this.#tokens;
    if (more <= 0) return;
    if (!this.#tokens) this.#first = now;
    this.#last = now;
    this.#origins[told.origin] += more;
    this.#tokens = told.tokens;
    this.#cycles = told.cycles;
  }

  /** The prompt was shortened. @param {Figures["prompt"]} prompt how */
  shortened(prompt) {
    this.#prompt = prompt;
  }

  /** The first token comes out of the prompt's pass: neither cycles nor time have brought it.
   * @returns {Figures} */
  get figures() {
    const more = this.#tokens - 1;
    const seconds = (this.#last - this.#first) / 1000;
    return {
      tokens: this.#tokens,
      cycles: this.#cycles,
      tokensPerCycle: this.#cycles ? more / this.#cycles : null,
      tokensPerSecond: more > 0 && seconds > 0 ? more / seconds : null,
      origins: { ...this.#origins },
      prompt: this.#prompt,
    };
  }

  /**
   * What the server measured, in place of what was seen here.
   * @param {Record<string, number | null>} timings
   * @returns {Figures}
   */
  ended(timings) {
    return {
      ...this.figures,
      tokens: timings.predicted_n ?? this.#tokens,
      tokensPerCycle: timings.tokens_per_cycle ?? null,
      tokensPerSecond: timings.predicted_per_second ?? null,
    };
  }
}
