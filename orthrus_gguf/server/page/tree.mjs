/**
 * A conversation is a tree of messages: what is edited or answered again stays beside what was there
 * before, and messages that two tabs add never replace each other.
 * @typedef {import("./runs.mjs").Run} Run
 * @typedef {import("./live.mjs").Figures} Figures
 * @typedef {{id: string, conversation: string, parent: string | null, role: "user" | "assistant",
 *   text: string, runs: Run[], thought: string, thoughtRuns: Run[], thoughtSeconds: number | null,
 *   state: "streaming" | "done" | "stopped" | "cut" | "failed", error: string,
 *   figures: Figures | null, created: number, updated: number}} Message
 * @typedef {{id: string, title: string, created: number, updated: number, leaf: string | null}}
 *   Conversation
 */

/** Seconds without news after which an answer that another tab was receiving has ended with it. */
const SILENT = 8;

/** @returns {string} */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {Pick<Message, "conversation" | "parent" | "role"> & Partial<Message>} given
 * @returns {Message}
 */
export function newMessage(given) {
  const now = Date.now();
  return {
    id: newId(),
    text: "",
    runs: [],
    thought: "",
    thoughtRuns: [],
    thoughtSeconds: null,
    state: "done",
    error: "",
    figures: null,
    created: now,
    updated: now,
    ...given,
  };
}

/**
 * Messages from the first to `leaf`.
 * @param {Map<string, Message>} messages
 * @param {string | null} leaf
 */
export function path(messages, leaf) {
  /** @type {Message[]} */
  const found = [];
  for (let at = leaf && messages.get(leaf); at; at = at.parent && messages.get(at.parent)) {
    found.unshift(at);
    if (found.length > messages.size) break; // an imported file may hold a circle
  }
  return found;
}

/**
 * Messages that answer the same one, in their order.
 * @param {Map<string, Message>} messages
 * @param {Message} message
 */
export function siblings(messages, message) {
  const found = [...messages.values()].filter((other) => other.parent === message.parent);
  return found.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/**
 * The newest end of what follows a message.
 * @param {Map<string, Message>} messages
 * @param {string} id
 * @returns {string}
 */
export function newestLeaf(messages, id) {
  const children = [...messages.values()].filter((message) => message.parent === id);
  if (!children.length) return id;
  const newest = children.reduce((a, b) => (b.created > a.created ? b : a));
  return newestLeaf(messages, newest.id);
}

/**
 * Whether an answer is still coming: here (`mine`), or as far as its news tell in another tab.
 * @param {Message} message
 * @param {boolean} mine
 * @param {number} now
 */
export function isComing(message, mine, now) {
  return message.state === "streaming" && (mine || now - message.updated < SILENT * 1000);
}

/**
 * The name of a conversation that begins with `text`.
 * @param {string} text
 */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const letters = [...line];
  return letters.length > 60 ? `${letters.slice(0, 59).join("").trimEnd()}…` : line || "New chat";
}
