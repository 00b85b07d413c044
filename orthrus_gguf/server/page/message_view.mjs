/**
 * One message of a conversation as elements.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./live.mjs").Figures} Figures
 * @typedef {{regenerate: (message: Message) => void, edit: (message: Message, text: string) => void,
 *   select: (message: Message) => void}} Actions
 */
import { iconButton, make } from "./dom.mjs";
import { MEANINGS } from "./runs.mjs";
import { copyButton, showPlain, TextView } from "./text_view.mjs";

const STATES = { stopped: "Stopped.", cut: "Cut off at the limit of tokens.", failed: "", done: "" };

/** @param {number} number */
const fixed = (number) => number.toFixed(number < 10 ? 1 : 0);

/** @param {Figures} figures */
export function figuresText(figures) {
  const { tokensPerCycle, tokensPerSecond, tokens, prompt } = figures;
  return [
    tokensPerCycle === null ? "" : `${tokensPerCycle.toFixed(2)} tokens per cycle`,
    tokensPerSecond === null ? "" : `${fixed(tokensPerSecond)} tokens/s`,
    tokens === 1 ? "1 token" : `${tokens} tokens`,
    prompt ? `${prompt.kept_tokens} of ${prompt.prompt_tokens} prompt tokens were read` : "",
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Shows a message, and goes on showing what becomes of it. */
export class MessageView {
  #actions;
  #body = make("div", { class: "body" });
  #foot = make("div", { class: "foot" });
  #thought = make("div", { class: "thought-text" });
  #summary = make("summary");
  #details = make("details", { class: "thought", hidden: true }, this.#summary, this.#thought);
  #note = make("p", { class: "note", hidden: true });
  #text;
  /** @type {Message} */
  message;

  /**
   * @param {Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.#actions = actions;
    const mine = message.role === "user";
    const name = make("h2", { class: "unseen" }, mine ? "You" : "The model");
    this.element = make("article", { class: `message ${message.role}` }, name);
    if (!mine) this.element.append(this.#details);
    this.element.append(this.#body, this.#note, this.#foot);
    this.#text = new TextView(this.#body);
  }

  /**
   * @param {Message} message
   * @param {Message[]} versions that answer the same message, itself included
   * @param {boolean} coming
   */
  show(message, versions, coming) {
    this.message = message;
    this.element.classList.toggle("coming", coming);
    if (message.role === "user") this.#body.textContent = message.text;
    else this.#showAnswer(message, coming);
    if (coming) this.#foot.replaceChildren(...this.#told(message));
    else this.#foot.replaceChildren(...this.#buttons(message, versions), ...this.#told(message));
  }

  /**
   * @param {Message} message
   * @param {boolean} coming
   */
  #showAnswer(message, coming) {
    this.#details.hidden = !message.thought;
    if (message.thought) {
      const seconds = message.thoughtSeconds;
      const over = seconds === null ? "Thought" : `Thought for ${fixed(seconds)} s`;
      this.#summary.textContent = coming && !message.text ? "Thinking…" : over;
      showPlain(this.#thought, message.thought, message.thoughtRuns);
    }
    this.#text.show(message.text, message.runs);
    const ended = message.state === "streaming" ? "stopped" : message.state;
    const note = message.error || (coming ? "" : STATES[ended]);
    this.#note.hidden = !note;
    this.#note.textContent = note;
    this.#note.classList.toggle("error", Boolean(message.error));
  }

  /** @param {Message} message */
  #told(message) {
    const figures = message.figures;
    if (!figures || !figures.tokens) return [];
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    const told = [];
    for (const origin of /** @type {const} */ (["drafted", "corrected", "plain"])) {
      const count = figures.origins[origin];
      if (!count) continue;
      const part = make("span", { class: `part ${origin}-part` });
      part.style.flexGrow = String(count);
      bar.append(part);
      told.push(`${count} ${MEANINGS[origin]}`);
    }
    const text = make("span", { class: "figures", title: told.join(", ") }, figuresText(figures));
    return [make("span", { class: "told" }, bar, text)];
  }

  /**
   * @param {Message} message
   * @param {Message[]} versions
   */
  #buttons(message, versions) {
    const actions = this.#actions;
    const found = [];
    const at = versions.findIndex((other) => other.id === message.id);
    if (versions.length > 1) {
      const go = (/** @type {number} */ index) => () => actions.select(versions[index]);
      const before = { disabled: at === 0 };
      const after = { disabled: at === versions.length - 1 };
      const count = make("span", {}, `${at + 1}/${versions.length}`);
      found.push(iconButton("left", "Version before", go(at - 1), before), count);
      found.push(iconButton("right", "Version after", go(at + 1), after));
    }
    if (navigator.clipboard) found.push(copyButton("Copy the message", () => message.text));
    if (message.role === "user") {
      found.push(iconButton("edit", "Edit", () => this.edit(), { class: "quiet edit" }));
    } else {
      const again = () => actions.regenerate(message);
      found.push(iconButton("again", "Answer again", again, { class: "quiet regenerate" }));
    }
    return [make("span", { class: "buttons" }, ...found)];
  }

  /** Let the user change a message; what is sent becomes a version beside it. */
  edit() {
    const area = make("textarea", { class: "editor", "aria-label": "Edit the message", rows: 3 });
    area.value = this.message.text;
    const leave = () => {
      this.#body.textContent = this.message.text;
      this.element.classList.remove("editing");
      this.element.querySelector(/** @type {"button"} */ (".edit"))?.focus();
    };
    const send = () => {
      const text = area.value;
      if (!text.trim()) return;
      leave();
      this.#actions.edit(this.message, text);
    };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") leave();
      else if (event.key !== "Enter" || event.shiftKey) return;
      else send();
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = make(
      "div",
      { class: "editor-buttons" },
      make("button", { type: "button", onclick: leave }, "Cancel"),
      make("button", { type: "button", class: "primary", onclick: send }, "Send"),
    );
    this.element.classList.add("editing");
    this.#body.replaceChildren(area, buttons);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
