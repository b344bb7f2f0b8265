"""Configuration records: defaults, meaning, and the checks between fields.

Frozen, keyword-only. Knows no torch and no files; `bundle/` stores `BundleConfig` as
`bundle.json`. Modules receive plain values from here, never a whole configuration.
"""

import dataclasses
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

from mgie.errors import BundleError, ConfigError

SOFTWARE = "MGIE"
_MAX_RANDOM_SEED = 2**32  # short enough to read out and type in again
MAX_RESULTS, MAX_PREVIEWS = 10, 10  # of one edit
KeptDtype = Literal["keep", "float32", "float16", "bfloat16"]
CacheKind = Literal["vae_moments", "clip_features"]
WeightKind = Literal["ema", "raw"]

Sampler = Literal["euler_ancestral", "ddim", "dpmpp_2m"]
StopRule = Literal["visual_tokens", "eos"]
ConditionerKind = Literal["mllm", "text"]
Part = Literal[
    "tokenizer", "vision", "projector", "llm", "edit_head",
    "text_encoder", "unet", "vae", "scheduler", "summarizer",
]  # fmt: skip

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
PARTS: tuple[Part, ...] = get_args(Part)
MLLM_PARTS: tuple[Part, ...] = ("tokenizer", "vision", "projector", "llm", "edit_head")
TEXT_PARTS: tuple[Part, ...] = ("text_encoder",)
DIFFUSION_PARTS: tuple[Part, ...] = ("unet", "vae", "scheduler")

FORMAT_VERSION = 1  # of `bundle.json`
MAX_STEPS = 1000  # the noise schedule has 1000 training steps; more cannot be distinct
MAX_GUIDANCE_SCALE = 50.0
MAX_SEED = 2**63 - 1
MAX_INSTRUCTION_CHARS = 4000  # cut off before tokenising; the model's own limit is in tokens


def check_range(name: str, value: object, low: float, high: float) -> None:
    """Raises ConfigError naming `name`, the value and the range unless low <= value <= high.

    Where `low` is an int, the value must be whole; numpy's numbers are numbers.
    """
    is_whole = isinstance(low, int)
    is_number = isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)
    if not is_number or not low <= cast(float, value) <= high:  # NaN fails every comparison
        kind = "a whole number, " if is_whole and not is_number else ""
        raise ConfigError(f"{name} is {value!r:.80}; it must be {kind}{low} to {high}", param=name)


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ConfigError naming `name`, the value and what is allowed unless it is one of these."""
    if value not in (allowed := tuple(allowed)):
        raise ConfigError(f"{name} is {value!r:.80}; it must be one of {', '.join(allowed)}", param=name)


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an input image may be; checked before its pixels are decoded."""

    max_bytes: int = 20 * 2**20
    "encoded size, bytes"
    max_pixels: int = 40_000_000
    "width x height"
    min_side_px: int = 16
    "shorter side"
    max_side_px: int = 16_384
    "longer side"


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How the MLLM writes the expressive instruction (defaults: the published demo)."""

    max_new_tokens: int = 96
    "upper limit of generated tokens, visual tokens included"
    no_repeat_ngram_size: int = 3
    "no n-gram of this size twice, counted over prompt and output; 0 = off"
    stop: StopRule = "visual_tokens"
    "stop a row as soon as its visual-token states are known, or only at end of sequence"

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, 1, 4096)
        check_range("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 64)
        check_choice("stop", self.stop, get_args(StopRule))


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How one edit is sampled. A bundle carries its defaults; a request overrides fields."""

    sampler: Sampler = "euler_ancestral"
    "sampling algorithm"
    steps: int = 100
    "denoising steps"
    guidance_scale: float = 7.5
    "text guidance s_T; 1 = off"
    image_guidance_scale: float = 1.5
    "image guidance s_I; 1 = off"
    square_crop: bool = False
    "crop to the centre square as the published pipeline does, instead of keeping the framing"
    detail_transfer: bool = False
    "make the change to the source's own pixels, instead of scaling the model's picture up"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if hasattr(value, "item"):  # numpy's numbers become Python's, which JSON can hold
                object.__setattr__(self, name, value.item())
        for name in ("square_crop", "detail_transfer"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is {value!r:.80}; it must be True or False", param=name)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_range("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        check_range("image_guidance_scale", self.image_guidance_scale, 0.0, MAX_GUIDANCE_SCALE)

    def override(self, **given: Any) -> "EditSettings":
        """A copy with the given fields replaced; `None` means "not given" and keeps the default.

        Raises:
            ConfigError: A name is not a field, or a value is out of range.
        """
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}", param=unknown[0])
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


