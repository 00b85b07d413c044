/**
 * Conversations in this browser's database, shared by its tabs.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./tree.mjs").Conversation} Conversation
 * @typedef {{conversation?: Conversation, messages?: Message[], deleted?: string}} News
 */

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @returns {Promise<IDBDatabase>} */
function open() {
  const request = indexedDB.open("orthrus", 1);
  request.onupgradeneeded = () => {
    const database = request.result;
    database.createObjectStore("conversations", { keyPath: "id" });
    const messages = database.createObjectStore("messages", { keyPath: "id" });
    messages.createIndex("conversation", "conversation");
  };
  return settled(request);
}

/** Reads, writes, and hears of what other tabs write. */
export class Store {
  #database;
  #channel = new BroadcastChannel("orthrus");

  /** @param {IDBDatabase} database */
  constructor(database) {
    this.#database = database;
  }

  /** Rejects where the browser keeps nothing (private windows of some). */
  static async open() {
    return new Store(await open());
  }

  /** @param {(news: News) => void} listener */
  listen(listener) {
    this.#channel.onmessage = (event) => listener(event.data);
  }

  /** @returns {Promise<Conversation[]>} */
  conversations() {
    const store = this.#database.transaction("conversations").objectStore("conversations");
    return settled(store.getAll());
  }

  /**
   * @param {string} conversation
   * @returns {Promise<Message[]>}
   */
  messages(conversation) {
    const store = this.#database.transaction("messages").objectStore("messages");
    return settled(store.index("conversation").getAll(conversation));
  }

  /**
   * @param {Conversation | null} conversation
   * @param {Message[]} messages
   */
  async save(conversation, messages = []) {
    const transaction = this.#database.transaction(["conversations", "messages"], "readwrite");
    if (conversation) transaction.objectStore("conversations").put(conversation);
    for (const message of messages) transaction.objectStore("messages").put(message);
    this.#channel.postMessage({ conversation: conversation ?? undefined, messages });
    await done(transaction);
  }

  /** @param {string} id */
  async remove(id) {
    const messages = await this.messages(id);
    const transaction = this.#database.transaction(["conversations", "messages"], "readwrite");
    transaction.objectStore("conversations").delete(id);
    for (const message of messages) transaction.objectStore("messages").delete(message.id);
    this.#channel.postMessage({ deleted: id });
    await done(transaction);
  }
}

/** @param {IDBTransaction} transaction */
function done(transaction) {
  transaction.commit(); // now: a page that is being left has no later
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(undefined);
    transaction.onabort = () => reject(transaction.error);
  });
}
