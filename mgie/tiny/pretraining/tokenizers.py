"""The tokenizers of the embedded models, made from the world's texts and a little other English.

Pure functions of the texts: the same tokenizers each time.
"""

from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mgie.model.tokenizer_training import WORD_END, train_merges, train_pieces
from mgie.model.tokens import IMAGE_TOKENS, Tokenizer


def llama_tokenizer(texts: Iterable[str], num_pieces: int) -> Tokenizer:
    """A LLaMA-like tokenizer (BPE with byte fallback), with LLaVA's image tokens."""
    model = train_pieces(texts, "bpe", num_pieces, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True)
    return Tokenizer(model, {token: num_pieces + i for i, token in enumerate(IMAGE_TOKENS)})


def t5_tokenizer(texts: Iterable[str], num_pieces: int, folder: Path) -> T5Tokenizer:
    """A T5-like tokenizer (unigram); its model is written to `folder`."""
    # T5's own arrangement of ids: <pad> 0, </s> 1, <unk> 2. Every character, however rare: it has no bytes to fall back on.
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    model = train_pieces(texts, "unigram", num_pieces, **ids, character_coverage=1.0)
    (folder / "spiece.model").write_bytes(model)
    return T5Tokenizer.from_pretrained(folder, local_files_only=True, extra_ids=0)


def clip_tokenizer(texts: Iterable[str], num_merges: int) -> CLIPTokenizer:
    """A tokenizer in CLIP's arrangement: every byte, every byte at the end of a word, merges, special tokens."""
    merges, alphabet = train_merges(texts, num_merges), sorted(bytes_to_unicode().values())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