class EditOverrides(TypedDict, total=False):
    """Fields of `EditSettings` that one edit is given; the others are its bundle's defaults."""

    steps: int
    "denoising steps"
    guidance_scale: float
    "how strongly to follow the words"
    image_guidance_scale: float
    "how strongly to keep to the source"
    sampler: Sampler
    "sampling algorithm"
    square_crop: bool
    "crop to the centre square as the published pipeline does"
    detail_transfer: bool
    "make the change to the photo's own pixels, so that what is not edited stays sharp"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle."""

    sha256: str
    "hex digest of the content"
    size: int
    "bytes"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a bundle comes from; shown by `mgie info` and stored with every result."""

    made_by: str
    "program and version that wrote the bundle"
    sources: tuple[str, ...] = ()
    "names of the checkpoints or recipes it was made from (no machine paths)"
    data: str = ""
    "training data"
    licences: tuple[str, ...] = ()
    "licence notices that go with the weights"


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """`bundle.json`: what a bundle holds and how to use it."""

    name: str
    "short name, shown in /v1/models"
    parts: tuple[Part, ...]
    "the parts present, each in the subfolder of its name"
    trained: bool
    "false: random weights, every surface says so"
    provenance: Provenance
    conditioner: ConditionerKind = "mllm"
    "what turns words into conditioning: `mllm` (LLaVA + edit head) or `text` (CLIP text encoder)"
    num_visual_tokens: int = 8
    "N of [IMG0]..[IMG<N-1>]; 0 for a LLaVA alone"
    vision_select_layer: int = -2
    "hidden layer of the vision tower that LLaVA reads"
    sees_image: bool = True
    "false: a text-only LLM, the paper's LGIE; `vision` and `projector` are not used"
    makes_change: bool = False
    "true: the diffusion model makes the difference of goal and source latents, not the goal's"
    dimensions: Mapping[str, int] = field(default_factory=dict)
    "sizes worth showing; each part's own configuration is what counts"
    work_area_px: int = 512 * 512
    "area in pixels at which the diffusion model works"
    multiple_px: int = 64
    "work sides are multiples of this"
    defaults: EditSettings = EditSettings()
    "sampling defaults"
    generation: GenerationConfig = GenerationConfig()
    "text generation defaults"
    examples: tuple[str, ...] = ()
    "instructions that it can follow, for people who want to try it"
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    "every other file of the bundle, by relative path"
    format_version: int = FORMAT_VERSION
    "changes whenever an older program could not read the bundle"

    def __post_init__(self) -> None:
        bad = [part for part in self.parts if part not in PARTS]
        if bad or not self.parts:
            raise BundleError(f"bundle {self.name!r} lists parts {list(self.parts)}; known parts: {', '.join(PARTS)}")
        if self.conditioner not in get_args(ConditionerKind):
            raise BundleError(f"bundle {self.name!r} has conditioner {self.conditioner!r}; known: mllm, text")
        if self.format_version != FORMAT_VERSION:
            raise BundleError(
                f"bundle {self.name!r} has format version {self.format_version}; this program reads {FORMAT_VERSION}"
            )

    @property
    def training_side_px(self) -> int:
        """Side of the training images where none is asked for: 256 as published, less for a smaller work area."""
        return min(256, math.isqrt(self.work_area_px) // 8 * 8)

    def require(self, parts: Sequence[Part]) -> None:
        """Raises BundleError naming the missing ones unless all `parts` are present."""
        missing = [part for part in parts if part not in self.parts]
        if missing:
            raise BundleError(f"bundle {self.name!r} has no {', '.join(missing)}; it holds {', '.join(self.parts)}")


# ---- training

Variant = Literal["e2e", "lgie", "ft", "ip2p", "fz"]
ComputeDtype = Literal["float32", "bfloat16", "float64"]
Sharding = Literal["ddp", "fully_shard"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rates and what is done to gradients and weights around it (defaults: the paper)."""

    lr_tokens: float = 5e-4
    "peak learning rate of word embeddings and LM head"
    lr_edit_head: float = 5e-4
    "peak learning rate of the edit head"
    lr_unet: float = 1e-4
    "peak learning rate of the UNet"
    lr_llm: float = 0.0
    "peak learning rate of the LLM's blocks and last norm; 0 = frozen, as published"
    lr_text_encoder: float = 0.0
    "peak learning rate of the text encoder of ft and ip2p; 0 = frozen, as published"
    beta1: float = 0.9
    "decay of the first moment"
    beta2: float = 0.999
    "decay of the second moment"
    eps: float = 1e-8
    "added to the root of the second moment"
    weight_decay: float = 0.0
    "decoupled weight decay, of matrices only"
    warmup: float = 0.03
    "share of all steps in which the learning rate rises from 0"
    max_grad_norm: float = 1.0
    "gradients are scaled down to this norm over all of them; 0 = never"
    ema_decay: float = 0.999
    "decay of the moving average of the trained weights; 0 = none is kept"

    def __post_init__(self) -> None:
        for name in ("lr_tokens", "lr_edit_head", "lr_unet", "lr_llm", "lr_text_encoder", "weight_decay"):
            check_range(name, getattr(self, name), 0.0, 10.0)
        for name in ("beta1", "beta2", "ema_decay", "warmup"):
            check_range(name, getattr(self, name), 0.0, 0.999999)
        check_range("eps", self.eps, 0.0, 1.0)
        check_range("max_grad_norm", self.max_grad_norm, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: `instruction_weight * L_ins + edit_weight * L_edit` (defaults: the paper)."""

    instruction_weight: float = 1.0
    "weight of the language loss; 0 = the paper's ablation without it"
    edit_weight: float = 0.5
    "weight of the diffusion loss beside the language loss"
    condition_dropout: float = 0.05
    "share of samples that lose the text, that lose the image, and that lose both: each"
    min_snr_gamma: float = 0.0
    "weights timesteps by min(SNR, gamma); 0 = all alike, as published (5 is usual)"
    timestep_shift: float = 1.0
    "moves timesteps to higher noise: t becomes s t / (1 + (s - 1) t), t in [0, 1]; 1 = uniform, as published"
    change_weight: float = 0.0
    "how much more the error counts where source and goal latents differ; 0 = everywhere alike, as published"

    def __post_init__(self) -> None:
        check_range("instruction_weight", self.instruction_weight, 0.0, 1000.0)
        check_range("edit_weight", self.edit_weight, 0.0, 1000.0)
        check_range("condition_dropout", self.condition_dropout, 0.0, 1 / 3)
        check_range("min_snr_gamma", self.min_snr_gamma, 0.0, 1000.0)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100.0)
        check_range("change_weight", self.change_weight, 0.0, 1000.0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes made to source and goal alike. Not with caches."""

    crop: float = 0.0
    "crops keep at least 1 - crop of the side; 0 = off"
    flip: float = 0.0
    "share of samples mirrored; never those whose words say left or right"

    def __post_init__(self) -> None:
        check_range("crop", self.crop, 0.0, 0.9)
        check_range("flip", self.flip, 0.0, 1.0)

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.crop > 0 or self.flip > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the numbers of a training run, but for data and starting weights."""

    variant: Variant = "e2e"
    "e2e: MGIE; lgie: its LLM does not see the image; ft, ip2p: UNet alone on CLIP's embedding of the expressive or the brief instruction; fz: nothing trains, for comparison"
    steps: int = 1000
    "optimiser steps"
    global_batch: int = 32
    "samples per step, over all workers"
    micro_batch: int = 8
    "samples at a time on one device; gradients are accumulated"
    seed: int = 0
    "decides order, noise, timesteps, dropout and augmentation"
    image_side_px: int = 0
    "side of the square training images; 0 = that of the bundle, at most 256"
    max_length: int = 512
    "tokens of a row; longer ones are cut"
    dtype: ComputeDtype = "float32"
    "bfloat16 computes in it, with weights and optimiser in float32"
    gradient_checkpointing: bool = False
    "recompute blocks in the backward pass: less memory, about a third more time"
    compile: bool = False
    "torch.compile each block of LLM and UNet"
    channels_last: bool = False
    "memory layout of the UNet's convolutions"
    sharding: Sharding = "ddp"
    "fully_shard: split the trained weights and their optimiser over the workers, where memory is short"
    max_skipped: int = 10
    "stop after this many steps in a row whose loss or gradient was not finite; such steps change nothing"
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("dtype", self.dtype, get_args(ComputeDtype))
        check_choice("sharding", self.sharding, get_args(Sharding))
        check_range("steps", self.steps, 0, 10**9)
        check_range("global_batch", self.global_batch, 1, 10**6)
        check_range("micro_batch", self.micro_batch, 1, 10**6)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("max_length", self.max_length, 16, 10**6)
        check_range("max_skipped", self.max_skipped, 1, 10**6)
        if self.image_side_px % 8:
            raise ConfigError(
                f"image_side_px is {self.image_side_px}; it must be a multiple of 8", param="image_side_px"
            )


def random_seed() -> int:
    """A seed for an edit that gave none."""
    return secrets.randbelow(_MAX_RANDOM_SEED)


def vae_downsampling(config: Mapping[str, Any]) -> int:
    """Image pixels per latent side, of a VAE with this configuration of diffusers: 8 for Stable Diffusion.

    A VAE that takes 3 p^2 channels sees each block of p x p pixels as one position.
    """
    return int(2 ** (len(config["block_out_channels"]) - 1)) * math.isqrt(int(config["in_channels"]) // 3)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Folders of published weights. Which are given decides what the bundle will be.

        llava, clip, stable_diffusion, mgie     the published MGIE
        llava, clip, stable_diffusion           a fresh MGIE to train: the edit head is random
        llava, clip                             LLaVA alone: it describes images, it edits none
        stable_diffusion                        InstructPix2Pix alone
        summarizer                              T5 alone; it may also go beside any of the above

    Any other combination is refused.
    """

    llava: Path | None = None
    "merged LLaVA-7B-v1: config.json, tokenizer.model, added_tokens.json, pytorch_model-*.bin"
    clip: Path | None = None
    "the vision tower that LLaVA names, openai/clip-vit-large-patch14: config.json, preprocessor_config.json, weights"
    stable_diffusion: Path | None = None
    "Stable Diffusion 1.5 or InstructPix2Pix in the diffusers layout: unet/, vae/, scheduler/"
    mgie: Path | None = None
    "the published mgie_7b: mllm.pt and unet.pt"
    summarizer: Path | None = None
    "a T5 in the transformers layout, e.g. google/flan-t5-xxl"

    def given(self) -> dict[str, Path]:
        """The folders given, by field name."""
        return {name: path for name, path in vars(self).items() if path is not None}
