"""Configuration records: defaults, meaning, and the checks between fields.

Frozen, keyword-only. Knows no torch and no files; `checkpoint.py` stores `BundleConfig` as
`bundle.json`. Modules receive plain values from here, never a whole configuration.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mgie.errors import BundleError, ConfigError

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
    """Raises ConfigError naming `name`, the value and the range unless low <= value <= high."""
    # NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r:.80}; it must be {low} to {high}", param=name)


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
        if self.stop not in get_args(StopRule):
            raise ConfigError(f"stop is {self.stop!r}; it must be one of {get_args(StopRule)}", param="stop")


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

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}", param="sampler")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise ConfigError(f"steps is {self.steps!r}; it must be a whole number", param="steps")
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

    def require(self, parts: Sequence[Part]) -> None:
        """Raises BundleError naming the missing ones unless all `parts` are present."""
        missing = [part for part in parts if part not in self.parts]
        if missing:
            raise BundleError(f"bundle {self.name!r} has no {', '.join(missing)}; it holds {', '.join(self.parts)}")
