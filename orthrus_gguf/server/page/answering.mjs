/**
 * From events of the server to a message.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./runs.mjs").Origin} Origin
 */
import { Live } from "./live.mjs";
import { grow } from "./runs.mjs";

/** Fills a message while its answer comes. */
export class Answering {
  #live = new Live();
  #begun = 0;

  /** @param {Message} message */
  constructor(message) {
    this.message = message;
  }

  /**
   * @param {any} event a chunk of a chat completion
   * @param {number} now in milliseconds
   */
  push(event, now) {
    const message = this.message;
    const [choice] = event.choices ?? [];
    if (choice) {
      const told = choice.drafting;
      /** @type {Origin} */
      const origin = told?.origin ?? "plain";
      if (told) this.#live.push(told, now);
      if (choice.prefill) this.#live.shortened(choice.prefill);
      const { content, reasoning_content: thought } = choice.delta ?? {};
      if (thought) {
        this.#begun ||= now;
        message.thought += thought;
        grow(message.thoughtRuns, thought.length, origin);
      }
      if (content) {
        if (this.#begun && message.thoughtSeconds === null) this.#thoughtOver(now);
        message.text += content;
        grow(message.runs, content.length, origin);
      }
      message.figures = this.#live.figures;
      if (choice.finish_reason) {
        if (this.#begun && message.thoughtSeconds === null) this.#thoughtOver(now);
        message.state = choice.finish_reason === "length" ? "cut" : "done";
      }
    }
    if (event.timings) message.figures = this.#live.ended(event.timings);
  }

  /** @param {number} now */
  #thoughtOver(now) {
    this.message.thoughtSeconds = (now - this.#begun) / 1000;
  }
}

/**
 * How far a prompt has been read, in words; nothing while there is nothing to wait for.
 * @param {any} event
 */
export function progressText(event) {
  const progress = event.prompt_progress;
  if (!progress || progress.processed >= progress.total) return "";
  return `Reading: ${progress.processed} of ${progress.total} tokens`;
}
