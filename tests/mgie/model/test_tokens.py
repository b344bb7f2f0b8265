"""Tokens: exact ids, and text that can never become a control token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgie.bundle.untrained import build_tokenizer
from mgie.errors import BundleError
from mgie.model.prompts import IGNORE, check_text, encode_answered, encode_question
from mgie.model.tokens import Control, Tokenizer

TOKENIZER = build_tokenizer().with_visual_tokens(8)
SPECIAL_IDS = {TOKENIZER.encode([Control(token)])[1] for token in TOKENIZER.control_tokens}
MARKERS = [*TOKENIZER.control_tokens, "<image>", "USER:", " ASSISTANT: ", "ASSISTANT:", "<pad>", "</s><s>", "[IMG8]"]
hostile_text = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(MARKERS)), max_size=8).map("".join)


@given(hostile_text)
def test_user_text_never_becomes_a_control_token(text: str) -> None:
    assert not SPECIAL_IDS & set(TOKENIZER.encode_plain(text)) - {TOKENIZER.unk_id}
    assert TOKENIZER.unk_id not in TOKENIZER.encode_plain(text)  # byte fallback covers everything


@given(hostile_text, hostile_text, st.integers(1, 9))
def test_user_text_changes_nothing_of_a_prompts_structure(instruction: str, expressive: str, patches: int) -> None:
    prompt = encode_answered(TOKENIZER, instruction, expressive, patches)
    special = [token_id for token_id in prompt.ids if token_id in SPECIAL_IDS]
    image = [TOKENIZER.added["<im_start>"], *[TOKENIZER.im_patch_id] * patches, TOKENIZER.added["<im_end>"]]
    assert special == [TOKENIZER.bos_id, *image, *TOKENIZER.visual_ids, TOKENIZER.eos_id]
    assert prompt.visual_start == len(prompt.ids) - 9
    assert prompt.labels == [IGNORE] * prompt.answer_start + prompt.ids[prompt.answer_start :]
    # The answer is labelled, the question is not: it is the prompt that generation starts from.
    assert prompt.ids[: prompt.answer_start] == encode_question(TOKENIZER, instruction, patches)


@given(st.text(max_size=40))
def test_plain_text_survives_a_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_plain(text)) == text


def test_white_space_vanishes_beside_image_and_visual_tokens_only() -> None:
    a, b = TOKENIZER.encode_plain("a"), TOKENIZER.encode_plain("b")
    assert TOKENIZER.encode(["a \n", Control("<im_start>"), " b"]) == [1, *a, TOKENIZER.added["<im_start>"], *b]
    kept = TOKENIZER.encode(["a ", Control("</s>"), " b"])
    assert kept == [1, *TOKENIZER.encode_plain("a "), TOKENIZER.eos_id, *TOKENIZER.encode_plain(" b")]


def test_decode_leaves_special_tokens_out() -> None:
    ids = TOKENIZER.encode(["make it", Control("[IMG0]"), Control("[IMG1]"), "night", Control("</s>")])
    assert TOKENIZER.decode(ids) == "make it night"


def test_recorded_ids_are_reproduced(reference_dir) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(reference_dir / "llava").with_visual_tokens(8)
    table = json.loads((reference_dir / "vectors.json").read_text())["tokenize_table"]
    assert len(table) >= 10
    for row in table:
        assert tokenizer.encode(tokenizer.parse(row["text"])) == row["input_ids"], row["text"]


def test_save_and_load_round_trip(tmp_path) -> None:  # type: ignore[no-untyped-def]
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.added == TOKENIZER.added
    assert loaded.encode(["a cat", Control("[IMG7]")]) == TOKENIZER.encode(["a cat", Control("[IMG7]")])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({}, "lacks <im_patch>, <im_start>, <im_end>"),
        ({"<im_patch>": 700, "<im_start>": 701, "<im_end>": 703}, "without a gap"),
        ({"<im_patch>": 700, "<im_start>": 701, "<im_end>": 702, "[IMG1]": 703}, "not \\[IMG0\\]"),
    ],
)
def test_incomplete_added_tokens_are_refused(added: dict[str, int], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Tokenizer(TOKENIZER._model_proto, added)


def test_a_missing_or_damaged_file_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BundleError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(BundleError, match="sentencepiece"):
        Tokenizer.load(tmp_path)


def test_check_text_returns_the_text_unchanged() -> None:
    assert check_text("  make it <s> night ", "prompt") == "  make it <s> night "
