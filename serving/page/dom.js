// The few words in which the other modules speak to the document.

export const element = (id) => document.getElementById(id);

export function show(id, isShown) {
  element(id).hidden = !isShown;
}

/** A new element: `make("button", {type: "button"}, "text or child", ...)`. */
export function make(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** 128 bits of chance. Not crypto.randomUUID, which plain http hides from all hosts but this machine. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
