"""The tiny Flan-T5: verbose answers -> concise expressive instructions."""

from pathlib import Path

import torch
from numpy.random import Generator
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from mgie.model.prompts import IGNORE, SUMMARIZE, clean_expressive
from mgie.tiny.pretraining.corpus import Corpus
from mgie.tiny.pretraining.loop import LoopConfig, fit

LOOP = LoopConfig(steps=2500, batch=48, lr=2e-3, seed=14)


def new_summarizer(tokenizer: T5Tokenizer) -> T5ForConditionalGeneration:
    """The model, with random weights."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )


def learn_summarizer(
    corpus: Corpus, tokenizer: T5Tokenizer, state_file: Path, *, loop: LoopConfig = LOOP, log: Path | None = None
) -> T5ForConditionalGeneration:
    """Trains it on the world's own answers and instructions."""
    torch.manual_seed(loop.seed)
    model = new_summarizer(tokenizer)

    def loss(rng: Generator) -> dict[str, Tensor]:
        words = [corpus.words[n] for n in rng.integers(corpus.num_samples, size=loop.batch)]
        # As the data jobs give it: cut to two sentences.
        texts = [SUMMARIZE.format(text=clean_expressive(w.verbose)) for w in words]
        asked = tokenizer(texts, padding=True, return_tensors="pt")
        answers = tokenizer([w.expressive for w in words], padding=True, return_tensors="pt")["input_ids"]
        labels = answers.masked_fill(answers == tokenizer.pad_token_id, IGNORE)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], labels=labels)
        return {"loss": out.loss.float()}

    fit(model, loop, loss, state_file, log=log)
    return model
