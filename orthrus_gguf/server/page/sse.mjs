/** Server-sent events, as they come over the wire in pieces. */
export class EventParser {
  #rest = "";
  /** @type {string[]} */
  #data = [];

  /**
   * The data of every event that is complete now.
   * @param {string} text
   * @returns {string[]}
   */
  push(text) {
    const found = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = /** @type {string} */ (lines.pop());
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) found.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // Comments (pings) and other fields say nothing here.
    }
    return found;
  }
}
