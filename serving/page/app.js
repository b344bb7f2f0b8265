// The page: what is shown, and what happens when something is pressed. State is here; the rest are its tools.

import { apiKey, cancelEdit, models, progressOf, startEdit } from "./api.js";
import { element, make, newId, show } from "./dom.js";
import { adviceFor, ApiError } from "./errors.js";
import { History } from "./history.js";
import { askForKey } from "./key.js";
import { MaskPainter } from "./mask.js";
import { inspect, save, withoutMetadata } from "./pictures.js";
import { givenSettings, setSeed, useDefaults } from "./settings.js";
import { drawTree } from "./tree.js";
import { Viewer } from "./viewer.js";

const SAMPLE = "page/sample.jpg";
const RETRY_MS = 3000;

const history = new History();
const loaded = history.load();
let served = []; // models
let currentId = null; // of the node that is shown, and that the next edit goes on from
let run = null; // the edit under way: {id, request, words, preview, isWatched, abort, ended}
let isMasking = false;
let isSideBySide = false;
let shownWords = null; // what was last written into #expressive: what differs is the user's own

const viewer = new Viewer(element("viewer"), (scale, isFit) => {
  element("zoom-level").textContent = isFit ? "fit" : `${Math.round(scale * 100)} %`;
});
const painter = new MaskPainter(element("mask"), element("ring"), () => {
  element("undo").disabled = element("clear").disabled = painter.isEmpty;
  drawTools();
});

// What is shown -------------------------------------------------------------------------------------------------

const current = () => history.get(currentId);

function draw() {
  const node = current();
  const watched = run?.isWatched ? run : null;
  show("empty", !node);
  for (const id of ["tools", "composer", "settings", "history"]) show(id, node);
  drawPicture(node, watched);
  drawTools();
  drawWords(node, watched);
  drawTree(element("tree"), history, currentId, open);
  show("running", run);
  show("cancel", run);
  show("send", !run);
  element("remove").disabled = Boolean(run);
  element("prompt").placeholder = node?.instruction ? "What next?" : "make it night";
}

function drawPicture(node, watched) {
  const isGrid = Boolean(node && isSideBySide && !watched);
  show("viewer", node && !isGrid);
  show("variants", isGrid);
  show("about", node && !watched);
  element("viewer").classList.toggle("is-waiting", Boolean(watched));
  if (!node) return;
  if (isGrid) drawVariants(node);
  const source = watched ? watched.request.source : node;
  const parent = history.get(node.parent);
  const isMask = isMasking && !watched;
  element("viewer").querySelector(".paint").hidden = !isMask;
  const before = watched ? (watched.preview ? history.url(source) : null) : parent && !isMask ? history.url(parent) : null;
  const after = watched?.preview ?? history.url(source);
  const name = watched?.request.instruction ?? node.instruction ?? node.name;
  viewer.show({ before, after, width: source.width, height: source.height, name });
  element("facts").textContent = factsOf(node);
}

function drawVariants(node) {
  const variants = history.variants(node);
  element("variants").style.setProperty("--columns", Math.ceil(Math.sqrt(variants.length)));
  element("variants").style.setProperty("--ratio", node.width / node.height);
  element("variants").replaceChildren(
    ...variants.map((variant, i) => {
      const label = `Variant ${i + 1}, seed ${variant.seed}`;
      const button = make(
        "button",
        { type: "button", title: label, onclick: () => open(variant.id) },
        make("img", { src: history.url(variant), alt: label, width: variant.width, height: variant.height }),
      );
      if (variant.id === currentId) button.setAttribute("aria-current", "true");
      return button;
    }),
  );
}

