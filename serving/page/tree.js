// The history as nested lists of buttons.

import { make } from "./dom.js";

function itemOf(history, node, currentId, onSelect) {
  const button = make(
    "button",
    { type: "button", className: "node", onclick: () => onSelect(node.id) },
    make("img", { src: history.url(node, "thumb"), alt: "", width: 44, height: 44 }),
    make("span", {}, node.instruction ?? node.name, ...notesOf(node)),
  );
  if (node.id === currentId) button.setAttribute("aria-current", "true");
  const item = make("li", {}, button);
  const children = history.children(node.id).map((child) => itemOf(history, child, currentId, onSelect));
  if (children.length) item.append(make("ul", {}, ...children));
  return item;
}

function notesOf(node) {
  const notes = [node.isOwn && "your words", node.mask && "a part"].filter(Boolean).join(", ");
  return notes ? [make("small", {}, notes)] : [];
}

export function drawTree(list, history, currentId, onSelect) {
  const hadFocus = list.contains(document.activeElement);
  const photos = history.children(null).reverse();
  list.replaceChildren(...photos.map((photo) => itemOf(history, photo, currentId, onSelect)));
  if (hadFocus) list.querySelector("[aria-current]")?.focus();
  const current = list.querySelector("[aria-current]");
  if (current) list.scrollTop = Math.max(0, current.offsetTop - list.offsetTop - list.clientHeight / 2);
}
