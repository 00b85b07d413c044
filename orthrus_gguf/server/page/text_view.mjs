/**
 * Markdown and runs as elements. Every block stays as it is until its text changes, so that an
 * answer of many thousand tokens costs no more to go on with than a short one.
 * @typedef {import("./markdown.mjs").Block} Block
 * @typedef {import("./inline.mjs").Inline} Inline
 * @typedef {import("./runs.mjs").Run} Run
 */
import { iconButton, make } from "./dom.mjs";
import { parse } from "./markdown.mjs";
import { Cutter } from "./runs.mjs";

/** Shows one text, which grows. */
export class TextView {
  /** @type {string[]} */
  #shown = [];

  /** @param {HTMLElement} element that holds it, and nothing else */
  constructor(element) {
    this.element = element;
  }

  /**
   * @param {string} text
   * @param {Run[]} runs
   */
  show(text, runs) {
    const blocks = parse(text);
    const builder = new Builder(text, runs);
    blocks.forEach((block, index) => {
      const key = `${block.type} ${block.from} ${text.slice(block.from, block.to)}`;
      if (this.#shown[index] === key) return;
      this.#shown[index] = key;
      const built = builder.block(block);
      const old = this.element.children[index];
      if (old) old.replaceWith(built);
      else this.element.append(built);
    });
    this.#shown.length = blocks.length;
    while (this.element.children.length > blocks.length) this.element.lastElementChild?.remove();
  }
}

/**
 * A text as it is, with its runs.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {Run[]} runs
 */
export function showPlain(element, text, runs) {
  element.replaceChildren(...new Builder(text, runs).coloured(0, text.length));
}

class Builder {
  #cutter;

  /**
   * @param {string} text
   * @param {Run[]} runs
   */
  constructor(text, runs) {
    this.text = text;
    this.#cutter = new Cutter(runs);
  }

  /**
   * @param {number} from
   * @param {number} to
   */
  coloured(from, to) {
    return this.#cutter.cut(from, to).flatMap((part) => {
      const text = this.text.slice(part.from, part.to);
      if (part.origin === "plain") return [text];
      // The space that most tokens begin with looks better without a colour.
      const shown = text.trimStart();
      const span = make("span", { class: part.origin }, shown);
      return [text.slice(0, text.length - shown.length), ...(shown ? [span] : [])];
    });
  }

  /**
   * @param {Inline[]} parts
   * @returns {(Node | string)[]}
   */
  inline(parts) {
    return parts.flatMap((part) => {
      if (part.type === "text") return this.coloured(part.from, part.to);
      if (part.type === "code") return [make("code", {}, ...this.coloured(part.from, part.to))];
      if (part.type === "break") return [make("br")];
      const children = this.inline(part.children);
      if (part.type !== "link") return [make(part.type, {}, ...children)];
      const where = { href: part.href, target: "_blank", rel: "noopener noreferrer" };
      return [make("a", where, ...children)];
    });
  }

  /**
   * @param {Block[]} blocks
   * @returns {HTMLElement[]}
   */
  blocks(blocks) {
    return blocks.map((block) => this.block(block));
  }

  /**
   * @param {Block} block
   * @returns {HTMLElement}
   */
  block(block) {
    switch (block.type) {
      case "paragraph":
        return make("p", {}, ...this.inline(block.parts));
      case "heading": {
        // The page's own headings are h1 and h2.
        const tag = /** @type {"h3"} */ (`h${Math.min(block.level + 2, 6)}`);
        return make(tag, {}, ...this.inline(block.parts));
      }
      case "rule":
        return make("hr");
      case "quote":
        return make("blockquote", {}, ...this.blocks(block.blocks));
      case "list":
        return this.#list(block);
      case "table":
        return this.#table(block);
      case "code":
        return this.#code(block);
    }
  }

  /** @param {Extract<Block, {type: "list"}>} block */
  #list(block) {
    const items = block.items.map((item) => {
      const [only] = item;
      const tight = item.length >= 1 && only.type === "paragraph";
      const rest = this.blocks(tight ? item.slice(1) : item);
      return make("li", {}, ...(tight ? this.inline(only.parts) : []), ...rest);
    });
    if (block.start === null) return make("ul", {}, ...items);
    return make("ol", { start: block.start === 1 ? null : block.start }, ...items);
  }

  /** @param {Extract<Block, {type: "table"}>} block */
  #table(block) {
    const row = (/** @type {Inline[][]} */ cells, /** @type {"th" | "td"} */ tag) =>
      make(
        "tr",
        {},
        ...cells.map((cell, index) =>
          make(tag, { class: block.align[index] || null }, ...this.inline(cell)),
        ),
      );
    const head = make("thead", {}, row(block.head, "th"));
    const body = make("tbody", {}, ...block.rows.map((cells) => row(cells, "td")));
    const scroll = { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table" };
    return make("div", scroll, make("table", {}, head, body));
  }

  /** @param {Extract<Block, {type: "code"}>} block */
  #code(block) {
    const lines = block.lines.map((line) => this.text.slice(line.from, line.to));
    const shown = block.lines.flatMap((line, index) => [
      ...(index ? ["\n"] : []),
      ...this.coloured(line.from, line.to),
    ]);
    const language = block.language || "text";
    const head = make("div", { class: "code-head" }, make("span", {}, language));
    if (navigator.clipboard) head.append(copyButton("Copy the code", () => lines.join("\n")));
    const scroll = { tabindex: 0, role: "group", "aria-label": `Code, ${language}` };
    return make("div", { class: "code" }, head, make("pre", scroll, make("code", {}, ...shown)));
  }
}

/**
 * @param {string} label
 * @param {() => string} text
 */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await navigator.clipboard.writeText(text());
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1200);
  });
  return button;
}
