import assert from "node:assert/strict";
import { test } from "node:test";
import { fromFile, toFile } from "../../../orthrus_gguf/server/page/files.mjs";
import { chatBody, DEFAULTS, errorText } from "../../../orthrus_gguf/server/page/request.mjs";
import {
  isComing,
  newestLeaf,
  newMessage,
  path,
  siblings,
  titleOf,
} from "../../../orthrus_gguf/server/page/tree.mjs";

/** A question, two answers to it, and what followed the first of them. */
function conversation() {
  const make = (id, parent, role, created) =>
    newMessage({ conversation: "c", id, parent, role, text: `text of ${id}`, created });
  const messages = [
    make("ask", null, "user", 1),
    make("one", "ask", "assistant", 2),
    make("two", "ask", "assistant", 4),
    make("more", "one", "user", 3),
  ];
  messages[1].runs = [[3, "drafted"]];
  return new Map(messages.map((message) => [message.id, message]));
}
const ids = (messages) => messages.map((message) => message.id);

test("a conversation is the path to its leaf", () => {
  const messages = conversation();
  assert.deepEqual(ids(path(messages, "more")), ["ask", "one", "more"]);
  assert.deepEqual(ids(path(messages, "two")), ["ask", "two"]);
  assert.deepEqual(path(messages, null), []);
  assert.deepEqual(path(messages, "gone"), []);
  assert.deepEqual(ids(siblings(messages, messages.get("two"))), ["one", "two"]);
  assert.deepEqual([newestLeaf(messages, "one"), newestLeaf(messages, "ask")], ["more", "two"]);
});

test("an answer that nobody receives any more is not coming", () => {
  const message = newMessage({ conversation: "c", parent: null, role: "assistant", state: "streaming" });
  const { updated } = message;
  assert.ok(isComing(message, false, updated + 2000));
  assert.ok(!isComing(message, false, updated + 20_000));
  assert.ok(isComing(message, true, updated + 20_000));
  assert.ok(!isComing({ ...message, state: "done" }, true, updated));
});

test("titles are short", () => {
  assert.equal(titleOf("  What is  this?\nMore"), "What is this?");
  assert.equal(titleOf("😀".repeat(99)), `${"😀".repeat(59)}…`);
  assert.equal(titleOf(" "), "New chat");
});

test("settings that are empty stay the server's", () => {
  const messages = path(conversation(), "more");
  const plain = chatBody(messages, DEFAULTS);
  const said = messages.map(({ role, text }) => ({ role, content: text }));
  const always = { stream: true, return_origins: true, return_progress: true };
  assert.deepEqual(plain, { messages: said, ...always });
  const some = { ...DEFAULTS, system: "Be brief.", temperature: "0", seed: "7", budget: "0" };
  assert.deepEqual(chatBody(messages, { ...some, strategy: "ar", thinking: "off" }), {
    messages: [{ role: "system", content: "Be brief." }, ...said],
    ...always,
    temperature: 0,
    seed: 7,
    enable_thinking: false,
    reasoning_budget_tokens: 0,
    speculative: { enabled: false },
  });
  const fused = chatBody(messages, { ...DEFAULTS, strategy: "fused" });
  assert.deepEqual(fused.speculative, { strategy: "fused" });
});

test("errors are told in the server's words where it has some", () => {
  assert.equal(errorText(400, '{"error": {"message": "seed: no"}}'), "seed: no");
  assert.equal(errorText(502, "<html>"), "The server answered with status 502.");
  assert.match(errorText(401, "{}"), /API key/);
});

test("conversations come back from a file, under other names", () => {
  const messages = conversation();
  const given = { id: "c", title: "Title", leaf: "more", created: 1, updated: 1 };
  const text = toFile([{ conversation: given, messages: [...messages.values()] }]);
  const [found] = fromFile(text);
  const names = new Map(found.messages.map((message) => [message.text, message]));
  assert.equal(found.conversation.title, "Title");
  assert.notEqual(found.conversation.id, "c");
  const all = new Map(found.messages.map((message) => [message.id, message]));
  const texts = path(all, found.conversation.leaf).map((message) => message.text);
  assert.deepEqual(texts, ["text of ask", "text of one", "text of more"]);
  assert.deepEqual(names.get("text of one").runs, [[3, "drafted"]]);
  assert.equal(siblings(all, names.get("text of two")).length, 2);
});

test("a file that holds something else is refused, or read as far as it makes sense", () => {
  assert.throws(() => fromFile("{"), /no JSON/);
  assert.throws(() => fromFile('{"format": "other"}'), /no conversations/);
  const message = { id: "a", parent: "a", role: "user", text: "t", runs: [["x", "y"], [2, "drafted"]] };
  const strange = [{ conversation: null, messages: [{ role: "evil" }, 3, message] }, null];
  const data = { format: "orthrus-conversations", version: 1, conversations: strange };
  const [first, second] = fromFile(JSON.stringify(data));
  assert.deepEqual(ids(path(new Map([[first.messages[0].id, first.messages[0]]]), first.conversation.leaf)), [
    first.messages[0].id,
  ]);
  assert.deepEqual(first.messages[0].runs, [[2, "drafted"]]);
  assert.equal(first.messages[0].parent, null);
  assert.deepEqual([second.messages, second.conversation.leaf], [[], null]);
});
