// The service's public API, and nothing else of the service; see /docs.

import { ApiError } from "./errors.js";
import { readEvents } from "./sse.js";

const KEY = "mgie.key";
let key = null; // when session storage is switched off

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return key;
  }
}

export function setApiKey(given) {
  key = given || null;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // `key` has it.
  }
}

async function call(path, { headers = {}, ...options } = {}) {
  const authorization = apiKey() ? { authorization: `Bearer ${apiKey()}` } : {};
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers: { ...authorization, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ message: "The service cannot be reached.", code: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  const more = {
    status: response.status,
    retryAfterS: Number(response.headers.get("retry-after")) || null,
    requestId: response.headers.get("x-request-id"),
  };
  try {
    return new ApiError({ ...JSON.parse(text).error, ...more });
  } catch {
    // Not from the service: from a proxy before it, for example.
    return new ApiError({ message: `The answer was status ${response.status}: ${text.slice(0, 200)}`, ...more });
  }
}

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** Ends a running edit; ApiError 404: none of that id runs. */
export async function cancelEdit(id) {
  await call(`v1/images/edits/${id}`, { method: "DELETE" });
}

/**
 * Begins an edit. The answer is there once the words are derived; what fails before throws here.
 * @param fields - of the form: text, numbers, blobs; null and undefined are left out
 * @param id - names the edit, for `cancelEdit`
 */
export async function startEdit(fields, { id, signal }) {
  const body = new FormData();
  for (const [name, value] of Object.entries({ ...fields, stream: true, partial_images: 3 })) {
    if (value !== null && value !== undefined) body.append(name, value);
  }
  return call("v1/images/edits", { method: "POST", body, headers: { "x-request-id": id }, signal });
}

/**
 * What comes of an edit that has begun: {words}, {step, total}, {preview}, and for each variant {picture, details, words}.
 * Throws ApiError if it fails or ends too early.
 */
export async function* progressOf(response) {
  const requestId = response.headers.get("x-request-id");
  const brokenOff = new ApiError({ message: "The connection broke off.", code: "broken_off", requestId });
  let words = "";
  let isDone = false;
  try {
    for await (const { comment, event, data } of readEvents(response.body)) {
      if (comment?.startsWith("expressive ")) yield { words: (words = JSON.parse(comment.slice("expressive ".length))) };
      const step = /^step (\d+)\/(\d+)$/.exec(comment ?? "");
      if (step) yield { step: Number(step[1]), total: Number(step[2]) };
      if (!data) continue;
      const content = JSON.parse(data);
      if (content.error) throw new ApiError({ ...content.error, requestId });
      const picture = imageOf(content);
      if (event === "image_edit.partial_image") yield { preview: picture };
      if (event === "image_edit.completed") {
        isDone = true;
        yield { picture, details: content.mgie, words };
      }
    }
  } catch (error) {
    throw error instanceof ApiError || error.name === "AbortError" ? error : brokenOff;
  }
  if (!isDone) throw brokenOff;
}

function imageOf({ b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${output_format}` });
}
