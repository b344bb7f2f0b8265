// What went wrong, in the service's words, and what to do about it, in ours.

export class ApiError extends Error {
  constructor({ message, code = null, param = null, status = 0, retryAfterS = null, requestId = null }) {
    super(message);
    Object.assign(this, { code, param, status, retryAfterS, requestId });
  }
}

const ADVICE = {
  unreachable: "Check that the service runs and that you are online, then try again.",
  broken_off: "Try again; if it happens again, use fewer steps.",
  missing_api_key: "Enter your key at “API key” above.",
  invalid_api_key: "Check the key at “API key” above.",
  image_too_large: "Make the photo smaller and choose it again.",
  body_too_large: "Make the photo smaller and choose it again.",
  invalid_image: "Choose another photo: PNG, JPEG or WebP.",
  invalid_mask: "Clear the painted part and paint it again.",
  content_policy_violation: "This service does not make this edit; ask for something else.",
  model_not_found: "Reload the page to see the models that are served now.",
  deadline_exceeded: "Use fewer steps or fewer variants, and try again.",
  cost_too_high: "Use fewer steps or fewer variants.",
  store_unavailable: "Nothing is lost: try again in a moment.",
};

export function adviceFor(error) {
  if (error.retryAfterS) return `Try again in ${error.retryAfterS} s.`;
  if (ADVICE[error.code]) return ADVICE[error.code];
  if (error.status === 500) return "Try again; if it stays, tell the operator the id below.";
  return error.status >= 500 ? "Try again in a few seconds." : "Change that, and try again.";
}