function drawTools() {
  const node = current();
  const isIdle = !run?.isWatched;
  show("zoom", !isSideBySide || !isIdle);
  show("mask-tools", node && isMasking && isIdle);
  const button = element("mask-button");
  button.setAttribute("aria-pressed", String(isMasking));
  button.textContent = isMasking || painter.isEmpty ? "Edit only a part" : "Only a part will change";
  show("mask-button", isIdle);
  show("variants-button", node && isIdle && !isSideBySide && history.variants(node).length > 1);
  for (const id of ["download", "download-label", "use-seed"]) show(id, node?.instruction && isIdle);
}

function drawWords(node, watched) {
  const asked = watched?.request.instruction ?? node?.instruction;
  show("understood", asked);
  if (!asked) return;
  element("asked").textContent = asked;
  const words = watched ? watched.words : node.expressive;
  const box = element("expressive");
  if (words !== shownWords) {
    shownWords = words;
    box.value = words ?? "";
  }
  box.disabled = words === null;
  box.placeholder = words === null ? "Looking at the photo …" : "It wrote no words. Write your own.";
  element("understood").classList.toggle("is-thinking", words === null);
  show("fallback", !watched && node.details.used_fallback);
  element("again").disabled = words === null || !box.value.trim();
  element("another").disabled = Boolean(watched);
}

function factsOf({ width, height, name, instruction, seed, details }) {
  const size = `${width} × ${height} px`;
  if (!instruction) return `${name}, ${size}`;
  const seconds = details.timings.total_s.toFixed(1);
  const guidance = `guidance ${details.guidance_scale} text, ${details.image_guidance_scale} image`;
  const trained = details.trained ? "" : " (untrained)";
  return `${size} · seed ${seed} · ${details.steps} steps · ${guidance} · ${seconds} s · ${details.model}${trained}`;
}

function say(text) {
  element("status").textContent = text;
}

function showError(error) {
  say("");
  element("error-what").textContent = error.message;
  element("error-advice").textContent = adviceFor(error);
  element("error-id").textContent = error.requestId ? `Request ${error.requestId}` : "";
  show("error", true);
}

function select(id) {
  if (id !== currentId && history.get(id)) painter.reset(history.get(id));
  currentId = id;
  isSideBySide = isMasking = false;
  if (run) run.isWatched = false;
  window.history.replaceState(null, "", id ? `#${id}` : location.pathname);
  draw();
}

/** Shows what the user has picked. */
function open(id) {
  shownWords = undefined; // words begun for another picture go
  if (!run) say("");
  select(id);
}

// Photos --------------------------------------------------------------------------------------------------------

async function addPhoto(file, name = file.name) {
  show("error", false);
  await loaded;
  let facts;
  try {
    facts = await inspect(file);
  } catch {
    const kind = file.type || "of an unknown kind";
    showError(new ApiError({ message: `This browser cannot show “${name}” (${kind}).`, code: "invalid_image" }));
    return;
  }
  const node = { id: newId(), parent: null, at: Date.now(), image: file, name, ...facts };
  await addNode(node);
  select(node.id);
  element("prompt").focus();
}

async function addNode(node) {
  if (!(await history.add(node))) {
    say("This browser's storage takes no more: what is new is lost when you reload. Remove what you no longer need.");
  }
}

function photoIn(transfer) {
  return [...(transfer?.files ?? [])][0];
}

// Edits ---------------------------------------------------------------------------------------------------------

/** Edits {source, instruction, expressive, mask, seed}, seed null: that of the settings. Tells whether it came about. */
async function edit(request) {
  const settings = givenSettings();
  if (!settings) return false;
  say("");
  await cancel();
  if (run) return false; // it was pressed twice
  show("error", false);
  isMasking = isSideBySide = false;
  const abort = new AbortController();
  const mine = { id: newId(), request, words: request.expressive, preview: null, isWatched: true, abort };
  run = mine;
  mine.ended = follow(mine, { ...settings, seed: request.seed ?? settings.seed });
  return mine.ended;
}

