"""Pictures and captions in one space: the CLIP of the tiny world.

Its vision tower is where LLaVA's begins, its text encoder where the conditioning of InstructPix2Pix begins, and whole
it measures how pictures and words agree.

Source: Radford et al., ICML 2021.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip import CLIPConfig

from mgie.bundle.untrained import clip_pixels
from mgie.tiny.pretraining.corpus import Corpus
from mgie.tiny.pretraining.loop import LoopConfig, fit

IMAGE_SIDE_PX, PATCH_SIDE_PX = 128, 16
TEXT_LENGTH, CONDITION_DIM = 48, 128
LOOP = LoopConfig(steps=500, batch=64, lr=1e-3, seed=12)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The model, with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIDE_PX,
        patch_size=PATCH_SIDE_PX,
        projection_dim=128,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONDITION_DIM,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def learn_clip(
    corpus: Corpus, tokenizer: CLIPTokenizer, state_file: Path, *, loop: LoopConfig = LOOP, log: Path | None = None
) -> CLIPModel:
    """Trains a CLIP on sources and goals with their captions: both of a pair in one batch, so that edits matter."""
    torch.manual_seed(loop.seed)
    clip = new_clip(tokenizer)

    def loss(rng: Generator) -> dict[str, Tensor]:
        numbers = rng.choice(corpus.num_samples, size=loop.batch // 2, replace=False)
        words = [corpus.words[n] for n in numbers]
        texts = [*(one.source_caption for one in words), *(one.goal_caption for one in words)]
        pixels = clip_batch(np.concatenate([corpus.sources(numbers), corpus.goals(numbers)]))
        with torch.autocast("cpu", torch.bfloat16):
            out = clip(input_ids=encode(tokenizer, texts), pixel_values=pixels)
        scores = out.logits_per_image.float()
        # Equal captions are no mistakes of each other: they share the target.
        same = torch.tensor([[a == b for b in texts] for a in texts], dtype=torch.float32)
        target = same / same.sum(1, keepdim=True)
        both = (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2
        right = (scores.argmax(1)[:, None] == torch.arange(len(texts))).mul(same > 0).any(1).float().mean()
        return {"loss": both, "right": right}

    fit(clip, loop, loss, state_file, log=log)
    return clip


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Ids of texts, [B, TEXT_LENGTH]."""
    ids: Tensor = tokenizer(
        list(texts), truncation=True, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )["input_ids"]
    return ids


def clip_batch(pictures: npt.NDArray[np.uint8]) -> Float[Tensor, "B 3 S S"]:
    """CLIP-normalised pixels of [B, S, S, 3], S = `IMAGE_SIDE_PX`: as `pixels.ClipPixels` makes them of such pictures."""
    mean, std = (torch.tensor(clip_pixels(IMAGE_SIDE_PX)[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
