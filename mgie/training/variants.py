"""A bundle and a training configuration -> the model that trains, and what makes its batches.

Here the paper's variants part: which model, which words, what it sees. Knows nothing of optimisers or data sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch._dynamo
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mgie.bundle.bundle import Bundle
from mgie.bundle.devices import resolve_device
from mgie.bundle.record import encoder_identity
from mgie.config import CacheKind, TrainingConfig, Variant
from mgie.data.collate import ConversationCollator, EncoderCollator
from mgie.data.examples import Examples
from mgie.data.latent_reader import LatentCache
from mgie.data.loader import BatchMaker
from mgie.errors import ConfigError
from mgie.images.geometry import PUBLISHED_SIDE_PX
from mgie.images.pixels import ClipPixels
from mgie.model.diffusion import NoiseSchedule
from mgie.model.mgie import MGIE, InstructPix2Pix, LatentDiffusion

_TEXT_VARIANTS: tuple[Variant, ...] = ("ft", "ip2p", "fz")


@dataclass(frozen=True, kw_only=True)
class TrainingModel:
    """A model with what its batches must fit."""

    model: LatentDiffusion
    "on its device; what trains is float32 at least"
    collate: ConversationCollator | EncoderCollator
    clip_pixels: ClipPixels | None
    image_side_px: int
    latent_shape: tuple[int, int, int]

    def batch_maker(
        self,
        sources: Sequence[Examples],
        config: TrainingConfig,
        *,
        moments: LatentCache | None = None,
        features: LatentCache | None = None,
    ) -> BatchMaker:
        """Makes this model's micro-batches of the sources' rows."""
        return BatchMaker(
            sources,
            collate=self.collate,
            clip_pixels=self.clip_pixels,
            image_side_px=self.image_side_px,
            latent_shape=self.latent_shape,
            num_timesteps=self.model.schedule.num_timesteps,
            seed=config.seed,
            augment=config.augment,
            moments=moments,
            features=features,
        )


def training_side_px(bundle: Bundle, config: TrainingConfig) -> int:
    """Side of the training images: as configured, else that of the bundle."""
    return config.image_side_px or bundle.config.training_side_px


def check_variant(bundle: Bundle, variant: Variant) -> None:
    """Raises ConfigError unless the bundle is of the kind (`mllm` or `text`) that the variant trains."""
    kind = "text" if variant in _TEXT_VARIANTS else "mllm"
    if kind != bundle.config.conditioner:
        raise ConfigError(
            f"variant {variant} trains a bundle with conditioner {kind!r}; "
            f"{bundle.config.name!r} has {bundle.config.conditioner!r}",
            param="variant",
        )


def load_training_model(bundle: Bundle, config: TrainingConfig, *, device: str = "auto") -> TrainingModel:
    """The variant's model, with the right parts frozen, ready to be trained.

    Raises:
        BundleError: The bundle lacks parts of this variant, or they are damaged or do not fit each other.
        ConfigError: The bundle is of the other kind (`mllm` or `text`), or the side does not suit the VAE.
    """
    target = resolve_device(device)
    check_variant(bundle, config.variant)
    side_px = training_side_px(bundle, config)
    make = _text_model if config.variant in _TEXT_VARIANTS else _mllm_model
    model, collate, clip_pixels = make(bundle, config)
    optimizer = config.optimizer
    model.freeze(trains_language=bool(optimizer.lr_llm if isinstance(model, MGIE) else optimizer.lr_text_encoder))
    if config.variant == "fz":
        model.requires_grad_(requires_grad=False)
    if config.dtype == "float64":
        model.double()
    assert all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.requires_grad)
    model.to(target)
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    if isinstance(model, MGIE):
        # Keys and values of a shared prefix are neither kept by recomputed blocks nor of one shape for compiled ones.
        # And float64 is for comparing runs: LLaMA's norms round to float32 whatever goes in, so gradients that are
        # added up before them would round by who shares a micro-batch.
        model.shares_prefix = not (config.gradient_checkpointing or config.compile or config.dtype == "float64")
    if config.gradient_checkpointing:
        _recompute_blocks(model)
    if config.compile:
        parts = _blocks(model)
        # Blocks of one class share their code, and each size of block is compiled anew: past the limit they would
        # stay as they are, with no more than a warning.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(parts))  # noqa: SLF001
        for block in parts:
            # Latents always have the same size: general shapes would only cost the UNet speed. Rows of words vary.
            block.compile(dynamic=None if isinstance(block, LlamaDecoderLayer) else False)
    latent_side = side_px // model.vae.downsampling
    if side_px % model.vae.downsampling:
        raise ConfigError(
            f"image_side_px is {side_px}; the VAE needs a multiple of {model.vae.downsampling}", param="image_side_px"
        )
    return TrainingModel(
        model=model,
        collate=collate,
        clip_pixels=clip_pixels,
        image_side_px=side_px,
        latent_shape=(int(model.vae.autoencoder.config.latent_channels), latent_side, latent_side),
    )


def open_caches(
    folder_of: Callable[[CacheKind], Path | None], bundle: Bundle, sources: Sequence[Examples], side_px: int
) -> dict[CacheKind, LatentCache]:
    """The caches that there are, checked to be of this bundle's encoders and to hold every row.

    Raises:
        DataError: One is of another encoder or image size, or lacks rows.
    """
    caches: dict[CacheKind, LatentCache] = {}
    kinds: tuple[CacheKind, ...] = ("vae_moments", "clip_features")
    for kind in kinds:
        folder = folder_of(kind)
        if folder is None:
            continue
        caches[kind] = LatentCache.open(
            folder,
            kind=kind,
            encoder=encoder_identity(bundle, kind),
            image_side_px=side_px if kind == "vae_moments" else PUBLISHED_SIDE_PX,
            ids=np.concatenate([source.ids for source in sources]),
        )
    return caches


def _mllm_model(
    bundle: Bundle, config: TrainingConfig
) -> tuple[MGIE | InstructPix2Pix, ConversationCollator | EncoderCollator, ClipPixels | None]:
    seen = bundle.without_vision() if config.variant == "lgie" else bundle
    # Steps of a usual learning rate are below what bfloat16 tells apart: what trains is float32.
    is_rounded = config.dtype == "bfloat16" and not config.optimizer.lr_llm
    model = seen.load_mgie(device="cpu", dtype="bfloat16" if is_rounded else "float32")
    model.objective = config.objective
    num_patches = model.mllm.num_patches
    collate = ConversationCollator(seen.load_tokenizer(), num_patches=num_patches, max_length=config.max_length)
    return model, collate, seen.load_clip_pixels() if num_patches else None


def _text_model(
    bundle: Bundle, config: TrainingConfig
) -> tuple[MGIE | InstructPix2Pix, ConversationCollator | EncoderCollator, ClipPixels | None]:
    tokenizer, encoder = bundle.load_text_encoder()
    collate = EncoderCollator(
        tokenizer,
        length=int(encoder.config.max_position_embeddings),
        which="instruction" if config.variant == "ip2p" else "expressive",
    )
    model = InstructPix2Pix(
        text_encoder=encoder,
        null_ids=collate.encode([""]).input_ids,
        unet=bundle.load_unet(),
        vae=bundle.load_vae(),
        schedule=NoiseSchedule(bundle.scheduler_config()),
        objective=config.objective,
    )
    return model, collate, None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of LLM and UNet: units of compilation."""
    unet = cast(Any, model).unet
    found: list[nn.Module] = [
        inner
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        if block is not None
        for inner in [*block.resnets, *(getattr(block, "attentions", None) or [])]
    ]
    if hasattr(model, "mllm"):
        found += list(cast(Any, model).mllm.llm.model.layers)
    return found


def _recompute_blocks(model: nn.Module) -> None:
    """Switches recomputation of blocks in the backward pass on, in LLM and UNet."""
    cast(Any, model).unet.enable_gradient_checkpointing()
    if hasattr(model, "mllm"):
        options = {"use_reentrant": False}
        cast(Any, model).mllm.llm.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
