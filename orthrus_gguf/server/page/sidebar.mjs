/**
 * The list of conversations. On a phone it lies over the page.
 * @typedef {import("./tree.mjs").Conversation} Conversation
 */
import { byId, iconButton, make } from "./dom.mjs";

/** Shows the list. */
export class Sidebar {
  #list = byId("conversations");
  #aside = byId("sidebar");
  #opener = byId("open-sidebar");

  /**
   * @param {{select: (id: string) => void, remove: (conversation: Conversation) => void}} actions
   */
  constructor(actions) {
    this.actions = actions;
    this.#opener.addEventListener("click", () => this.open(true));
    byId("close-sidebar").addEventListener("click", () => this.open(false));
    byId("shade").addEventListener("click", () => this.open(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isOpen) this.open(false);
    });
  }

  get isOpen() {
    return this.#aside.classList.contains("open");
  }

  /** @param {boolean} open */
  open(open) {
    if (open === this.isOpen) return;
    this.#aside.classList.toggle("open", open);
    byId("shade").hidden = !open;
    this.#opener.setAttribute("aria-expanded", String(open));
    (open ? byId("close-sidebar") : this.#opener).focus();
  }

  /**
   * @param {Conversation[]} conversations
   * @param {string | null} current
   */
  show(conversations, current) {
    const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset.id;
    const items = sorted.map((conversation) => this.#item(conversation, current));
    this.#list.replaceChildren(...items);
    if (focused) this.#list.querySelector(`[data-id="${focused}"]`)?.focus();
  }

  /**
   * @param {Conversation} conversation
   * @param {string | null} current
   */
  #item(conversation, current) {
    const { id, title } = conversation;
    const select = () => {
      this.open(false);
      this.actions.select(id);
    };
    const here = { "data-id": id, "aria-current": id === current ? "page" : null };
    const name = make("button", { type: "button", class: "row", ...here, onclick: select }, title);
    const remove = () => this.actions.remove(conversation);
    return make("li", {}, name, iconButton("bin", `Delete ${title}`, remove));
  }
}
