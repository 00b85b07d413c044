/**
 * The settings, kept in this browser, and the dialog that changes them.
 * @typedef {import("./request.mjs").Settings} Settings
 */
import { byId } from "./dom.mjs";
import { DEFAULTS } from "./request.mjs";

const KEPT = "orthrus-settings";

/** @returns {Settings} */
export function readSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    const known = Object.entries(DEFAULTS).map(([name, value]) =>
      typeof kept[name] === typeof value ? [name, kept[name]] : [name, value],
    );
    return Object.fromEntries(known);
  } catch {
    return { ...DEFAULTS }; // the browser keeps nothing, or something else
  }
}

/** @param {Settings} settings */
export function keepSettings(settings) {
  try {
    localStorage.setItem(KEPT, JSON.stringify(settings));
  } catch {
    // They hold until the tab is closed; `Store.open` has said that nothing is kept.
  }
}

/** @param {Settings} settings */
export function applyLook(settings) {
  const root = document.documentElement;
  if (settings.theme) root.dataset.theme = settings.theme;
  else delete root.dataset.theme;
  root.classList.toggle("drafts", settings.drafts);
  byId("drafts").setAttribute("aria-pressed", String(settings.drafts));
}

/** The dialog. */
export class SettingsDialog {
  #dialog = byId("settings");
  /** @type {HTMLFormElement} */
  #form = byId("settings-form");

  /**
   * @param {Settings} settings is changed in place
   * @param {() => void} changed
   */
  constructor(settings, changed) {
    this.settings = settings;
    this.#form.addEventListener("input", () => {
      for (const [name, field] of this.#fields()) {
        if (field.checkValidity()) Object.assign(settings, { [name]: field.value });
      }
      keepSettings(settings);
      changed();
    });
    this.#dialog.addEventListener("click", (/** @type {MouseEvent} */ event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
  }

  /** @returns {[string, HTMLInputElement][]} */
  #fields() {
    const elements = /** @type {HTMLInputElement[]} */ ([...this.#form.elements]);
    return elements.filter((field) => field.name).map((field) => [field.name, field]);
  }

  /** @param {string} [focus] name of the field to begin with */
  open(focus) {
    const values = /** @type {Record<string, unknown>} */ (this.settings);
    for (const [name, field] of this.#fields()) field.value = String(values[name] ?? "");
    this.#dialog.showModal();
    if (focus) this.#fields().find(([name]) => name === focus)?.[1].focus();
  }

  /**
   * Show what the server was started with.
   * @param {any} props
   */
  tell(props) {
    const params = props.default_generation_settings.params;
    for (const [name, field] of this.#fields()) {
      const value = params[name];
      if (field.type === "number" && typeof value === "number" && value >= 0) {
        field.placeholder = String(Math.round(value * 1000) / 1000);
      }
    }
    byId("thinking-fields").hidden = !props.thinking_switch;
  }
}
