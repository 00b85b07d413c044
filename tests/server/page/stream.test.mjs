import assert from "node:assert/strict";
import { test } from "node:test";
import { Answering, progressText } from "../../../orthrus_gguf/server/page/answering.mjs";
import { Live } from "../../../orthrus_gguf/server/page/live.mjs";
import { figuresText } from "../../../orthrus_gguf/server/page/message_view.mjs";
import { cut, Cutter, grow } from "../../../orthrus_gguf/server/page/runs.mjs";
import { EventParser } from "../../../orthrus_gguf/server/page/sse.mjs";
import { newMessage } from "../../../orthrus_gguf/server/page/tree.mjs";

test("events are found wherever the wire cuts them", () => {
  const wire = ': ping\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: b\ndata:c\n\n\ndata: [DONE]\n\n';
  const expected = ['{"a": 1}', "b\nc", "[DONE]"];
  for (let size = 1; size <= wire.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < wire.length; at += size) found.push(...parser.push(wire.slice(at, at + size)));
    assert.deepEqual(found, expected, `in pieces of ${size}`);
  }
  assert.deepEqual(new EventParser().push("data: half"), []);
});

test("runs grow, and are cut", () => {
  const runs = [];
  for (const [length, origin] of [[2, "plain"], [3, "drafted"], [1, "drafted"], [0, "plain"]]) {
    grow(runs, length, origin);
  }
  assert.deepEqual(runs, [[2, "plain"], [4, "drafted"]]);
  const expected = [
    { from: 1, to: 2, origin: "plain" },
    { from: 2, to: 6, origin: "drafted" },
    { from: 6, to: 9, origin: "plain" },
  ];
  assert.deepEqual(cut(runs, 1, 9), expected);
  assert.deepEqual(cut(runs, 4, 4), []);
  assert.deepEqual(cut(runs, 7, 9), [{ from: 7, to: 9, origin: "plain" }]);
});

test("a cutter gives what cut gives, in any order", () => {
  const runs = [[3, "plain"], [1, "drafted"], [5, "corrected"], [2, "drafted"]];
  const cutter = new Cutter(runs);
  for (let from = 0; from <= 13; from += 1) {
    for (let to = from; to <= 13; to += 1) assert.deepEqual(cutter.cut(from, to), cut(runs, from, to));
  }
});

test("figures count as the server does", () => {
  const live = new Live();
  assert.equal(live.figures.tokensPerCycle, null);
  live.push({ origin: "plain", tokens: 1, cycles: 0 }, 1000);
  assert.equal(live.figures.tokensPerCycle, null); // the first token is the prompt's
  live.push({ origin: "drafted", tokens: 2, cycles: 1 }, 1100);
  live.push({ origin: "drafted", tokens: 3, cycles: 1 }, 1100);
  live.push({ origin: "corrected", tokens: 5, cycles: 2 }, 1500);
  live.push({ origin: "corrected", tokens: 5, cycles: 2 }, 9000); // the same again
  assert.deepEqual(live.figures, {
    tokens: 5,
    cycles: 2,
    tokensPerCycle: 2,
    tokensPerSecond: 8,
    origins: { plain: 1, drafted: 2, corrected: 2 },
    prompt: null,
  });
  const timings = { predicted_n: 6, tokens_per_cycle: 2.5, predicted_per_second: 7 };
  assert.deepEqual([live.ended(timings).tokensPerCycle, live.ended(timings).tokens], [2.5, 6]);
});

const chunk = (delta, origin, tokens, finish = null) => ({
  choices: [{ delta, finish_reason: finish, drafting: { origin, tokens, cycles: tokens } }],
});

test("an answer becomes a message with a thought, a text and their origins", () => {
  const message = newMessage({ conversation: "c", parent: null, role: "assistant", state: "streaming" });
  const answering = new Answering(message);
  answering.push({ choices: [{ delta: { role: "assistant", content: "" }, finish_reason: null }] }, 0);
  answering.push(chunk({ reasoning_content: "Hm" }, "plain", 1), 1000);
  answering.push(chunk({ reasoning_content: "m." }, "drafted", 2), 1500);
  answering.push(chunk({ content: "Ja" }, "corrected", 3), 3000);
  answering.push(chunk({ content: "wohl" }, "drafted", 4), 3100);
  assert.equal(message.state, "streaming");
  answering.push({ choices: [{ delta: {}, finish_reason: "length" }], timings: { predicted_n: 5 } }, 4000);
  assert.deepEqual([message.thought, message.text, message.state], ["Hmm.", "Jawohl", "cut"]);
  assert.deepEqual(message.thoughtRuns, [[2, "plain"], [2, "drafted"]]);
  assert.deepEqual(message.runs, [[2, "corrected"], [4, "drafted"]]);
  assert.equal(message.thoughtSeconds, 2);
  assert.equal(message.figures.tokens, 5);
});

test("an answer to a shortened prompt says so, from its first event on", () => {
  const message = newMessage({ conversation: "c", parent: null, role: "assistant", state: "streaming" });
  const answering = new Answering(message);
  const prefill = { lossy: true, kept_tokens: 20, prompt_tokens: 300 };
  answering.push({ choices: [{ delta: { content: "" }, finish_reason: null, prefill }] }, 0);
  answering.push(chunk({ content: "a" }, "plain", 1), 1);
  assert.match(figuresText(message.figures), / · 20 of 300 prompt tokens were read$/);
  answering.push({ choices: [], timings: { predicted_n: 1, prefill } }, 2);
  assert.equal(figuresText(message.figures), "1 token · 20 of 300 prompt tokens were read");
});

test("only a prompt that is being read is told of", () => {
  const event = (processed) => ({ choices: [], prompt_progress: { total: 9, cache: 0, processed } });
  assert.equal(progressText(event(4)), "Reading: 4 of 9 tokens");
  assert.equal(progressText(event(9)), "");
  assert.equal(progressText(chunk({ content: "a" }, "plain", 1)), "");
});
