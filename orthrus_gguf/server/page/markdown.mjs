/**
 * Markdown as models write it: paragraphs, headings, lists, quotes, tables, code. The result is made
 * of ranges of the source (see `inline.mjs`).
 * @typedef {import("./inline.mjs").Inline} Inline
 * @typedef {import("./inline.mjs").Range} Range
 * @typedef {{type: "paragraph", from: number, to: number, parts: Inline[]} |
 *   {type: "heading", from: number, to: number, level: number, parts: Inline[]} |
 *   {type: "code", from: number, to: number, language: string, lines: Range[]} |
 *   {type: "quote", from: number, to: number, blocks: Block[]} |
 *   {type: "list", from: number, to: number, start: number | null, items: Block[][]} |
 *   {type: "table", from: number, to: number, align: string[], head: Inline[][],
 *    rows: Inline[][][]} |
 *   {type: "rule", from: number, to: number}} Block
 */
import { inline } from "./inline.mjs";

const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** How deep quotes and lists may stand in each other. */
const DEPTH = 12;

/**
 * @param {string} source
 * @returns {Block[]}
 */
export function parse(source) {
  /** @type {Range[]} */
  const lines = [];
  for (let from = 0; from <= source.length; ) {
    const end = source.indexOf("\n", from);
    const to = end < 0 ? source.length : end;
    lines.push({ from, to: source[to - 1] === "\r" ? Math.max(from, to - 1) : to });
    from = to + 1;
  }
  return new Blocks(source, DEPTH).read(lines);
}

class Blocks {
  /**
   * @param {string} source
   * @param {number} depth
   */
  constructor(source, depth) {
    this.source = source;
    this.depth = depth;
  }

