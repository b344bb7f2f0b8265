// The page of the service: sends the form to the same endpoint that any client uses, and shows what came back.
"use strict";

const element = (id) => document.getElementById(id);
const form = element("form");

function show(id, text) {
  const target = element(id);
  if (text !== undefined) target.textContent = text;
  target.hidden = false;
}

function hide(...ids) {
  for (const id of ids) element(id).hidden = true;
}

async function showModel() {
  const response = await fetch("/v1/models");
  if (!response.ok) return; // not ready yet: an edit will say so
  const [model] = (await response.json()).data;
  if (!model.mgie.trained) {
    element("model-name").textContent = model.id;
    show("untrained");
  }
  for (const example of model.mgie.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "example";
    button.textContent = example;
    button.addEventListener("click", () => { element("prompt").value = example; });
    element("examples").append(" ", button);
    show("examples");
  }
}

async function errorOf(response) {
  const text = await response.text();
  try {
    const { message } = JSON.parse(text).error;
    return `${message} (status ${response.status})`;
  } catch {
    return `status ${response.status}: ${text.slice(0, 200)}`; // not from us, for example from a proxy
  }
}

// Empty fields are left out: the API refuses an empty number rather than guessing what it means.
function filledFields() {
  const fields = new FormData(form);
  for (const [name, value] of [...fields]) {
    if (value === "") fields.delete(name);
  }
  return fields;
}

function showResult(answer) {
  const [result] = answer.data;
  const { mgie } = answer;
  const source = `data:image/${answer.output_format};base64,${result.b64_json}`;
  element("after").src = source;
  element("download").href = source;
  show("after");
  show("download");
  show("expressive-text", result.revised_prompt || "(the model wrote no words)");
  element("fallback").hidden = !mgie.used_fallback;
  show(
    "details",
    `${answer.size}, seed ${mgie.seed}, ${mgie.steps} steps of ${mgie.sampler}, ` +
      `text guidance ${mgie.guidance_scale}, image guidance ${mgie.image_guidance_scale}, ` +
      `${mgie.timings.total_s.toFixed(1)} s, model ${mgie.model}${mgie.trained ? "" : " (untrained)"}`,
  );
  show("result");
}

async function edit() {
  hide("error", "result", "after", "download");
  element("send").disabled = true;
  show("status", "Editing …");
  try {
    const response = await fetch("/v1/images/edits", { method: "POST", body: filledFields() });
    if (response.ok) showResult(await response.json());
    else show("error", await errorOf(response));
  } catch (error) {
    show("error", `The service cannot be reached: ${error.message}`);
  } finally {
    element("send").disabled = false;
    element("status").textContent = "";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  edit();
});

element("image").addEventListener("change", () => {
  const [file] = element("image").files;
  hide("after", "download", "result");
  if (!file) return hide("before");
  URL.revokeObjectURL(element("before").src);
  element("before").src = URL.createObjectURL(file);
  show("before");
});

showModel();
