"""Tokenizers from texts: LLaMA's and T5's (sentencepiece), and CLIP's (byte-pair merges).

Pure functions of the texts: the same tokenizers each time.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mgie.model.tokens import IMAGE_TOKENS, Tokenizer

_WORD_END = "</w>"  # CLIP's mark on the last piece of a word


def llama_tokenizer(texts: Iterable[str], num_pieces: int) -> Tokenizer:
    """A LLaMA-like tokenizer (BPE with byte fallback), with LLaVA's image tokens."""
    model = _train_pieces(texts, "bpe", num_pieces, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True)
    return Tokenizer(model, {token: num_pieces + i for i, token in enumerate(IMAGE_TOKENS)})


def t5_tokenizer(texts: Iterable[str], num_pieces: int, folder: Path, **options: Any) -> T5Tokenizer:
    """A T5-like tokenizer (unigram); its model is written to `folder`.

    Args:
        options: Options of sentencepiece's trainer, as `character_coverage`: without bytes to fall back on, a tokenizer that
            covers less than 1.0 of the characters cannot write the rare ones.
    """
    # T5's own arrangement of ids: <pad> 0, </s> 1, <unk> 2.
    model = _train_pieces(texts, "unigram", num_pieces, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)
    (folder / "spiece.model").write_bytes(model)
    return T5Tokenizer.from_pretrained(folder, local_files_only=True, extra_ids=0)


def clip_tokenizer(texts: Iterable[str], num_merges: int) -> CLIPTokenizer:
    """A tokenizer in CLIP's arrangement: every byte, every byte at the end of a word, merges, special tokens."""
    merges, alphabet = _train_merges(texts, num_merges), sorted(bytes_to_unicode().values())
    tokens = [*alphabet, *(byte + _WORD_END for byte in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def _train_pieces(
    texts: Iterable[str], model_type: Literal["bpe", "unigram"], num_pieces: int, **options: Any
) -> bytes:
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


def _train_merges(texts: Iterable[str], count: int) -> Sequence[tuple[str, str]]:
    """Byte-pair encoding: the commonest pair of neighbours becomes a piece, again and again, while there is one.

    Written out because the tokenizers library breaks ties by chance.

    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units".
    """
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall("[a-z]+", text.lower()))
    words = Counter({(*word[:-1], word[-1] + _WORD_END): number for word, number in found.items()})
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