async function follow(mine, settings) {
  const results = [];
  try {
    element("progress").removeAttribute("value");
    say("Looking at the photo …");
    draw();
    const response = await begin(mine, settings);
    for await (const event of progressOf(response)) {
      if (event.words !== undefined && !event.picture) {
        mine.words = event.words;
        say(event.words ? `Understood: ${event.words}` : "Making the picture …");
      } else if (event.step) {
        Object.assign(element("progress"), { max: event.total, value: event.step });
      } else if (event.preview) {
        URL.revokeObjectURL(mine.preview);
        mine.preview = URL.createObjectURL(event.preview);
      } else if (event.picture) {
        results.push(event);
      }
      draw();
    }
    await addResults(mine, results);
    return true;
  } catch (error) {
    if (mine.isCancelled) say("Cancelled.");
    else if (error instanceof ApiError) showError(error);
    else throw error;
    return false;
  } finally {
    URL.revokeObjectURL(mine.preview);
    run = null;
    draw();
  }
}

/** Sends the edit; what can be mended, a missing key or a result that is kept no more, is, and it is sent again. */
async function begin(mine, settings) {
  const { source, instruction, expressive, mask } = mine.request;
  let isThere = source.previous && source.keptUntil * 1000 > Date.now();
  for (;;) {
    const picture = isThere ? { previous: source.previous } : { image: source.image };
    const fields = {
      ...picture,
      prompt: instruction,
      expressive,
      mask,
      ...settings,
      model: element("model").value || null,
      keep: true, // so that the next turn need not send the picture again
    };
    try {
      return await startEdit(fields, { id: mine.id, signal: mine.abort.signal });
    } catch (error) {
      if (isThere && error.code === "previous_not_found") isThere = false;
      else if (error.status !== 401 || !(await askForKey(error.message))) throw error;
      if (!served.length) loadModels(); // for want of a key, too
    }
  }
}

async function addResults({ id, request, isWatched }, results) {
  const nodes = [];
  for (const [i, { picture, details, words }] of results.entries()) {
    nodes.push({
      id: newId(),
      parent: request.source.id,
      at: Date.now() + i,
      image: picture,
      ...(await inspect(picture)),
      instruction: request.instruction,
      expressive: words,
      isOwn: request.expressive !== null,
      mask: request.mask,
      group: id,
      seed: details.seed + i,
      details,
      previous: details.kept_until === null ? null : `${details.id}:${i}`,
      keptUntil: details.kept_until,
    });
  }
  say(nodes.length > 1 ? `Done: ${nodes.length} variants. Select the best.` : "Done.");
  for (const node of nodes) await addNode(node);
  if (!isWatched) return;
  select(nodes[0].id);
  isSideBySide = nodes.length > 1;
}

async function cancel() {
  if (!run) return;
  const { id, abort, ended } = run;
  run.isCancelled = true;
  // By its id, since a proxy between may hide from the service that this client has gone.
  await cancelEdit(id).catch(() => {}); // not begun or ended already: what follows is enough
  abort.abort();
  await ended;
}

/** What made the picture that is shown, or is making it. */
function lastRequest() {
  if (run) return run.request;
  const { parent, instruction, mask, isOwn, expressive } = current();
  return { source: history.get(parent), instruction, mask, expressive: isOwn ? expressive : null };
}

// The model -----------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    served = await models();
  } catch (error) {
    if (error.status === 401) {
      if (await askForKey(error.message)) await loadModels();
      else showError(error);
      return;
    }
    say(`${error.message} ${adviceFor(error)} This page asks again by itself.`);
    setTimeout(loadModels, RETRY_MS);
    return;
  }
  say("");
  show("error", false);
  element("model").replaceChildren(...served.map(({ id }) => make("option", {}, id)));
  show("model-label", served.length > 1);
  show("docs", !apiKey()); // a link cannot send the key that they ask for, too
  showModel();
}

