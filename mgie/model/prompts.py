"""Every prompt template, and the cleaning of generated expressive instructions.

A prompt is a list of segments (`tokens.Segment`): templates contribute special tokens, user text is
inserted as plain strings. Where the answer begins and where `[IMG0]` stands is known by construction and
never searched for in text. Knows nothing of tensors.
"""

import re
from dataclasses import dataclass

from mgie.config import MAX_INSTRUCTION_CHARS
from mgie.errors import PromptError
from mgie.model.tokens import IM_END, IM_PATCH, IM_START, Control, Segment, Tokenizer, visual_token

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "what will this image be like if '{instruction}'"
DATA_SUFFIX = "  (in a short paragraph)"  # two spaces, as in the published data generation
SUMMARIZE = "summarize the following paragraph in 32 words:\n\n{text}"
IGNORE = -100  # label of a position that carries no language loss
_MAX_SENTENCES = 2
_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")  # not a decimal point
_HEDGE = re.compile(r"\balternative(?:ly)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class EncodedPrompt:
    """A question, or a question with its teacher-forced answer, as ids.

    `labels` equals `ids` on the answer, `[IMG*]` and `</s>`, and `IGNORE` elsewhere. `answer_start` is
    the first position of the answer; `visual_start` the position of `[IMG0]`, None where there is none.
    """

    ids: list[int]
    labels: list[int]
    answer_start: int
    visual_start: int | None


def check_text(text: str, name: str) -> str:
    """Returns `text` unchanged.

    Raises:
        PromptError: It is blank, longer than `MAX_INSTRUCTION_CHARS` characters, or not valid Unicode.
    """
    if not text.strip():
        raise PromptError(f"{name} is empty; it must say what to change", param=name)
    if len(text) > MAX_INSTRUCTION_CHARS:
        raise PromptError(f"{name} has {len(text)} characters; at most {MAX_INSTRUCTION_CHARS} are allowed", param=name)
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise PromptError(f"{name} holds a lone surrogate, which is not valid Unicode text", param=name)
    return text


def question(instruction: str, num_patches: int, *, for_data: bool = False) -> list[Segment]:
    """The conversation up to and including `ASSISTANT:`.

    Args:
        instruction: User text; becomes plain pieces whatever it holds.
        num_patches: Image features P that will replace the `<im_patch>` tokens; 0 = no image block, for an LLM
            that does not see the image.
        for_data: The wording of data generation, which asks for a short paragraph.
    """
    return ask(QUESTION.format(instruction=instruction) + (DATA_SUFFIX if for_data else ""), num_patches)


def ask(asked: str, num_patches: int) -> list[Segment]:
    """A conversation that begins with any question, up to and including `ASSISTANT:`; `num_patches` as in `question`."""
    if not num_patches:
        return [f"{SYSTEM} USER: {asked} ASSISTANT:"]
    return [
        f"{SYSTEM} USER: {asked}\n",
        Control(IM_START),
        *[Control(IM_PATCH)] * num_patches,
        Control(IM_END),
        " ASSISTANT:",
    ]


def encode_question(tokenizer: Tokenizer, instruction: str, num_patches: int, *, for_data: bool = False) -> list[int]:
    """Ids of `question`."""
    return tokenizer.encode(question(instruction, num_patches, for_data=for_data))


def encode_answered(
    tokenizer: Tokenizer, instruction: str, expressive: str, num_patches: int, *, max_length: int | None = None
) -> EncodedPrompt:
    """The training conversation: question, expressive instruction, visual tokens, `</s>`.

    Args:
        max_length: Cuts ids and labels to this length, as the published training does; the visual tokens
            may then be lost, and `visual_start` is None unless `[IMG0]` itself is left.
    """
    return encode_answer(tokenizer, question(instruction, num_patches), expressive, max_length=max_length)


def encode_answer(
    tokenizer: Tokenizer, asked: list[Segment], answer: str, *, max_length: int | None = None
) -> EncodedPrompt:
    """A question of `ask` with its answer, and visual tokens where the vocabulary has them; see `encode_answered`."""
    num_visual = len(tokenizer.visual_ids)
    head = [*asked, f" {answer} " if num_visual else f" {answer}"]
    visual: list[Segment] = [segment for i in range(num_visual) for segment in (Control(visual_token(i)), " ")][:-1]
    # Encoding the text up to `ASSISTANT:` alone gives a prefix of the whole: pieces do not reach over white space.
    answer_start = _common_prefix(tokenizer.encode(asked), tokenizer.encode(head))
    ids = tokenizer.encode([*head, *visual])
    visual_start = len(ids) - num_visual if num_visual else None
    ids.append(tokenizer.eos_id)
    labels = [IGNORE] * answer_start + ids[answer_start:]
    if max_length is not None:
        ids, labels = ids[:max_length], labels[:max_length]
        if visual_start is not None and visual_start >= max_length:
            visual_start = None
    return EncodedPrompt(ids=ids, labels=labels, answer_start=answer_start, visual_start=visual_start)


def generated_text(tokenizer: Tokenizer, output_ids: list[int]) -> str:
    """What the model wrote before `[IMG0]` or `</s>`; `output_ids` without the prompt."""
    stops = {tokenizer.eos_id, *tokenizer.visual_ids[:1]}
    end = next((i for i, token_id in enumerate(output_ids) if token_id in stops), len(output_ids))
    return tokenizer.decode(output_ids[:end])


def clean_expressive(text: str) -> str:
    """The concise form of a generated text: at most two sentences, ended by one full stop.

    Cuts at the word "alternative(ly)", where LLaVA begins to hedge. A full stop ends a sentence unless
    digits stand on both sides. Text without a word gives "".

    Source: the published clean-up, with its faults mended (see "Deviations from the original" in docs/model.md).
    """
    sentences = [part.strip() for part in _FULL_STOP.split(_HEDGE.split(text, maxsplit=1)[0])]
    kept = [part for part in sentences if part][:_MAX_SENTENCES]
    return " ".join(f"{part}." for part in kept)


def is_settled(text: str) -> bool:
    """Whether nothing written after `text` could change `clean_expressive(text)`: generation may stop.

    True once the sentences that are kept are complete or the model hedges, and one more character is known
    (a full stop may still become a decimal point, and "alternative" a longer word).
    """
    known = text[:-1] if text[-1:] != "\ufffd" else ""  # half a character, as byte fallback gives it, is not known
    if (hedge := _HEDGE.search(text)) is not None and hedge.end() <= len(known):
        return True
    num_kept = 0
    start = 0
    for stop in _FULL_STOP.finditer(text):
        num_kept += bool(text[start : stop.start()].strip())
        start = stop.end()
        if num_kept == _MAX_SENTENCES:
            return stop.end() <= len(known)
    return False


def _common_prefix(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
