"""Loads the parts of a bundle, strictly and each alone; nobody else touches its weight files. Nothing is unpickled."""

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgie.bundle.devices import resolve_device, resolve_dtype
from mgie.bundle.record import (
    PART_CONFIG_FILE,
    PREPROCESSOR_FILE,
    VISION_PARTS,
    WEIGHTS_FILE,
    BundleRecord,
    required_parts,
)
from mgie.bundle.resolve import locate_bundle
from mgie.bundle.weights import _load_safetensors, load_strictly
from mgie.bundle.writer import quiet
from mgie.config import DIFFUSION_PARTS
from mgie.errors import BundleError, ConfigError
from mgie.images.pixels import ClipPixels
from mgie.inference.conditioner import Conditioner, MLLMConditioner, TextConditioner
from mgie.inference.renderer import Renderer
from mgie.model.diffusion import LatentVAE, NoiseSchedule
from mgie.model.edit_head import EditHead
from mgie.model.mgie import MGIE
from mgie.model.mllm import MLLM, VisionTower
from mgie.model.tokens import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

# What transformers and diffusers raise for configurations and weights that make no model.
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
_LOADING = threading.RLock()


def _one_at_a_time(load: Callable[P, T]) -> Callable[P, T]:
    """While diffusers loads weights it makes every new parameter of the process one without data, in all threads."""

    @functools.wraps(load)
    def loads(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOADING:
            return load(*args, **kwargs)

    return loads


class Bundle(BundleRecord):
    """A bundle with its parts, each loaded on demand, so that a stage never loads what it does not use."""

    @classmethod
    def of(cls, record: BundleRecord) -> "Bundle":
        """The bundle of a record."""
        return cls(record.root, fetch=record.fetch)

    def without_vision(self) -> "Bundle":
        """The same bundle with an LLM that does not see the image: the paper's LGIE."""
        blind = copy.copy(self)
        blind.config = dataclasses.replace(self.config, sees_image=False)
        return blind

    @_one_at_a_time
    def load_conditioner(self, *, device: str = "auto", dtype: str = "auto") -> Conditioner:
        """The first half of an edit, by `conditioner` of the configuration.

        Raises:
            BundleError: Its parts are missing, damaged or do not fit each other.
        """
        target = resolve_device(device)
        weights = resolve_dtype(dtype, target)
        self.verify(required_parts(self.config), hashes=False)
        if self.config.conditioner == "text":
            tokenizer, encoder = self.load_text_encoder(weights)
            return TextConditioner(tokenizer=tokenizer, encoder=encoder.to(target), bundle=self.identity)
        tokenizer = self.load_tokenizer()
        mllm, edit_head = self.load_mllm(tokenizer, weights), self.load_edit_head()
        clip_pixels = None
        if mllm.vision is not None:
            clip_pixels, side = self.load_clip_pixels(), mllm.vision.clip.config.image_size
            _check_fit("CLIP preprocessing", clip_pixels.side_px, "the vision tower", side)
        _check_fit("the edit head", edit_head.config["llm_dim"], "the LLM", mllm.llm.config.hidden_size)
        return MLLMConditioner(
            tokenizer=tokenizer,
            clip_pixels=clip_pixels,
            mllm=mllm.to(target),
            edit_head=edit_head.to(target, weights),
            generation=self.config.generation,
            bundle=self.identity,
        )

    @_one_at_a_time
    def load_renderer(self, *, device: str = "auto", dtype: str = "auto") -> Renderer:
        """The second half of an edit: UNet and VAE only.

        Raises:
            BundleError: Its parts are missing, damaged or do not fit each other.
        """
        target = resolve_device(device)
        weights = resolve_dtype(dtype, target)
        self.verify(DIFFUSION_PARTS, hashes=False)
        unet, vae = self.load_unet(weights), self.load_vae()
        _check_fit(
            "half the UNet's input", unet.config.in_channels // 2, "the VAE", vae.autoencoder.config.latent_channels
        )
        return Renderer(
            unet=unet.to(target),
            # The VAE stays in float32: half precision shows as banding, and it is a small share of the work.
            vae=vae.to(target),
            scheduler_config=self.scheduler_config(),
            work_area_px=self.config.work_area_px,
            multiple_px=self.config.multiple_px,
        )

    @_one_at_a_time
    def load_mgie(self, *, device: str = "auto", dtype: str = "float32") -> MGIE:
        """The whole model for training, with the right parts frozen.

        Args:
            dtype: Number format of the frozen parts of the MLLM; the VAE and what trains are float32.

        Raises:
            BundleError: Parts are missing, damaged or do not fit each other.
        """
        target = resolve_device(device)
        frozen = resolve_dtype(dtype, target)
        self.verify((*required_parts(self.config), *DIFFUSION_PARTS), hashes=False)
        # As stored: what trains must not be rounded on the way to float32.
        mllm = self.load_mllm(self.load_tokenizer(), None if frozen != torch.float32 else frozen)
        edit_head, unet = self.load_edit_head(), self.load_unet()
        _check_fit("the edit head", edit_head.config["llm_dim"], "the LLM", mllm.llm.config.hidden_size)
        _check_fit("the edit head", edit_head.config["condition_dim"], "the UNet", unet.config.cross_attention_dim)
        mllm.llm.model.embed_tokens.float()
        mllm.llm.lm_head.float()
        for part in (mllm.vision, mllm.projector, mllm.llm.model.layers, mllm.llm.model.norm):
            if part is not None:
                part.to(frozen)
        mgie = MGIE(
            mllm=mllm,
            edit_head=edit_head,
            unet=unet,
            vae=self.load_vae(),
            schedule=NoiseSchedule(self.scheduler_config()),
            num_visual_tokens=self.config.num_visual_tokens,
        )
        mgie.freeze()
        return mgie.to(target)

    @_one_at_a_time
    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> tuple[CLIPTokenizer, CLIPTextModel]:
        """The `text_encoder` part, on the CPU, not training.

        Raises:
            BundleError: It is missing or damaged, or its tokenizer is of another size.
        """
        self.verify(("text_encoder",), hashes=False)
        encoder = _load_pretrained(CLIPTextModel, self.root / "text_encoder", dtype)
        tokenizer = _load_pretrained_tokenizer(CLIPTokenizer, self.root / "text_encoder")
        if len(tokenizer) != encoder.config.vocab_size:
            raise BundleError(
                f"the text encoder has {encoder.config.vocab_size} word embeddings; "
                f"its tokenizer has {len(tokenizer)} tokens"
            )
        return tokenizer, encoder

    def load_tokenizer(self) -> Tokenizer:
        """The `tokenizer` part.

        Raises:
            BundleError: It is missing, damaged, or has another number of visual tokens than the bundle says.
        """
        self.verify(("tokenizer",), hashes=False)
        tokenizer = Tokenizer.load(self.root / "tokenizer")
        if len(tokenizer.visual_ids) != self.config.num_visual_tokens:
            raise BundleError(
                f"the tokenizer has {len(tokenizer.visual_ids)} visual tokens; "
                f"bundle {self.config.name!r} says {self.config.num_visual_tokens}"
            )
        return tokenizer

    def load_clip_pixels(self) -> ClipPixels:
        """The image preprocessing of the `vision` part.

        Raises:
            BundleError: It is missing or damaged.
        """
        self.verify(("vision",), hashes=False)
        try:
            return ClipPixels(self.read_json("vision", PREPROCESSOR_FILE))
        except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BundleError(f"vision/{PREPROCESSOR_FILE} cannot be used: {error}") from error

    @_one_at_a_time
    def load_vision(self, dtype: torch.dtype | None = torch.float32) -> VisionTower:
        """The `vision` part, on the CPU, not training.

        Raises:
            BundleError: It is missing or damaged, or has no such layer as the bundle selects.
        """
        self.verify(("vision",), hashes=False)
        clip = _load_pretrained(CLIPVisionModel, self.root / "vision", dtype)
        return VisionTower(clip, self.config.vision_select_layer).eval()

    @_one_at_a_time
    def load_mllm(self, tokenizer: Tokenizer, dtype: torch.dtype | None = torch.float32) -> MLLM:
        """LLM, and where it sees the image vision tower and projector; on the CPU, not training.

        Args:
            dtype: None = as stored.

        Raises:
            BundleError: A part is missing or damaged, or vocabulary and embeddings differ in size.
        """
        self.verify((*(VISION_PARTS if self.config.sees_image else ()), "llm"), hashes=False)
        llm = _load_pretrained(LlamaForCausalLM, self.root / "llm", dtype)
        rows = llm.get_input_embeddings().weight.shape[0]
        if rows != tokenizer.vocab_size:
            raise BundleError(f"the LLM has {rows} word embeddings; the tokenizer has {tokenizer.vocab_size} tokens")
        if not self.config.sees_image:
            return MLLM(None, None, llm, im_patch_id=tokenizer.im_patch_id).eval()
        vision = self.load_vision(dtype)
        weights = _load_safetensors(self.root / "projector" / WEIGHTS_FILE)
        projector = nn.Linear(vision.clip.config.hidden_size, llm.config.hidden_size)
        load_strictly(projector, weights, "projector")
        return MLLM(
            vision, projector if dtype is None else projector.to(dtype), llm, im_patch_id=tokenizer.im_patch_id
        ).eval()

    @_one_at_a_time
    def load_edit_head(self) -> EditHead:
        """The `edit_head` part, float32, on the CPU, not training.

        Raises:
            BundleError: It is missing or damaged.
        """
        self.verify(("edit_head",), hashes=False)
        try:
            head = EditHead(**self.read_json("edit_head", PART_CONFIG_FILE))
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise BundleError(f"edit_head/{PART_CONFIG_FILE} cannot be used: {error}") from error
        load_strictly(head, _load_safetensors(self.root / "edit_head" / WEIGHTS_FILE), "edit_head")
        return head.eval()

    @_one_at_a_time
    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The `unet` part, on the CPU, not training."""
        self.verify(("unet",), hashes=False)
        return _load_pretrained(UNet2DConditionModel, self.root / "unet", dtype)

    @_one_at_a_time
    def load_vae(self) -> LatentVAE:
        """The `vae` part, float32, on the CPU, not training."""
        self.verify(("vae",), hashes=False)
        vae = _load_pretrained(AutoencoderKL, self.root / "vae", torch.float32)
        return LatentVAE(vae, predicts_residual=self.config.makes_change).eval()

    @_one_at_a_time
    def load_summarizer(self, *, device: str = "auto", dtype: str = "auto") -> tuple[T5ForConditionalGeneration, Any]:
        """The `summarizer` part (T5) and its transformers tokenizer.

        Raises:
            ConfigError: dtype is float16, in which T5 overflows.
            BundleError: The part is missing or damaged.
        """
        target = resolve_device(device)
        weights = resolve_dtype(dtype, target)
        if weights == torch.float16:
            if dtype != "auto":
                raise ConfigError("dtype is float16; T5 overflows in it: use bfloat16 or float32", param="dtype")
            weights = torch.float32
        self.verify(("summarizer",), hashes=False)
        model = _load_pretrained(T5ForConditionalGeneration, self.root / "summarizer", weights).to(target)
        return model, _load_pretrained_tokenizer(AutoTokenizer, self.root / "summarizer")


def _check_fit(name: str, size: int, other: str, other_size: int) -> None:
    if size != other_size:
        raise BundleError(f"parts do not fit each other: {name} is of size {size}, {other} of {other_size}")


def _load_pretrained(kind: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A transformers or diffusers model from its folder, strictly, safetensors only, not training; dtype None = as stored."""
    arguments: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if hasattr(kind, "load_config"):  # diffusers; names tensors of another size in its error
        arguments["torch_dtype"] = dtype
    else:  # transformers; names them only in what it returns
        arguments |= {"dtype": dtype or "auto", "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, info = kind.from_pretrained(folder, **arguments)
    except _LOADING_ERRORS as error:
        raise BundleError(f"{folder.name} cannot be loaded: {error}") from error
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise BundleError(f"weights of {folder.name} do not fit: {problems}")
    model.eval()
    return model


def _load_pretrained_tokenizer(kind: Any, folder: Path) -> Any:
    """A transformers tokenizer from its folder; never code that the folder names."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise BundleError(f"the tokenizer in {folder.name} cannot be loaded: {error}") from error


def open_bundle(where: str | Path) -> Bundle:
    """The bundle named, as `locate_bundle` finds it, ready to load its parts.

    Raises:
        BundleError: There is no such bundle, or it cannot be read.
    """
    return Bundle.of(locate_bundle(where))