function showModel() {
  const { id, mgie } = served.find((model) => model.id === element("model").value);
  element("untrained-name").textContent = id;
  show("untrained", !mgie.trained);
  useDefaults(mgie.defaults, mgie.limits);
  const [first] = element("examples").children;
  const fill = ({ target }) => {
    element("prompt").value = target.textContent;
    element("prompt").focus();
  };
  const chips = mgie.examples.map((text) => make("button", { type: "button", onclick: fill }, text));
  element("examples").replaceChildren(first, ...chips);
  show("examples", chips.length);
}

// What can be pressed -------------------------------------------------------------------------------------------

const onClick = (id, action) => element(id).addEventListener("click", action);

for (const id of ["choose", "add"]) onClick(id, () => element("file").click());
element("file").addEventListener("change", ({ target }) => {
  const file = photoIn(target);
  target.value = ""; // so that the same file can be chosen again
  if (file) addPhoto(file);
});
onClick("sample", async () => {
  const response = await fetch(SAMPLE);
  await addPhoto(await response.blob(), "a drawing");
});
document.addEventListener("paste", ({ clipboardData }) => {
  const file = photoIn(clipboardData);
  if (file) addPhoto(file, "a pasted photo");
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("is-dropping");
});
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.remove("is-dropping");
    const file = kind === "drop" && photoIn(event.dataTransfer);
    if (file) addPhoto(file);
  });
}

element("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (run) return;
  const prompt = element("prompt");
  const instruction = prompt.value.trim();
  say("");
  const mask = await painter.png();
  const request = { source: current(), instruction, expressive: null, mask, seed: null };
  if (await edit(request)) prompt.value = ""; // what did not come about can be mended
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("composer").requestSubmit();
});
onClick("cancel", cancel);
document.addEventListener("keydown", ({ key, target }) => {
  if (key !== "Escape" || target.closest("dialog")) return;
  if (run) cancel();
  else if (isMasking) element("mask-button").click();
});

element("expressive").addEventListener("input", ({ target }) => {
  element("again").disabled = !target.value.trim();
});
onClick("again", () => {
  const expressive = element("expressive").value.trim();
  // The seed of the picture that is shown: so only the words make the difference.
  edit({ ...lastRequest(), expressive, seed: run ? null : current().seed });
});
onClick("another", () => {
  setSeed("");
  edit({ ...lastRequest(), seed: null });
});

onClick("mask-button", () => {
  isMasking = !isMasking;
  isSideBySide = false;
  draw();
  if (isMasking) element("mask").focus();
});
element("brush").addEventListener("input", ({ target }) => (painter.brushPercent = Number(target.value)));
element("erase").addEventListener("change", ({ target }) => (painter.isErasing = target.checked));
onClick("undo", () => painter.undo());
onClick("clear", () => painter.clear());

onClick("zoom-in", () => viewer.zoomBy(1.5));
onClick("zoom-out", () => viewer.zoomBy(1 / 1.5));
onClick("zoom-fit", () => viewer.fit());
onClick("zoom-full", () => viewer.full());
onClick("variants-button", () => {
  isSideBySide = true;
  isMasking = false;
  draw();
});
onClick("download", async () => {
  const { image, instruction, seed } = current();
  const name = instruction.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  save(element("with-metadata").checked ? image : await withoutMetadata(image), `${name}-${seed}.png`);
});
onClick("use-seed", () => setSeed(current().seed));
onClick("remove", async () => {
  const node = current();
  const what = history.children(node.id).length ? "this picture and all that came of it" : "this picture";
  if (!confirm(`Remove ${what} from the history?`)) return;
  await history.remove(node.id);
  select(node.parent ?? history.newest?.id ?? null);
});
element("model").addEventListener("change", showModel);
onClick("key-button", async () => {
  if ((await askForKey()) && !served.length) loadModels();
});

if (location.hash) show("empty", false); // there is a picture to come
loaded.then(() => select(history.get(location.hash.slice(1))?.id ?? history.newest?.id ?? null));
loadModels();
