// Every photo and every edit of it, as trees: what was edited is the parent of what came of it. Kept in this browser.

const STORE = "nodes";

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/**
 * A node: {id, parent, at, image, thumb, width, height, name} and, of an edit, {instruction, expressive, isOwn, mask, group,
 * seed, details, previous, keptUntil}. `at` is Unix time in milliseconds.
 */
export class History {
  #database = null;
  #nodes = new Map();
  #urls = new Map();

  /** Reads what this browser has kept; without storage the history lasts as long as the page. */
  async load() {
    try {
      const opening = indexedDB.open("mgie", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
      this.#database = await done(opening);
      const nodes = await done(this.#store("readonly").getAll());
      for (const node of nodes.sort((a, b) => a.at - b.at)) this.#nodes.set(node.id, node);
    } catch {
      this.#database = null;
    }
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  get(id) {
    return this.#nodes.get(id);
  }

  get newest() {
    return [...this.#nodes.values()].at(-1);
  }

  /** Nodes made of the given one, oldest first; of null: the photos. */
  children(id) {
    return [...this.#nodes.values()].filter((node) => node.parent === id);
  }

  /** The variants that one edit brought, itself among them. */
  variants(node) {
    return node.group ? this.children(node.parent).filter(({ group }) => group === node.group) : [];
  }

  /** Adds a node. False: the browser's storage takes no more, and a reload will not know it. */
  async add(node) {
    this.#nodes.set(node.id, node);
    if (!this.#database) return false;
    try {
      await done(this.#store("readwrite").put(node));
      return true;
    } catch {
      return false;
    }
  }

  /** Removes a node and all that came of it. */
  async remove(id) {
    for (const child of this.children(id)) await this.remove(child.id);
    this.#nodes.delete(id);
    for (const kind of ["image", "thumb"]) {
      URL.revokeObjectURL(this.#urls.get(`${id} ${kind}`));
      this.#urls.delete(`${id} ${kind}`);
    }
    if (this.#database) await done(this.#store("readwrite").delete(id));
  }

  /** An address for <img> of a node's `image` or `thumb`. */
  url(node, kind = "image") {
    const key = `${node.id} ${kind}`;
    if (!this.#urls.has(key)) this.#urls.set(key, URL.createObjectURL(node[kind]));
    return this.#urls.get(key);
  }
}
