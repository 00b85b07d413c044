/**
 * The messages of the current conversation.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./message_view.mjs").Actions} Actions
 */
import { byId, make } from "./dom.mjs";
import { MessageView } from "./message_view.mjs";
import { isComing, siblings } from "./tree.mjs";

const EXAMPLES = [
  "Write a Python function that tells whether a word is a palindrome.",
  "List the planets of the solar system, with one fact about each.",
  "Explain in plain words why the sky is blue.",
];

/** Pixels from the end within which the view follows what comes. */
const NEAR = 80;

/** Shows them. */
export class Thread {
  #scroll = byId("thread");
  #list = byId("messages");
  /** @type {MessageView[]} */
  #views = [];
  #wait = make("p", { class: "wait", hidden: true });
  #frame = 0;

  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    byId("examples").replaceChildren(
      ...EXAMPLES.map((text) => make("li", {}, make("button", { type: "button" }, text))),
    );
  }

  /** Whether an answer is shown as coming. */
  get looksComing() {
    return this.#views[this.#views.length - 1]?.element.classList.contains("coming") ?? false;
  }

  /**
   * @param {Message[]} messages
   * @param {Map<string, Message>} all versions included
   * @param {(id: string) => boolean} isMine whether the answer with an id comes to this tab
   */
  show(messages, all, isMine) {
    const follows = this.#isNearEnd;
    byId("welcome").hidden = messages.length > 0;
    this.#views = messages.map((message, index) => {
      const old = this.#views[index];
      if (old?.message.id === message.id) return old;
      return new MessageView(message, this.actions);
    });
    const elements = this.#views.map((view) => view.element);
    for (const [index, element] of elements.entries()) {
      const there = this.#list.children[index];
      if (there !== element) this.#list.insertBefore(element, there ?? null);
    }
    while (this.#list.children.length > elements.length) this.#list.lastElementChild.remove();
    for (const [index, view] of this.#views.entries()) {
      const message = messages[index];
      if (view.element.classList.contains("editing")) continue;
      view.show(message, siblings(all, message), isComing(message, isMine(message.id), Date.now()));
    }
    if (!this.looksComing) this.#wait.remove();
    if (follows) this.toEnd();
  }

  /**
   * An answer has grown: show it when the screen is drawn next.
   * @param {Message} message
   */
  grown(message) {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const view = this.#views.find((one) => one.message.id === message.id);
      if (!view || message.state !== "streaming") return;
      const follows = this.#isNearEnd;
      view.show(message, [message], true);
      if (follows) this.toEnd();
    });
  }

  /**
   * What an answer waits for.
   * @param {Message} message
   * @param {string} text
   */
  waits(message, text) {
    const view = this.#views.find((one) => one.message.id === message.id);
    this.#wait.hidden = !text;
    this.#wait.textContent = text;
    if (text && view) view.element.append(this.#wait);
  }

  get #isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroll;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  editLast() {
    const view = this.#views.findLast((one) => one.message.role === "user");
    if (!this.looksComing) view?.edit();
  }

  regenerateLast() {
    const view = this.#views[this.#views.length - 1];
    if (view?.message.role === "assistant") this.actions.regenerate(view.message);
  }
}
