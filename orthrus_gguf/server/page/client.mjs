import { EventParser } from "./sse.mjs";
import { errorText } from "./request.mjs";

/** What the server, or the way to it, has against a request. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0: it was not reached
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * @param {string} path relative to the page
 * @param {string} key
 * @param {RequestInit} [more]
 */
async function call(path, key, more = {}) {
  /** @type {Record<string, string>} */
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...more, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (!answer.ok) throw new ServerError(errorText(answer.status, await answer.text()), answer.status);
  return answer;
}

/**
 * @param {string} path
 * @param {string} [key]
 */
export async function getJson(path, key = "") {
  return (await call(path, key)).json();
}

/**
 * The events of a chat completion. Ends quietly when `signal` says so.
 * @param {object} body
 * @param {string} key
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* chatEvents(body, key, signal) {
  try {
    const more = { method: "POST", body: JSON.stringify(body), signal };
    const answer = await call("v1/chat/completions", key, more);
    const parser = new EventParser();
    const decoder = new TextDecoder();
    const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      for (const data of parser.push(decoder.decode(value, { stream: !done }))) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, event.error.code ?? 500);
        yield event;
      }
      if (done) throw new ServerError("The connection ended before the answer did.", 0);
    }
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof TypeError) {
      throw new ServerError("The connection broke before the answer was complete.", 0);
    }
    throw error;
  }
}
