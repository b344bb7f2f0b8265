// The controls of an edit. The number fields are what counts; a preset fills them in, and an empty one means the
// model's default, which it shows.

import { element, make } from "./dom.js";

const form = element("settings-form");

// A scale of 1 switches guidance off, so what lies above 1 is scaled.
const guidance = (factor) => (defaults) => Math.round((1 + (defaults.guidance_scale - 1) * factor) * 100) / 100;
const steps = (factor) => (defaults, limits) => Math.max(1, Math.min(Math.round(defaults.steps * factor), limits.steps));

const PRESETS = {
  strength: { field: "guidance_scale", choices: { subtle: guidance(0.6), balanced: null, strong: guidance(1.5) } },
  care: { field: "steps", choices: { draft: steps(0.5), normal: null, fine: steps(2) } },
};

/** Shows the defaults of a model, and takes no more than the service allows. */
export function useDefaults(defaults, limits) {
  for (const name of ["n", "steps"]) form[name].max = limits[name];
  for (const name of ["steps", "guidance_scale", "image_guidance_scale"]) form[name].placeholder = defaults[name];
  for (const [id, { field, choices }] of Object.entries(PRESETS)) {
    const given = checkedOf(id);
    element(id).replaceChildren(
      ...Object.entries(choices).map(([word, numberOf]) => {
        const value = numberOf ? String(numberOf(defaults, limits)) : "";
        const input = make("input", { type: "radio", name: id, value, checked: value === form[field].value });
        input.addEventListener("change", () => (form[field].value = value));
        return make("label", { title: `${field.replace("_", " ")} ${value || defaults[field]}` }, input, make("span", {}, word));
      }),
    );
    if (given === undefined) continue;
    // Another model: "strong" stays "strong", whatever number that is.
    const again = [...element(id).querySelectorAll("input")][given];
    again.checked = true;
    form[field].value = again.value;
  }
}

function checkedOf(id) {
  const index = [...element(id).querySelectorAll("input")].findIndex((input) => input.checked);
  return index < 0 ? undefined : index;
}

form.addEventListener("input", ({ target }) => {
  for (const [id, { field }] of Object.entries(PRESETS)) {
    if (target.name !== field) continue;
    for (const input of element(id).querySelectorAll("input")) input.checked = input.value === target.value;
  }
});
form.addEventListener("submit", (event) => event.preventDefault());

/** The fields as the API takes them, null where empty; null if one is not allowed, which the browser then says. */
export function givenSettings() {
  const wrong = form.querySelector("input:invalid");
  if (wrong) {
    const details = wrong.closest("details");
    if (details) details.open = true; // or the browser has nowhere to say it
    wrong.reportValidity();
    return null;
  }
  const names = ["n", "seed", "steps", "guidance_scale", "image_guidance_scale"];
  return Object.fromEntries(names.map((name) => [name, form[name].value || null]));
}

export function setSeed(seed) {
  form.seed.value = seed;
}
