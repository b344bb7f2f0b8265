"""Tokenizers from texts: sentencepiece, and byte-pair merges as CLIP's tokenizer uses them."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import sentencepiece

WORD_END = "</w>"  # CLIP's mark on the last piece of a word


def train_pieces(texts: Iterable[str], model_type: Literal["bpe", "unigram"], num_pieces: int, **options: Any) -> bytes:
    """A sentencepiece model with LLaMA's text handling: nothing normalised, every space kept."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=model_type,
        vocab_size=num_pieces,
        hard_vocab_limit=model_type == "bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def train_merges(texts: Iterable[str], count: int) -> Sequence[tuple[str, str]]:
    """Byte-pair encoding: the commonest pair of neighbours becomes a piece, again and again, while there is one.

    Written out because the tokenizers library breaks ties by chance.

    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units".
    """
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall("[a-z]+", text.lower()))
    words = Counter({(*word[:-1], word[-1] + WORD_END): number for word, number in found.items()})
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += number
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = Counter({_merged(word, best): number for word, number in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    pieces: list[str] = []
    i = 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        pieces.append("".join(word[i : i + width]))
        i += width
    return tuple(pieces)
