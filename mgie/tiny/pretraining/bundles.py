"""The bundles that the stages write, and with what an editor's training begins.

The UNet begins with random weights; all else was trained before (`vae.py`, `clip.py`, `llava.py`, `edit_head.py`).
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, T5ForConditionalGeneration, T5Tokenizer

from mgie.bundle.untrained import BETAS, add_diffusion, clip_pixels
from mgie.bundle.writer import BundleWriter
from mgie.config import (
    DIFFUSION_PARTS,
    MLLM_PARTS,
    TEXT_PARTS,
    BundleConfig,
    EditSettings,
    GenerationConfig,
    Part,
    Provenance,
)
from mgie.model.edit_head import EditHead
from mgie.model.mllm import MLLM
from mgie.model.tokens import Tokenizer
from mgie.tiny.pretraining.clip import CONDITION_DIM, IMAGE_SIDE_PX, TEXT_LENGTH

NUM_VISUAL_TOKENS = 8
_SEED = 15
_DATA = "the tiny world of mgie.tiny (procedural pictures)"
# What the UNet predicts is the change itself, of noise without signal at first: so it need not learn to copy the source,
# which takes a small one thousands of steps, and where nothing is to change it answers 0 whatever the noise.
SCHEDULER: dict[str, Any] = {
    "_class_name": DDIMScheduler.__name__,
    **BETAS,
    "clip_sample": False,
    "prediction_type": "sample",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
_SETTINGS = EditSettings(sampler="ddim", steps=4, guidance_scale=1.25, image_guidance_scale=1.0, detail_transfer=True)
_WORK: dict[str, Any] = {
    "makes_change": True,
    "work_area_px": IMAGE_SIDE_PX**2,
    "multiple_px": 16,
    "defaults": _SETTINGS,
}
EXAMPLES = (
    "make it night",
    "brighten it up",
    "a sepia look, please",
    "black and white",
    "more contrast",
    "make it look like winter",
    "let it rain",
    "more cosy",
)
# Short answers say the user's words again, which forbidding repeated 3-grams of the question would prevent.
_GENERATION = GenerationConfig(max_new_tokens=64, no_repeat_ngram_size=0)


def new_unet() -> UNet2DConditionModel:
    """The UNet of both editors, with random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=16,
        out_channels=8,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONDITION_DIM,
        attention_head_dim=(2, 4, 6),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def write_text_editor(
    out: Path,
    *,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel | None = None,
) -> None:
    """An InstructPix2Pix.

    Args:
        unet: None = one with random weights.
    """
    torch.manual_seed(_SEED)
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    config = BundleConfig(
        name="ip2p-tiny",
        parts=(*TEXT_PARTS, *DIFFUSION_PARTS),
        trained=unet is not None,
        provenance=_provenance(),
        conditioner="text",
        num_visual_tokens=0,
        dimensions={
            "vocabulary": len(tokenizer),
            "condition_tokens": TEXT_LENGTH,
            "condition_dim": CONDITION_DIM,
        },
        **_WORK,
    )
    with BundleWriter(out, config) as writer:
        writer.add_pretrained("text_encoder", encoder, tokenizer=tokenizer)
        add_diffusion(writer, unet or new_unet(), vae, SCHEDULER)


def add_visual_tokens(llava: MLLM, tokenizer: Tokenizer) -> tuple[Tokenizer, EditHead]:
    """Gives an LLM visual tokens, and an edit head for them; both with random weights."""
    torch.manual_seed(_SEED)
    tokenizer = tokenizer.with_visual_tokens(NUM_VISUAL_TOKENS)
    llava.llm.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
    width = int(llava.llm.config.hidden_size)
    head = EditHead(
        llm_dim=width, condition_dim=CONDITION_DIM, width=160, num_queries=TEXT_LENGTH, num_layers=2,
        feedforward_dim=320,
    )  # fmt: skip
    return tokenizer, head


def write_mgie(
    out: Path, *, llava: MLLM, tokenizer: Tokenizer, head: EditHead, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    """An MGIE."""
    config = BundleConfig(
        name="mgie-tiny",
        parts=(*MLLM_PARTS, *DIFFUSION_PARTS),
        trained=False,
        provenance=_provenance(),
        num_visual_tokens=NUM_VISUAL_TOKENS,
        dimensions={
            **_language_sizes(llava, tokenizer),
            "condition_tokens": TEXT_LENGTH,
            "condition_dim": CONDITION_DIM,
        },
        **_WORK,
        generation=_GENERATION,
        examples=EXAMPLES,
    )
    with BundleWriter(out, config) as writer:
        _add_language(writer, llava, tokenizer)
        writer.add_edit_head(head.config, head.state_dict())
        add_diffusion(writer, unet, vae, SCHEDULER)


def write_llava(out: Path, *, llava: MLLM, tokenizer: Tokenizer) -> None:
    """A LLaVA for the data jobs."""
    parts: tuple[Part, ...] = tuple(part for part in MLLM_PARTS if part != "edit_head")
    config = BundleConfig(
        name="llava-tiny",
        parts=parts,
        trained=True,
        provenance=_provenance(),
        num_visual_tokens=0,
        dimensions=_language_sizes(llava, tokenizer),
        generation=GenerationConfig(max_new_tokens=128, no_repeat_ngram_size=0),
    )
    with BundleWriter(out, config) as writer:
        _add_language(writer, llava, tokenizer)


def write_summarizer(out: Path, *, model: T5ForConditionalGeneration, tokenizer: T5Tokenizer) -> None:
    """A Flan-T5 for the data jobs."""
    config = BundleConfig(
        name="t5-tiny", parts=("summarizer",), trained=True, provenance=_provenance(), num_visual_tokens=0
    )
    with BundleWriter(out, config) as writer:
        writer.add_pretrained("summarizer", model, tokenizer=tokenizer)


def _provenance() -> Provenance:
    return Provenance(made_by="mgie.tiny", sources=("random weights",), data=_DATA, licences=("Apache-2.0",))


def _language_sizes(llava: MLLM, tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "llm_hidden": int(llava.llm.config.hidden_size),
        "llm_layers": int(llava.llm.config.num_hidden_layers),
        "vocabulary": tokenizer.vocab_size,
        "image_patches": llava.num_patches,
    }


def _add_language(writer: BundleWriter, llava: MLLM, tokenizer: Tokenizer) -> None:
    assert llava.vision is not None
    assert llava.projector is not None
    writer.add_tokenizer(tokenizer)
    writer.add_pretrained("vision", llava.vision.clip)
    writer.add_clip_pixels(clip_pixels(IMAGE_SIDE_PX))
    writer.add_projector(llava.projector.state_dict())
    writer.add_pretrained("llm", llava.llm)
