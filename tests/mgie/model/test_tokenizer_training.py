"""Tokenizers made from texts: without chance, and without loss of what they are given."""

from pathlib import Path

from mgie.model.tokenizer_training import clip_tokenizer, llama_tokenizer, t5_tokenizer

TEXTS = ["make it night", "the red house would be blue", "a tree, a lamp and a green house on a meadow", "night!"] * 9


def test_tokenizers_are_functions_of_the_texts() -> None:
    assert clip_tokenizer(TEXTS, 60).get_vocab() == clip_tokenizer(list(TEXTS), 60).get_vocab()
    first, second = llama_tokenizer(TEXTS, 300), llama_tokenizer(TEXTS, 300)
    ids = first.encode_plain("the red house, and something new: \u00e4")
    assert ids == second.encode_plain("the red house, and something new: \u00e4")
    assert first.decode(ids).strip() == "the red house, and something new: \u00e4"


def test_a_t5_tokenizer_knows_the_rarest_letter_that_it_has_read(tmp_path: Path) -> None:
    texts = ["the corners of the picture are dark"] * 3000 + ["Darken the corners."]
    tokenizer = t5_tokenizer(texts, 40, tmp_path, character_coverage=1.0)
    assert (
        tokenizer.decode(tokenizer("Darken the corners")["input_ids"], skip_special_tokens=True) == "Darken the corners"
    )
