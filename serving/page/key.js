// Asks for the API key.

import { apiKey, setApiKey } from "./api.js";
import { element } from "./dom.js";

const dialog = element("key-dialog");
const MESSAGE = element("key-message").textContent;

/** Shows the dialog; resolves to whether a key was given. */
export function askForKey(message = MESSAGE) {
  element("key-message").textContent = message;
  element("key").value = apiKey() ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.returnValue === "save") setApiKey(element("key").value.trim());
        resolve(dialog.returnValue === "save" && Boolean(apiKey()));
      },
      { once: true },
    );
  });
}

element("key-close").addEventListener("click", () => dialog.close());
