"""How the untrained bundles are made: sizes, seeds, tokenizers. Random weights, for tests and load tests.

The same architecture as the published model at a few million parameters, so that every path of the product
runs on a laptop. Building takes a few seconds and gives the same bytes each time for the same library
versions. Knows nothing of how bundles are used.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mgie.bundle.writer import BundleWriter
from mgie.config import (
    DIFFUSION_PARTS,
    MLLM_PARTS,
    TEXT_PARTS,
    BundleConfig,
    EditSettings,
    GenerationConfig,
    Provenance,
)
from mgie.model.edit_head import EditHead
from mgie.model.tokenizer_training import clip_tokenizer, llama_tokenizer, t5_tokenizer
from mgie.model.tokens import Tokenizer

_SEED = 20240507
_NUM_PIECES, _NUM_MERGES = 700, 512
_CONDITION_DIM = 64
_NUM_VISUAL_TOKENS = 8
_IMAGE_SIDE, _PATCH_SIDE = 112, 14
_TEXT_LENGTH = 77  # positions of CLIP's text encoder
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"Stable Diffusion's noise schedule"
_SCHEDULER = {
    "_class_name": EulerAncestralDiscreteScheduler.__name__,
    **BETAS,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
_WORK: dict[str, Any] = {"work_area_px": 128 * 128, "multiple_px": 16, "defaults": EditSettings(steps=20)}
_PROVENANCE = Provenance(
    made_by="mgie.tiny", sources=("random weights",), data="none: not trained", licences=("Apache-2.0",)
)


def clip_pixels(side_px: int) -> dict[str, Any]:
    """CLIP's preprocessing of images, as its `preprocessor_config.json` says it, at this side."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": side_px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side_px, "width": side_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }


def build(name: str, out: Path) -> None:
    """Writes the untrained bundle `name` (random, random-ip2p, random-summarizer) to `out`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        builders = {"random": _build_mgie, "random-ip2p": _build_ip2p, "random-summarizer": _build_summarizer}
        builders[name](out)


def _build_mgie(out: Path) -> None:
    tokenizer = build_tokenizer().with_visual_tokens(_NUM_VISUAL_TOKENS)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=_IMAGE_SIDE,
            patch_size=_PATCH_SIDE,
        )
    )
    llm = new_llm(tokenizer, num_layers=4, num_heads=4)
    projector = nn.Linear(96, 192)
    head = EditHead(
        llm_dim=192, condition_dim=_CONDITION_DIM, width=128, num_queries=32, num_layers=2, feedforward_dim=256
    )
    unet, vae = _new_unet(), _new_vae()
    config = BundleConfig(
        name="random",
        parts=(*MLLM_PARTS, *DIFFUSION_PARTS),
        trained=False,
        provenance=_PROVENANCE,
        num_visual_tokens=_NUM_VISUAL_TOKENS,
        dimensions={
            "llm_hidden": 192,
            "llm_layers": 4,
            "vocabulary": tokenizer.vocab_size,
            "image_patches": (_IMAGE_SIDE // _PATCH_SIDE) ** 2,
            "condition_tokens": 32,
            "condition_dim": _CONDITION_DIM,
        },
        **_WORK,
        generation=GenerationConfig(max_new_tokens=48),
    )
    with BundleWriter(out, config) as writer:
        writer.add_tokenizer(tokenizer)
        writer.add_pretrained("vision", clip)
        writer.add_clip_pixels(clip_pixels(_IMAGE_SIDE))
        writer.add_projector(projector.state_dict())
        writer.add_pretrained("llm", llm)
        writer.add_edit_head(head.config, head.state_dict())
        add_diffusion(writer, unet, vae, _SCHEDULER)


def _build_ip2p(out: Path) -> None:
    tokenizer = clip_tokenizer(corpus_lines(), _NUM_MERGES)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_CONDITION_DIM,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=_TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet, vae = _new_unet(), _new_vae()
    config = BundleConfig(
        name="random-ip2p",
        parts=(*TEXT_PARTS, *DIFFUSION_PARTS),
        trained=False,
        provenance=_PROVENANCE,
        conditioner="text",
        num_visual_tokens=0,
        dimensions={"vocabulary": len(tokenizer), "condition_tokens": _TEXT_LENGTH, "condition_dim": _CONDITION_DIM},
        **_WORK,
    )
    with BundleWriter(out, config) as writer:
        writer.add_pretrained("text_encoder", encoder, tokenizer=tokenizer)
        add_diffusion(writer, unet, vae, _SCHEDULER)


def new_llm(tokenizer: Tokenizer, *, num_layers: int, num_heads: int) -> LlamaForCausalLM:
    """A small LLaMA with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    )


def _new_unet() -> UNet2DConditionModel:
    """The UNet of both editors."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_CONDITION_DIM,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _new_vae() -> AutoencoderKL:
    """The VAE of both editors."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def add_diffusion(
    writer: BundleWriter, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: dict[str, Any]
) -> None:
    """Writes the parts of an editor's second half."""
    writer.add_pretrained("unet", unet)
    writer.add_pretrained("vae", vae)
    writer.add_scheduler(scheduler)


def _build_summarizer(out: Path) -> None:
    folder_config = BundleConfig(
        name="random-summarizer", parts=("summarizer",), trained=False, provenance=_PROVENANCE, num_visual_tokens=0
    )
    with BundleWriter(out, folder_config) as writer:
        folder = writer.folder("summarizer")
        tokenizer = t5_tokenizer(corpus_lines(), _NUM_PIECES, folder)
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        )
        writer.add_pretrained("summarizer", model, tokenizer=tokenizer)


def build_tokenizer() -> Tokenizer:
    """A LLaMA-like tokenizer over the corpus."""
    return llama_tokenizer(corpus_lines(), _NUM_PIECES)


def corpus_lines() -> list[str]:
    """A little English, in sentences, that the embedded models' tokenizers are made from."""
    return resources.files("mgie.bundle").joinpath("corpus.txt").read_text(encoding="utf-8").splitlines()
