import { byId } from "./dom.mjs";

/** The field for messages, and the button beside it, which sends or stops. */
export class Composer {
  /** @type {HTMLTextAreaElement} */
  #field = byId("prompt");
  #send = byId("send");
  #stop = byId("stop");
  #coming = false;

  /** @param {{send: (text: string) => void, stop: () => void, editLast: () => void}} actions */
  constructor(actions) {
    this.actions = actions;
    byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#stop.addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
    this.#field.addEventListener("input", () => this.#changed());
    this.#field.addEventListener("keydown", (event) => this.#key(event));
    byId("examples").addEventListener("click", (/** @type {Event} */ event) => {
      const button = /** @type {Element} */ (event.target).closest("button");
      if (button) actions.send(button.textContent ?? "");
    });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.isComposing) return; // Enter chooses a word, for example in Japanese
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "ArrowUp" && !this.#field.value) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  #submit() {
    const text = this.#field.value;
    if (this.#coming || !text.trim()) return;
    this.#field.value = "";
    this.#changed();
    this.actions.send(text);
  }

  #changed() {
    this.#send.disabled = !this.#field.value.trim();
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
  }

  focus() {
    this.#field.focus({ preventScroll: true });
  }

  /** @param {boolean} coming whether there is an answer to be stopped */
  coming(coming) {
    if (coming === this.#coming) return;
    const focused = document.activeElement === this.#stop;
    this.#coming = coming;
    this.#send.hidden = coming;
    this.#stop.hidden = !coming;
    if (focused) this.focus();
  }
}
