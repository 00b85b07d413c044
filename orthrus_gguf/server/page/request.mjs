/**
 * What is sent to the server, and how its errors read.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {{system: string, temperature: string, top_k: string, top_p: string, min_p: string,
 *   repeat_penalty: string, max_tokens: string, seed: string, strategy: string, thinking: string,
 *   budget: string, key: string, theme: string, drafts: boolean}} Settings
 */

/** @type {Settings} */
export const DEFAULTS = {
  system: "",
  temperature: "",
  top_k: "",
  top_p: "",
  min_p: "",
  repeat_penalty: "",
  max_tokens: "",
  seed: "",
  strategy: "",
  thinking: "",
  budget: "",
  key: "",
  theme: "",
  drafts: true,
};

const NUMBERS = /** @type {const} */ ([
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "repeat_penalty",
  "max_tokens",
  "seed",
]);

/**
 * The body of a chat completion that answers these messages. Settings that are empty stay the
 * server's.
 * @param {Message[]} messages
 * @param {Settings} settings
 */
export function chatBody(messages, settings) {
  /** @type {Record<string, unknown>} */
  const body = {
    messages: [
      ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
      ...messages.map((message) => ({ role: message.role, content: message.text })),
    ],
    stream: true,
    return_origins: true,
    return_progress: true,
  };
  for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.thinking) body.enable_thinking = settings.thinking === "on";
  if (settings.budget !== "") body.reasoning_budget_tokens = Number(settings.budget);
  if (settings.strategy) {
    const off = settings.strategy === "ar";
    body.speculative = off ? { enabled: false } : { strategy: settings.strategy };
  }
  return body;
}

/**
 * What went wrong, in words. body: of the answer, which may be no JSON.
 * @param {number} status
 * @param {string} body
 */
export function errorText(status, body) {
  if (status === 401) return "The server wants an API key: enter it in the settings.";
  try {
    const message = JSON.parse(body).error.message;
    if (typeof message === "string") return message;
  } catch {
    // Not ours: a proxy's page, for example.
  }
  return `The server answered with status ${status}.`;
}
