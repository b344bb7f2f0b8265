"""The tiny LLaVA: it looks at a picture and says what it would be like if it were edited as somebody asks.

Trained from nothing with the vision tower of `clip.py`, on the world's own answers: verbose ones where the question
asks for a short paragraph, concise ones where it does not, captions, and concise answers without a picture, by which
the same LLM serves as the text-only one of the paper's LGIE. What the patches show (`patches.py`) is learnt beside: from
words alone a vision tower would need many more pictures.
"""

from pathlib import Path
from typing import Literal, get_args

import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel, CLIPVisionModel

from mgie.bundle.untrained import new_llm
from mgie.data.collate import ConversationCollator
from mgie.model.loss import language_loss
from mgie.model.mllm import MLLM, VisionTower
from mgie.model.prompts import EncodedPrompt, ask, encode_answer, question
from mgie.model.tokens import Tokenizer
from mgie.tiny.pretraining.clip import clip_batch
from mgie.tiny.pretraining.corpus import Corpus, Words
from mgie.tiny.pretraining.loop import LoopConfig, fit
from mgie.tiny.pretraining.patches import PatchReader

Kind = Literal["verbose", "concise", "caption", "blind"]
LOOP = LoopConfig(steps=5500, batch=40, lr=1.5e-3, seed=13)
# Of the samples of a step, and of the loss.
_SHARES: dict[Kind, float] = {"verbose": 0.35, "concise": 0.4, "caption": 0.15, "blind": 0.1}
_PATCH_WEIGHT = 1.0
_CAPTION_QUESTION = "what is in this image?"


def new_llava(tokenizer: Tokenizer, clip: CLIPModel) -> MLLM:
    """The model: CLIP's vision tower as it is, projector and LLM with random weights."""
    vision = CLIPVisionModel(clip.config.vision_config)
    vision.load_state_dict(clip.vision_model.state_dict())
    llm = new_llm(tokenizer, num_layers=6, num_heads=6)
    projector = nn.Linear(vision.config.hidden_size, llm.config.hidden_size)
    return MLLM(VisionTower(vision, -2), projector, llm, im_patch_id=tokenizer.im_patch_id)


def learn_llava(
    corpus: Corpus,
    tokenizer: Tokenizer,
    clip: CLIPModel,
    state_file: Path,
    *,
    loop: LoopConfig = LOOP,
    log: Path | None = None,
) -> MLLM:
    """Trains all of it."""
    torch.manual_seed(loop.seed)
    llava = new_llava(tokenizer, clip)
    assert llava.vision is not None
    vision, reader = llava.vision, PatchReader(int(clip.config.vision_config.hidden_size))
    collate = ConversationCollator(tokenizer, num_patches=llava.num_patches)
    kinds: tuple[Kind, ...] = get_args(Kind)

    def loss(rng: Generator) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        patches: list[Tensor] = []
        for kind in kinds:
            numbers = rng.integers(corpus.num_samples, size=round(loop.batch * _SHARES[kind]))
            rows = [_conversation(tokenizer, corpus.words[n], kind, llava.num_patches) for n in numbers]
            words = collate.pad(rows)
            with torch.autocast("cpu", torch.bfloat16):
                features: Tensor | None = None
                if kind != "blind":
                    seen = vision(clip_batch(corpus.sources(numbers)))
                    features = llava.project(seen)
                    patches.append(reader.loss(seen, torch.from_numpy(corpus.patches(numbers))))
                hidden = llava.forward_shared(llava.embed(words.input_ids, features), words.mask, words.num_shared)
                logits = llava.logits(hidden.flatten(0, 1)[words.label_positions])
            losses[kind] = language_loss(logits, words.label_ids)
        language = sum((_SHARES[kind] * losses[kind] for kind in kinds), torch.zeros(()))
        losses["patches"] = torch.stack(patches).mean()
        return {"loss": language + _PATCH_WEIGHT * losses["patches"], **losses}

    # One kind of attention for all sizes: the fused kernel's backward pass is slow on CPUs.
    with sdpa_kernel(SDPBackend.MATH):
        fit(nn.ModuleDict({"llava": llava, "reader": reader}), loop, loss, state_file, log=log)
    return llava


def _conversation(tokenizer: Tokenizer, words: Words, kind: Kind, num_patches: int) -> EncodedPrompt:
    """A question and its answer."""
    if kind == "caption":
        return encode_answer(tokenizer, ask(_CAPTION_QUESTION, num_patches), words.source_caption)
    asked = question(words.instruction, 0 if kind == "blind" else num_patches, for_data=kind == "verbose")
    return encode_answer(tokenizer, asked, words.verbose if kind == "verbose" else words.expressive)
