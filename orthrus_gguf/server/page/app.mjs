/**
 * The page: what is shown, and what happens.
 * @typedef {import("./tree.mjs").Message} Message
 * @typedef {import("./tree.mjs").Conversation} Conversation
 */
import { Answering, progressText } from "./answering.mjs";
import { chatEvents, getJson, ServerError } from "./client.mjs";
import { Composer } from "./composer.mjs";
import { byId } from "./dom.mjs";
import { download, fromFile, toFile } from "./files.mjs";
import { applyLook, keepSettings, readSettings, SettingsDialog } from "./settings.mjs";
import { chatBody } from "./request.mjs";
import { Sidebar } from "./sidebar.mjs";
import { Store } from "./store.mjs";
import { Thread } from "./thread.mjs";
import { newestLeaf, newId, newMessage, path, titleOf } from "./tree.mjs";

/** Milliseconds between two writes of an answer that is coming. */
const SAVE = 1000;

class App {
  settings = readSettings();
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** @type {Map<string, Message>} those of the current conversation */
  messages = new Map();
  /** @type {string | null} */
  current = null;
  /** Answers that come to this tab. @type {Map<string, {abort: AbortController, message: Message}>} */
  coming = new Map();
  /** @type {Store | null} */
  store = null;

  constructor() {
    this.dialog = new SettingsDialog(this.settings, () => applyLook(this.settings));
    this.sidebar = new Sidebar({
      select: (id) => this.select(id),
      remove: (conversation) => this.remove(conversation),
    });
    this.thread = new Thread({
      regenerate: (message) => this.answer(message.conversation, message.parent),
      edit: (message, text) => this.ask(text, message.parent),
      select: (message) => this.turnTo(message),
    });
    this.composer = new Composer({
      send: (text) => this.ask(text, this.conversation?.leaf ?? null),
      stop: () => this.stop(),
      editLast: () => this.thread.editLast(),
    });
    byId("new").addEventListener("click", () => this.begin());
    byId("open-settings").addEventListener("click", () => this.dialog.open());
    byId("drafts").addEventListener("click", () => this.toggleDrafts());
    byId("export").addEventListener("click", () => this.saveFile([this.current]));
    byId("export-all").addEventListener("click", () => this.saveFile([...this.conversations.keys()]));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (/** @type {Event} */ event) => this.load(event));
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("pagehide", () => this.leave());
    // Phones end pages that are out of sight without another word.
    document.addEventListener("visibilitychange", () => document.hidden && this.saveComing());
    addEventListener("hashchange", () => this.select(location.hash.slice(1)));
    // An answer that another tab was receiving may have ended with that tab.
    setInterval(() => this.thread.looksComing && !this.isHere && this.show(), 2000);
    applyLook(this.settings);
  }

  get conversation() {
    return this.current === null ? undefined : this.conversations.get(this.current);
  }

  /** Whether an answer of the current conversation comes to this tab. */
  get isHere() {
    return [...this.coming.values()].some(({ message }) => message.conversation === this.current);
  }

  async start() {
    this.show();
    this.composer.focus();
    try {
      this.store = await Store.open();
      this.store.listen((news) => this.hear(news));
      for (const found of await this.store.conversations()) this.conversations.set(found.id, found);
    } catch (error) {
      console.warn(error);
      this.banner("This browser keeps nothing for this page: conversations end with the tab.");
    }
    await this.select(location.hash.slice(1));
    await this.greet();
  }

  /** Wait for the model, and learn about it. */
  async greet() {
    for (;;) {
      try {
        const { data } = await getJson("v1/models");
        this.model = data[0].id;
        break;
      } catch (error) {
        const loading = error instanceof ServerError && error.status === 503;
        this.banner(loading ? "The model is being loaded …" : "The server cannot be reached.");
        await new Promise((resolve) => setTimeout(resolve, loading ? 500 : 2000));
        this.banner("");
      }
    }
    byId("model").textContent = this.model;
    document.title = `${this.model} – Orthrus`;
    try {
      this.dialog.tell(await getJson("props", this.settings.key));
    } catch {
      // The server does not tell (--no-props), or wants a key: it will say so when asked.
    }
  }

  /** @param {string} text */
  banner(text) {
    byId("banner").hidden = !text;
    byId("banner").textContent = text;
  }

  show() {
    this.sidebar.show([...this.conversations.values()], this.current);
    const messages = path(this.messages, this.conversation?.leaf ?? null);
    this.thread.show(messages, this.messages, (id) => this.coming.has(id));
    this.composer.coming(this.isHere);
    byId("export").disabled = !messages.length;
  }

  /** A new conversation; it is kept from its first message on. */
  begin() {
    this.current = null;
    this.messages = new Map();
    history.replaceState(null, "", location.pathname);
    this.sidebar.open(false);
    this.show();
    this.composer.focus();
  }

  /** @param {string} id */
  async select(id) {
    if (id === this.current || !this.conversations.has(id)) return;
    const found = (await this.store?.messages(id)) ?? [];
    this.current = id;
    this.messages = new Map(found.map((message) => [message.id, message]));
    for (const { message } of this.coming.values()) {
      if (message.conversation === id) this.messages.set(message.id, message);
    }
    history.replaceState(null, "", `#${id}`);
    this.show();
    this.thread.toEnd();
  }

  /** @param {Conversation} conversation */
  async remove(conversation) {
    if (!confirm(`Delete “${conversation.title}”?`)) return;
    for (const { abort, message } of this.coming.values()) {
      if (message.conversation === conversation.id) abort.abort();
    }
    this.conversations.delete(conversation.id);
    await this.store?.remove(conversation.id);
    if (conversation.id === this.current) this.begin();
    else this.show();
  }

  /** @param {Message} message whose version is wanted */
  turnTo(message) {
    this.goTo(newestLeaf(this.messages, message.id));
    this.save([]);
    this.show();
  }

  /** @param {string} leaf */
  goTo(leaf) {
    const conversation = this.conversation;
    if (conversation) Object.assign(conversation, { leaf, updated: Date.now() });
  }

  /**
   * @param {string} text
   * @param {string | null} parent the message that it follows
   */
  ask(text, parent) {
    let conversation = this.conversation;
    if (!conversation) {
      const now = Date.now();
      conversation = { id: newId(), title: titleOf(text), created: now, updated: now, leaf: null };
      this.conversations.set(conversation.id, conversation);
      this.current = conversation.id;
      history.replaceState(null, "", `#${conversation.id}`);
    }
    const message = newMessage({ conversation: conversation.id, parent, role: "user", text });
    this.messages.set(message.id, message);
    this.goTo(message.id);
    this.save([message]);
    return this.answer(conversation.id, message.id);
  }

  /**
   * Have a message answered, and show the answer as it comes.
   * @param {string} conversation
   * @param {string | null} parent
   */
  async answer(conversation, parent) {
    if (this.isHere || conversation !== this.current) return;
    const asked = path(this.messages, parent);
    const message = newMessage({ conversation, parent, role: "assistant", state: "streaming" });
    const abort = new AbortController();
    this.coming.set(message.id, { abort, message });
    this.messages.set(message.id, message);
    this.goTo(message.id);
    this.show();
    this.thread.toEnd();
    this.say("The model answers.");
    const saving = setInterval(() => this.save([message]), SAVE);
    this.save([message]);
    await this.receive(message, chatBody(asked, this.settings), abort.signal);
    clearInterval(saving);
    this.coming.delete(message.id);
    if (!this.conversations.has(conversation)) return; // deleted meanwhile
    this.save([message]);
    if (conversation === this.current) this.show();
    this.say(message.error || `The answer has ended: ${message.figures?.tokens ?? 0} tokens.`);
  }

  /**
   * @param {Message} message
   * @param {object} body
   * @param {AbortSignal} signal
   */
  async receive(message, body, signal) {
    const answering = new Answering(message);
    try {
      for await (const event of chatEvents(body, this.settings.key, signal)) {
        answering.push(event, performance.now());
        if (message.conversation !== this.current) continue;
        this.thread.waits(message, progressText(event));
        this.thread.grown(message);
      }
      if (message.state === "streaming") message.state = "stopped";
    } catch (error) {
      message.state = "failed";
      message.error = error instanceof Error ? error.message : String(error);
      if (error instanceof ServerError && error.status === 401) this.dialog.open("key");
    }
  }

  stop() {
    for (const { abort, message } of this.coming.values()) {
      if (message.conversation === this.current) abort.abort();
    }
  }

  /** @param {Message[]} messages */
  save(messages) {
    const now = Date.now();
    for (const message of messages) message.updated = now;
    const id = messages[0]?.conversation ?? this.current;
    const conversation = id === null ? undefined : this.conversations.get(id);
    this.store?.save(conversation ?? null, messages).catch((/** @type {Error} */ error) => {
      this.banner(`The browser could not keep the conversation: ${error.message}`);
    });
  }

  /** What another tab has written. @param {import("./store.mjs").News} news */
  hear(news) {
    if (news.deleted) {
      this.conversations.delete(news.deleted);
      if (news.deleted === this.current) this.begin();
    }
    if (news.conversation) {
      // Each tab stays at the version that it shows.
      const mine = this.conversations.get(news.conversation.id);
      const here = mine && news.conversation.id === this.current;
      const continues = !here || news.messages?.some((message) => message.parent === mine.leaf);
      const leaf = continues ? news.conversation.leaf : mine.leaf;
      this.conversations.set(news.conversation.id, { ...news.conversation, leaf });
    }
    for (const message of news.messages ?? []) {
      if (message.conversation === this.current) this.messages.set(message.id, message);
    }
    this.show();
  }

  saveComing() {
    for (const { message } of this.coming.values()) this.save([message]);
  }

  /** The tab is closed or loaded again: what has come is kept, and nothing more comes. */
  leave() {
    for (const { abort, message } of this.coming.values()) {
      abort.abort();
      message.state = "stopped";
    }
    this.saveComing();
  }

  /** @param {(string | null)[]} ids */
  async saveFile(ids) {
    const found = [];
    for (const id of ids) {
      const conversation = id && this.conversations.get(id);
      if (!conversation) continue;
      const kept = (await this.store?.messages(conversation.id)) ?? [];
      const messages = id === this.current ? [...this.messages.values()] : kept;
      messages.sort((a, b) => a.created - b.created);
      found.push({ conversation, messages });
    }
    download(`orthrus-${new Date().toISOString().slice(0, 10)}.json`, toFile(found));
  }

  /** @param {Event} event */
  async load(event) {
    const field = /** @type {HTMLInputElement} */ (event.target);
    const file = field.files?.[0];
    if (!file) return;
    try {
      const found = fromFile(await file.text());
      for (const { conversation, messages } of found) {
        this.conversations.set(conversation.id, conversation);
        await this.store?.save(conversation, messages);
      }
      this.say(`${found.length} conversations loaded.`);
      this.show();
    } catch (error) {
      this.banner(error instanceof Error ? error.message : String(error));
    }
    field.value = "";
    byId("settings").close();
  }

  toggleDrafts() {
    this.settings.drafts = !this.settings.drafts;
    keepSettings(this.settings);
    applyLook(this.settings);
  }

  /** For screen readers. @param {string} text */
  say(text) {
    byId("status").textContent = text;
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (byId("settings").open) return;
    if (event.key === "Escape" && !this.sidebar.isOpen) this.stop();
    if (!event.altKey || event.ctrlKey || event.metaKey) return;
    const actions = {
      KeyN: () => this.begin(),
      KeyD: () => this.toggleDrafts(),
      KeyR: () => this.thread.regenerateLast(),
      Comma: () => this.dialog.open(),
    };
    const action = actions[/** @type {keyof typeof actions} */ (event.code)];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

new App().start();
