/**
 * Conversations as files.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./tree.mjs").Conversation} Conversation
 * @typedef {{conversation: Conversation, messages: Message[]}} Whole
 */
import { newId, newMessage, titleOf } from "./tree.mjs";

const FORMAT = "orthrus-conversations";

/** @param {Whole[]} conversations */
export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/**
 * What a file holds, under new names, so that nothing is replaced. Throws an Error that says what is
 * wrong with it.
 * @param {string} text
 * @returns {Whole[]}
 */
export function fromFile(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is no JSON.");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) {
    throw new Error("This file holds no conversations of this page.");
  }
  return data.conversations.map(renamed);
}

/**
 * Nothing is taken over unseen: fields that are missing or of another type are as in a new message.
 * @param {any} given
 * @returns {Whole}
 */
function renamed(given) {
  const id = newId();
  /** @type {Map<string, string>} */
  const names = new Map();
  /** @type {Message[]} */
  const messages = [];
  for (const old of Array.isArray(given?.messages) ? given.messages : []) {
    if (!["user", "assistant"].includes(old?.role) || typeof old.text !== "string") continue;
    // A parent comes before its children, so there are no circles.
    const parent = names.get(old.parent) ?? null;
    const message = newMessage({ conversation: id, parent, role: old.role, text: old.text });
    message.runs = runsOf(old.runs);
    message.thought = typeof old.thought === "string" ? old.thought : "";
    message.thoughtRuns = runsOf(old.thoughtRuns);
    message.created = message.updated = Number(old.created) || messages.length;
    names.set(old.id, message.id);
    messages.push(message);
  }
  const title = titleOf(typeof given?.conversation?.title === "string" ? given.conversation.title : "");
  const leaf = names.get(given?.conversation?.leaf) ?? messages[messages.length - 1]?.id ?? null;
  const now = Date.now();
  return { conversation: { id, title, leaf, created: now, updated: now }, messages };
}

/**
 * @param {any} given
 * @returns {import("./runs.mjs").Run[]}
 */
function runsOf(given) {
  const known = ["plain", "drafted", "corrected"];
  if (!Array.isArray(given)) return [];
  const runs = given.filter((run) => Array.isArray(run) && run[0] > 0 && known.includes(run[1]));
  return runs.map((run) => [Math.floor(run[0]), run[1]]);
}

/**
 * Let the browser keep a file.
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
