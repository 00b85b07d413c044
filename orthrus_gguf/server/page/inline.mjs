/**
 * Markdown within a paragraph. Leaves are ranges of the source, so that whoever shows them knows
 * which tokens they came from.
 * @typedef {{from: number, to: number}} Range
 * @typedef {{type: "text", from: number, to: number} | {type: "code", from: number, to: number} |
 *   {type: "break"} | {type: "strong" | "em" | "del", children: Inline[]} |
 *   {type: "link", href: string, children: Inline[]}} Inline
 */

/** @type {[string, "strong" | "em" | "del"][]} */
const MARKS = [
  ["***", "strong"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

/** How deep marks may stand in each other. */
const DEPTH = 12;

const SPECIAL = /[\\`*_~[!h]/g;
const WORD = /[\p{L}\p{N}]/u;

/**
 * The parts of some lines.
 * @param {string} source
 * @param {Range[]} lines
 * @returns {Inline[]}
 */
export function inline(source, lines) {
  const text = lines.map((line) => source.slice(line.from, line.to)).join("\n");
  const reader = new Reader(text, lines);
  return reader.read(0, text.length, DEPTH);
}

class Reader {
  /** @type {number[]} */
  #starts = [];

  /**
   * @param {string} text the lines, joined
   * @param {Range[]} lines
   */
  constructor(text, lines) {
    this.text = text;
    this.lines = lines;
    let at = 0;
    for (const line of lines) {
      this.#starts.push(at);
      at += line.to - line.from + 1;
    }
  }

  /**
   * @param {number} from
   * @param {number} to
   * @param {number} depth
   * @returns {Inline[]}
   */
  read(from, to, depth) {
    /** @type {Inline[]} */
    const found = [];
    /** @type {Set<string>} marks that nothing closes from here on */
    const open = new Set();
    let plain = from;
    let at = from;
    while (at < to) {
      SPECIAL.lastIndex = at;
      const next = SPECIAL.exec(this.text);
      if (!next || next.index >= to) break;
      at = next.index;
      const escaped = this.text[at] === "\\" && /[!-/:-@[-`{-~]/.test(this.text[at + 1] ?? "");
      if (escaped && at + 1 < to) {
        this.#leaves(found, "text", plain, at);
        plain = at + 1;
        at += 2;
        continue;
      }
      const part = this.#code(at, to, open) ?? this.#link(at, to, depth, open);
      const whole = part ?? (depth > 0 ? this.#marked(at, to, depth, open) : null);
      if (!whole) {
        at += 1;
        continue;
      }
      this.#leaves(found, "text", plain, at);
      found.push(...whole.parts);
      plain = at = whole.end;
    }
    this.#leaves(found, "text", plain, to);
    return found;
  }

  /**
   * Leaves for a range of the joined text, line by line.
   * @param {Inline[]} found
   * @param {"text" | "code"} type
   * @param {number} from
   * @param {number} to
   */
  #leaves(found, type, from, to) {
    let row = this.#row(from);
    while (from < to) {
      const start = this.#starts[row];
      const line = this.lines[row];
      const end = Math.min(to, start + line.to - line.from);
      const shift = line.from - start;
      if (from < end) found.push({ type, from: from + shift, to: end + shift });
      if (end < to) found.push({ type: "break" });
      from = end + 1;
      row += 1;
    }
  }

  /** @param {number} at */
  #row(at) {
    let low = 0;
    let high = this.#starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.#starts[middle] <= at) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /**
   * @param {number} at
   * @param {number} to
   * @param {Set<string>} open
   */
  #code(at, to, open) {
    if (this.text[at] !== "`") return null;
    const mark = /** @type {RegExpMatchArray} */ (/^`+/.exec(this.text.slice(at, at + 32)))[0];
    if (open.has(mark)) return null;
    let end = this.text.indexOf(mark, at + mark.length);
    while (end >= 0 && this.text[end + mark.length] === "`") {
      while (this.text[end] === "`") end += 1;
      end = this.text.indexOf(mark, end);
    }
    if (end < 0 || end + mark.length > to) {
      open.add(mark);
      return null;
    }
    /** @type {Inline[]} */
    const parts = [];
    let [from, until] = [at + mark.length, end];
    const spaced = this.text[from] === " " && this.text[until - 1] === " ";
    if (spaced && until - from > 2) [from, until] = [from + 1, until - 1];
    this.#leaves(parts, "code", from, until);
    return { parts, end: end + mark.length };
  }

  /**
   * `[text](url)`, `![text](url)` (nothing is loaded from elsewhere), and bare addresses.
   * @param {number} at
   * @param {number} to
   * @param {number} depth
   * @param {Set<string>} open
   */
  #link(at, to, depth, open) {
    if (this.text[at] === "h") {
      const bare = /^https?:\/\/[^\s<>"'`*]+[^\s<>"'`*.,;:!?)\]}]/.exec(this.text.slice(at, to));
      if (!bare || WORD.test(this.text[at - 1] ?? "")) return null;
      /** @type {Inline[]} */
      const children = [];
      this.#leaves(children, "text", at, at + bare[0].length);
      return { parts: [this.#linked(bare[0], children)], end: at + bare[0].length };
    }
    const start = this.text.startsWith("![", at) ? at + 2 : this.text[at] === "[" ? at + 1 : 0;
    if (!start || depth <= 0 || open.has("](")) return null;
    const middle = this.text.indexOf("](", start);
    if (middle < 0 || middle >= to) {
      open.add("](");
      return null;
    }
    const target = /^\(\s*<?([^\s<>)]+)>?(?:\s+"[^"\n]*")?\s*\)/.exec(
      this.text.slice(middle + 1, Math.min(to, middle + 2048)),
    );
    if (!target || this.text.slice(start, middle).includes("[")) return null;
    const children = this.read(start, middle, 1);
    return { parts: [this.#linked(target[1], children)], end: middle + 1 + target[0].length };
  }

  /**
   * Only addresses that a click may safely follow are links.
   * @param {string} href
   * @param {Inline[]} children
   * @returns {Inline}
   */
  #linked(href, children) {
    const safe = /^(https?:\/\/|mailto:)/i.test(href);
    return safe ? { type: "link", href, children } : { type: "em", children };
  }

  /**
   * @param {number} at
   * @param {number} to
   * @param {number} depth
   * @param {Set<string>} open
   */
  #marked(at, to, depth, open) {
    for (const [mark, type] of MARKS) {
      if (!this.text.startsWith(mark, at) || open.has(mark)) continue;
      const start = at + mark.length;
      if (/\s/.test(this.text[start] ?? " ") || this.text[start] === mark[0]) continue;
      if (mark[0] === "_" && WORD.test(this.text[at - 1] ?? "")) continue;
      const end = this.#closing(mark, start + 1, to);
      if (end < 0) {
        open.add(mark);
        continue;
      }
      const children = this.read(start, end, depth - 1);
      /** @type {Inline[]} */
      const parts = [{ type, children: mark.length < 3 ? children : [{ type: "em", children }] }];
      return { parts, end: end + mark.length };
    }
    return null;
  }

  /**
   * @param {string} mark
   * @param {number} from
   * @param {number} to
   */
  #closing(mark, from, to) {
    for (let at = this.text.indexOf(mark, from); at >= 0; at = this.text.indexOf(mark, at)) {
      let after = at;
      while (this.text[after] === mark[0]) after += 1;
      const length = after - at;
      const fits = mark.length === 1 ? length !== 2 : length >= mark.length;
      const end = after - mark.length;
      if (end + mark.length > to) return -1;
      const inWord = mark[0] === "_" && WORD.test(this.text[after] ?? "");
      if (fits && !inWord && !/\s/.test(this.text[at - 1])) return end;
      at = after;
    }
    return -1;
  }
}
