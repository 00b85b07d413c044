import assert from "node:assert/strict";
import { test } from "node:test";
import { parse } from "../../../orthrus_gguf/server/page/markdown.mjs";

/** A block or part with ranges spelt out, as short as can be. */
function told(source, part) {
  if (Array.isArray(part)) return part.map((one) => told(source, one));
  const slice = (range) => source.slice(range.from, range.to);
  switch (part.type) {
    case "text":
      return slice(part);
    case "break":
      return "\n";
    case "code":
      return part.lines ? { code: part.lines.map(slice), language: part.language } : ["code", slice(part)];
    case "link":
      return ["link", part.href, ...told(source, part.children)];
    case "paragraph":
      return { p: told(source, part.parts) };
    case "heading":
      return { [`h${part.level}`]: told(source, part.parts) };
    case "quote":
      return { quote: told(source, part.blocks) };
    case "list":
      return { list: told(source, part.items), start: part.start };
    case "table":
      return { head: told(source, part.head), rows: told(source, part.rows), align: part.align };
    case "rule":
      return "rule";
    default:
      return [part.type, ...told(source, part.children)];
  }
}

const read = (source) => told(source, parse(source));
const inline = (source) => read(source)[0].p;

const INLINE = {
  "a **b** c": ["a ", ["strong", "b"], " c"],
  "*a* _b_ __c__ ~~d~~": [["em", "a"], " ", ["em", "b"], " ", ["strong", "c"], " ", ["del", "d"]],
  "**a *b* c**": [["strong", "a ", ["em", "b"], " c"]],
  "***a*** ***": [["strong", ["em", "a"]], " ***"],
  "snake_case_name 2 * 3 * 4": ["snake_case_name 2 * 3 * 4"],
  "**open and *open": ["**open and *open"],
  "`a*b*` ``c`d`` `open": [["code", "a*b*"], " ", ["code", "c`d"], " `open"],
  "\\*a\\* \\q": ["*a", "* \\q"],
  "a\n b": ["a", "\n", "b"],
  "[t](https://a.example/x) <b>": [["link", "https://a.example/x", "t"], " <b>"],
  "see https://a.example/b.": ["see ", ["link", "https://a.example/b", "https://a.example/b"], "."],
  "[x](javascript:alert) ![i](data:a)": [["em", "x"], " ", ["em", "i"]],
  "[x] and [y": ["[x] and [y"],
};
for (const [source, expected] of Object.entries(INLINE)) {
  test(`parts of ${JSON.stringify(source)}`, () => assert.deepEqual(inline(source), expected));
}

const BLOCKS = {
  "# A #\n### B\n#c": [{ h1: ["A"] }, { h3: ["B"] }, { p: ["#c"] }],
  "a\n\nb\r\nc": [{ p: ["a"] }, { p: ["b", "\n", "c"] }],
  "```py\nx\n\n  y\n```\nz": [{ code: ["x", "", "  y"], language: "py" }, { p: ["z"] }],
  "~~~\n```\n~~~": [{ code: ["```"], language: "" }],
  "a\n```\nopen": [{ p: ["a"] }, { code: ["open"], language: "" }],
  "- a\n- b": [{ list: [[{ p: ["a"] }], [{ p: ["b"] }]], start: null }],
  "3. a\n4. b\n\n5. c": [{ list: [[{ p: ["a"] }], [{ p: ["b"] }], [{ p: ["c"] }]], start: 3 }],
  "1. a\n   - b\n2. c": [
    { list: [[{ p: ["a"] }, { list: [[{ p: ["b"] }]], start: null }], [{ p: ["c"] }]], start: 1 },
  ],
  "- a\n\n  b\n\nc": [{ list: [[{ p: ["a"] }, { p: ["b"] }]], start: null }, { p: ["c"] }],
  "- a\n  ```\n  x\n  ```": [{ list: [[{ p: ["a"] }, { code: ["x"], language: "" }]], start: null }],
  "> a\n> > b": [{ quote: [{ p: ["a"] }, { quote: [{ p: ["b"] }] }] }],
  "---\n***": ["rule", "rule"],
  "| a | b |\n|:-:|--:|\n| `1` | x\\|y |\n": [
    { head: [["a"], ["b"]], rows: [[[["code", "1"]], ["x", "|y"]]], align: ["center", "right"] },
  ],
  "a | b\nc": [{ p: ["a | b", "\n", "c"] }],
  "": [],
};
for (const [source, expected] of Object.entries(BLOCKS)) {
  test(`blocks of ${JSON.stringify(source)}`, () => assert.deepEqual(read(source), expected));
}

test("every beginning of a text can be read, and ranges lie within it", () => {
  const whole = `${Object.keys(BLOCKS).join("\n\n")}\n\n${Object.keys(INLINE).join("\n\n")}`;
  for (let end = 0; end <= whole.length; end += 1) {
    let last = 0;
    for (const block of parse(whole.slice(0, end))) {
      assert.ok(block.from >= last && block.to >= block.from && block.to <= end);
      last = block.to;
    }
  }
});

test("texts that are made to be slow are not", () => {
  const pieces = ["*a ", "**a", "[a", "`", "_a", "> ", "- ", "|a", "[a](", "http", "a`b", "\\", "~~a"];
  const begun = performance.now();
  for (const piece of pieces) parse(piece.repeat(4000));
  assert.ok(performance.now() - begun < 5000);
});
