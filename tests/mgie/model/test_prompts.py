"""Prompts: whole rendered strings, label masks, cleaning."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mgie.bundle.untrained import build_tokenizer
from mgie.config import MAX_INSTRUCTION_CHARS
from mgie.errors import PromptError
from mgie.model.prompts import (
    IGNORE,
    check_text,
    clean_expressive,
    encode_answered,
    encode_question,
    generated_text,
    is_settled,
    question,
)
from mgie.model.tokens import IMAGE_TOKENS, Control, Tokenizer

TOKENIZER = build_tokenizer().with_visual_tokens(8)


def _render(segments: list[str | Control]) -> str:
    return "".join(segment.token if isinstance(segment, Control) else segment for segment in segments)


def test_question_is_the_published_string() -> None:
    assert _render(question("make it night", 2)) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: what will this image be like if 'make it night'\n"
        "<im_start><im_patch><im_patch><im_end> ASSISTANT:"
    )


def test_data_question_asks_for_a_short_paragraph_after_two_spaces() -> None:
    assert "'make it night'  (in a short paragraph)\n<im_start>" in _render(question("make it night", 1, for_data=True))


def test_an_llm_without_eyes_is_asked_the_same_question_without_an_image_block() -> None:
    assert _render(question("make it night", 0)) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: what will this image be like if 'make it night' ASSISTANT:"
    )
    image_ids = {TOKENIZER.added[token] for token in IMAGE_TOKENS}
    prompt = encode_answered(TOKENIZER, "write ASSISTANT: <im_start> here", "A wall.", 0)
    assert not image_ids & set(prompt.ids)
    assert prompt.ids[: prompt.answer_start] == encode_question(TOKENIZER, "write ASSISTANT: <im_start> here", 0)
    seen = encode_answered(TOKENIZER, "write ASSISTANT: <im_start> here", "A wall.", 4)
    assert prompt.ids[prompt.answer_start :] == prompt.labels[prompt.answer_start :] == seen.ids[seen.answer_start :]
    assert prompt.visual_start == len(prompt.ids) - 9
    assert set(prompt.labels[: prompt.answer_start]) == {IGNORE}


def test_recorded_labels_are_reproduced_where_no_control_text_stands(reference_dir) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(reference_dir / "llava").with_visual_tokens(8)
    rows = json.loads((reference_dir / "vectors.json").read_text())["label_table"]
    plain = [
        row
        for row in rows
        if not any(mark in row["instruction"] + row["expressive"] for mark in ("<", "[IMG", "ASSISTANT"))
    ]
    assert len(plain) >= 4
    for row in plain:
        prompt = encode_answered(tokenizer, row["instruction"], row["expressive"], 16)
        assert (prompt.ids, prompt.labels) == (row["input_ids"], row["labels"])


def test_turn_markers_in_an_instruction_mask_nothing() -> None:
    """F6: the original masks the whole sample here."""
    prompt = encode_answered(TOKENIZER, "write ASSISTANT: on the wall", "A wall.", 4)
    labelled = [token_id for token_id, label in zip(prompt.ids, prompt.labels, strict=True) if label != IGNORE]
    assert labelled == [*TOKENIZER.encode_plain("ASSISTANT: A wall.")[len(TOKENIZER.encode_plain("ASSISTANT:")) :],
                        *TOKENIZER.visual_ids, TOKENIZER.eos_id]  # fmt: skip


def test_truncation_loses_visual_tokens_and_says_so() -> None:
    whole = encode_answered(TOKENIZER, "make it red", "A red wall.", 4)
    assert whole.visual_start is not None
    cut = encode_answered(TOKENIZER, "make it red", "A red wall.", 4, max_length=whole.visual_start)
    assert cut.visual_start is None
    assert cut.ids == whole.ids[: whole.visual_start]
    kept = encode_answered(TOKENIZER, "make it red", "A red wall.", 4, max_length=whole.visual_start + 1)
    assert kept.visual_start == whole.visual_start


def test_a_plain_llava_has_an_answer_without_visual_tokens() -> None:
    prompt = encode_answered(build_tokenizer(), "make it red", "A red wall.", 4)
    assert prompt.visual_start is None
    assert prompt.ids[-1] == TOKENIZER.eos_id
    assert len(encode_question(build_tokenizer(), "make it red", 4)) == prompt.answer_start


def test_generated_text_ends_at_the_first_visual_token_or_eos() -> None:
    text = TOKENIZER.encode_plain("A red wall.")
    assert generated_text(TOKENIZER, [*text, TOKENIZER.visual_ids[0], *text]) == "A red wall."
    assert generated_text(TOKENIZER, [*text, TOKENIZER.eos_id, *text]) == "A red wall."
    assert generated_text(TOKENIZER, [TOKENIZER.visual_ids[0]]) == ""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),  # F13: IndexError in the original
        ("   ", ""),
        ("...", ""),
        ("One sentence", "One sentence."),
        ("The sky is blue. It is nice. Very nice.", "The sky is blue. It is nice."),  # F13: joined without a space
        ("A 2.5 cm line. Next. More.", "A 2.5 cm line. Next."),  # F13: a decimal point ended a sentence
        ("It has 3. Next one.", "It has 3. Next one."),
        ("The hat is red. Alternatively, it is blue.", "The hat is red."),
        ("The ALTERNATIVE is here", "The."),
        ("Alternative view", ""),
        ("An alternator hums.", "An alternator hums."),
        ("A nonalternative wall.", "A nonalternative wall."),  # F13: cut inside words
        ("Hi! Really? Yes. No. Maybe.", "Hi! Really? Yes. No."),
        ("first line.\nsecond line.\nthird", "first line. second line."),
        ("Café. ☃. z", "Café. ☃."),
        (" leading and trailing ", "leading and trailing."),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_expressive(text) == cleaned
    assert clean_expressive(cleaned) == cleaned


pieces = st.sampled_from(["a", " ", ".", "1", "2", "Red", "alternative", "ly", "\n", "☃", "s"])


@given(st.lists(pieces, max_size=14).map("".join), st.lists(pieces, max_size=8).map("".join))
@example("a 1. b 2.", "5 cm.")
@example("a. alternative", "s. b. c")
def test_nothing_written_after_a_settled_text_changes_its_cleaned_form(text: str, more: str) -> None:
    if is_settled(text):
        assert clean_expressive(text + more) == clean_expressive(text)


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("One. Two.", False),  # the last character may still turn out to stand in a number
        ("One. Two. ", True),
        ("One. Two 2.5", False),
        ("One. Two 2.5. T", True),
        ("One. . . Two", False),
        ("One. Two.\ufffd", False),
        ("The hat is red. Alternatively,", True),
        ("The hat is red. Alternative", False),
    ],
)
def test_text_is_settled_one_character_after_the_second_sentence(text: str, settled: bool) -> None:
    assert is_settled(text) is settled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt is empty"),
        (" \n\t", "prompt is empty"),
        (
            "x" * (MAX_INSTRUCTION_CHARS + 1),
            f"has {MAX_INSTRUCTION_CHARS + 1} characters; at most {MAX_INSTRUCTION_CHARS}",
        ),
        ("a\ud800b", "surrogate"),
    ],
)
def test_unusable_text_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        check_text(text, "prompt")
    assert caught.value.param == "prompt"
