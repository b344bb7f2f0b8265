"""What the model made of an edit's words, as plain values: needs no torch, so that anybody can pass it on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DerivedWords:
    """The part of a condition that people read."""

    expressive: str
    "expressive instruction, cleaned; empty where the model wrote none"
    used_fallback: bool
    "the model gave no usable visual tokens, so states of other tokens stand in: the edit may ignore the words"
    prompt_tokens: int
    "text tokens of the prompt"
    image_tokens: int
    "image features in the prompt"
    output_tokens: int
    "tokens generated"
    bundle: str
    "identity of the bundle that derived it"