  /** @param {Range} line */
  #text(line) {
    return this.source.slice(line.from, line.to);
  }

  /**
   * @param {Range[]} lines
   * @returns {Block[]}
   */
  read(lines) {
    /** @type {Block[]} */
    const found = [];
    for (let at = 0; at < lines.length; ) {
      if (!this.#text(lines[at]).trim()) {
        at += 1;
        continue;
      }
      const [block, next] = this.#block(lines, at);
      found.push(block);
      at = next;
    }
    return found;
  }

  /**
   * The block that begins at a line, and the line behind it.
   * @param {Range[]} lines
   * @param {number} at
   * @returns {[Block, number]}
   */
  #block(lines, at) {
    const text = this.#text(lines[at]);
    const fence = FENCE.exec(text);
    if (fence) return this.#code(lines, at, fence[1], fence[2]);
    const heading = HEADING.exec(text);
    if (heading) return [this.#heading(lines[at], heading), at + 1];
    if (RULE.test(text)) return [{ type: "rule", ...lines[at] }, at + 1];
    if (this.depth > 0 && QUOTE.test(text)) return this.#quote(lines, at);
    if (this.depth > 0 && ITEM.test(text)) return this.#list(lines, at);
    if (this.#isTable(lines, at)) return this.#table(lines, at);
    let end = at + 1;
    while (end < lines.length && !this.#interrupts(lines, end)) end += 1;
    const parts = inline(this.source, lines.slice(at, end).map((line) => this.#trimmed(line)));
    return [{ type: "paragraph", ...this.#span(lines, at, end), parts }, end];
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   */
  #interrupts(lines, at) {
    const text = this.#text(lines[at]);
    const starts = [HEADING, FENCE, RULE, QUOTE].some((pattern) => pattern.test(text));
    return !text.trim() || starts || ITEM.test(text) || this.#isTable(lines, at);
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   * @param {number} end
   */
  #span(lines, at, end) {
    return { from: lines[at].from, to: lines[end - 1].to };
  }

  /** @param {Range} line */
  #trimmed(line) {
    const text = this.#text(line);
    const from = line.from + text.length - text.trimStart().length;
    return { from, to: Math.max(from, line.to - (text.length - text.trimEnd().length)) };
  }

  /**
   * @param {Range} line
   * @param {RegExpExecArray} match
   * @returns {Block}
   */
  #heading(line, match) {
    const rest = this.#trimmed({ from: line.from + match[0].length, to: line.to });
    const closing = /(?:^|\s)#+$/.exec(this.#text(rest));
    if (closing) rest.to -= closing[0].length;
    return { type: "heading", ...line, level: match[1].length, parts: inline(this.source, [rest]) };
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   * @param {string} fence
   * @param {string} language
   * @returns {[Block, number]}
   */
  #code(lines, at, fence, language) {
    let end = at + 1;
    const closes = (/** @type {string} */ text) => {
      const line = text.trim();
      return line.length >= fence.length && line === fence[0].repeat(line.length);
    };
    while (end < lines.length && !closes(this.#text(lines[end]))) end += 1;
    const next = Math.min(end + 1, lines.length);
    const inner = lines.slice(at + 1, end);
    return [{ type: "code", ...this.#span(lines, at, next), language, lines: inner }, next];
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   * @returns {[Block, number]}
   */
  #quote(lines, at) {
    let end = at;
    const inner = [];
    for (; end < lines.length; end += 1) {
      const mark = QUOTE.exec(this.#text(lines[end]));
      if (!mark) break;
      inner.push({ from: lines[end].from + mark[0].length, to: lines[end].to });
    }
    const blocks = new Blocks(this.source, this.depth - 1).read(inner);
    return [{ type: "quote", ...this.#span(lines, at, end), blocks }, end];
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   * @returns {[Block, number]}
   */
  #list(lines, at) {
    const first = /** @type {RegExpExecArray} */ (ITEM.exec(this.#text(lines[at])));
    const kind = first[2].slice(-1);
    /** @type {Block[][]} */
    const items = [];
    let end = at;
    for (;;) {
      const mark = end < lines.length ? ITEM.exec(this.#text(lines[end])) : null;
      if (!mark || mark[2].slice(-1) !== kind || RULE.test(this.#text(lines[end]))) break;
      const [inner, next] = this.#item(lines, end, mark);
      items.push(new Blocks(this.source, this.depth - 1).read(inner));
      end = next;
      let after = end;
      while (after < lines.length && !this.#text(lines[after]).trim()) after += 1;
      if (after < lines.length && ITEM.test(this.#text(lines[after]))) end = after;
    }
    const start = /\d/.test(first[2]) ? parseInt(first[2], 10) : null;
    return [{ type: "list", ...this.#span(lines, at, end), start, items }, end];
  }

  /**
   * The lines of an item, without what marks it and stands before them.
   * @param {Range[]} lines
   * @param {number} at
   * @param {RegExpExecArray} mark
   * @returns {[Range[], number]}
   */
  #item(lines, at, mark) {
    const spaces = mark[3].length > 4 || !mark[3] ? 1 : mark[3].length;
    const indent = mark[1].length + mark[2].length + spaces;
    const inner = [{ from: Math.min(lines[at].from + indent, lines[at].to), to: lines[at].to }];
    let end = at + 1;
    for (; end < lines.length; end += 1) {
      const text = this.#text(lines[end]);
      const depth = text.length - text.trimStart().length;
      const blank = !text.trim();
      const afterBlank = !this.#text(lines[end - 1]).trim();
      // Some indent by two, whatever the mark: what is deeper than the mark belongs to the item.
      const inside = depth >= Math.min(indent, mark[1].length + 2);
      if (!blank && !inside && (afterBlank || this.#interrupts(lines, end))) break;
      const cut = Math.min(inside ? Math.min(depth, indent) : 0, text.length);
      inner.push({ from: lines[end].from + cut, to: lines[end].to });
    }
    while (inner.length > 1 && !this.#text(inner[inner.length - 1]).trim()) {
      inner.pop();
      end -= 1;
    }
    return [inner, end];
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   */
  #isTable(lines, at) {
    if (at + 1 >= lines.length || !this.#text(lines[at]).includes("|")) return false;
    const divider = this.#text(lines[at + 1]);
    if (!divider.includes("-") || !DIVIDER.test(divider)) return false;
    return this.#cells(lines[at]).length === this.#cells(lines[at + 1]).length;
  }

  /** @param {Range} line */
  #cells(line) {
    const whole = this.#trimmed(line);
    let from = this.source[whole.from] === "|" ? whole.from + 1 : whole.from;
    const cells = [];
    for (let at = from; at <= whole.to; at += 1) {
      const escaped = this.source[at - 1] === "\\";
      if (at < whole.to && (this.source[at] !== "|" || escaped)) continue;
      if (at === whole.to && from === at && cells.length) break;
      cells.push(this.#trimmed({ from, to: at }));
      from = at + 1;
    }
    return cells;
  }

  /**
   * @param {Range[]} lines
   * @param {number} at
   * @returns {[Block, number]}
   */
  #table(lines, at) {
    const align = this.#cells(lines[at + 1]).map((cell) => {
      const text = this.#text(cell);
      const [left, right] = [text.startsWith(":"), text.endsWith(":")];
      return right ? (left ? "center" : "right") : "";
    });
    const row = (/** @type {Range} */ line) =>
      this.#cells(line)
        .slice(0, align.length)
        .map((cell) => inline(this.source, [cell]));
    const rows = [];
    let end = at + 2;
    for (; end < lines.length && this.#text(lines[end]).includes("|"); end += 1) {
      rows.push(row(lines[end]));
    }
    const span = this.#span(lines, at, end);
    return [{ type: "table", ...span, align, head: row(lines[at]), rows }, end];
  }
}
