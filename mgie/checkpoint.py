"""Bundles: one folder = one model. Writing, checking and loading its parts; nobody else touches weight files.

    bundle.json     `config.BundleConfig`, with sha256 and size of every other file
    <part>/         transformers' or diffusers' own layout, safetensors only

Each part loads alone, so a stage never loads what it does not use. Nothing is unpickled: a bundle that lists
a file of another kind is refused. Knows nothing of where a bundle comes from (`bundles.py`).
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgie.conditioner import Conditioner, MLLMConditioner, TextConditioner
from mgie.config import (
    DIFFUSION_PARTS,
    FORMAT_VERSION,
    MLLM_PARTS,
    TEXT_PARTS,
    BundleConfig,
    EditSettings,
    FileEntry,
    GenerationConfig,
    Part,
    Provenance,
)
from mgie.diffusion import LatentCodec, NoiseSchedule
from mgie.edit_head import EditHead
from mgie.errors import BundleError, ConfigError
from mgie.images import ClipPixels
from mgie.mllm import MLLM, VisionTower
from mgie.model import MGIE
from mgie.renderer import Renderer
from mgie.tokens import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

CONFIG_FILE = "bundle.json"
_WEIGHTS, _PART_CONFIG = "model.safetensors", "config.json"
_PREPROCESSOR, _SCHEDULER = "preprocessor_config.json", "scheduler_config.json"
_VISION_PARTS: tuple[Part, ...] = ("vision", "projector")  # those of MLLM_PARTS that see the image
_ALLOWED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")  # nothing that could be a pickle or a program
_HASH_BLOCK = 1 << 22
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


def resolve_device(device: str = "auto") -> torch.device:
    """The device named, or with `auto` the first of CUDA, MPS, CPU that is there.

    Raises:
        ConfigError: It is no device, or not on this machine.
    """
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, mps, cuda or cuda:N", param="device") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}; this machine has {torch.cuda.device_count()} CUDA devices", param="device"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device is {device!r}; this machine has no MPS device", param="device")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype named, or with `auto` bfloat16 on CUDA (float16 where that is not supported), else float32.

    Raises:
        ConfigError: It is not one of auto, float32, float16, bfloat16.
    """
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in known:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(known)}", param="dtype")
    return known[dtype]


class Bundle:
    """A bundle that is at hand: its configuration, and its parts on demand.

    Args:
        root: Folder with `bundle.json`.
        fetch: Called with the parts about to be loaded, before they are; brings their files to `root`.
    """

    def __init__(self, root: Path, *, fetch: Callable[[Sequence[str]], object] | None = None) -> None:
        self.root = root
        self._fetch = fetch
        try:
            content = (root / CONFIG_FILE).read_bytes()
        except OSError as error:
            raise BundleError(f"{root} is not a bundle: {CONFIG_FILE} cannot be read ({error.strerror})") from error
        self.config = parse_config(content)
        self.identity = hashlib.sha256(content).hexdigest()[:16]
        bad = [name for name in self.config.files if not name.endswith(_ALLOWED_SUFFIXES) or _escapes(name)]
        if bad:
            raise BundleError(
                f"bundle {self.config.name!r} lists {bad[0]!r}; only {', '.join(_ALLOWED_SUFFIXES)} files below it are read"
            )

    def verify(self, parts: Sequence[Part] | None = None, *, hashes: bool = True) -> None:
        """Checks presence and size, and with `hashes` the content, of the parts' files (None = all).

        Raises:
            BundleError: A file is missing or differs from what `bundle.json` says.
        """
        parts = self.config.parts if parts is None else parts
        self.config.require(parts)
        if self._fetch is not None:
            self._fetch(parts)
        for name, entry in self.files(parts).items():
            path = self.root / name
            if not path.is_file():
                raise BundleError(f"bundle {self.config.name!r} lacks {name}, which {CONFIG_FILE} lists")
            if path.stat().st_size != entry.size:
                raise BundleError(
                    f"{name} has {path.stat().st_size} bytes; {CONFIG_FILE} says {entry.size}: copy the bundle again"
                )
            if hashes and (digest := hash_file(path)) != entry.sha256:
                raise BundleError(
                    f"{name} has sha256 {digest}; {CONFIG_FILE} says {entry.sha256}: copy the bundle again"
                )

    def without_vision(self) -> "Bundle":
        """The same bundle with an LLM that does not see the image: the paper's LGIE."""
        blind = copy.copy(self)
        blind.config = dataclasses.replace(self.config, sees_image=False)
        return blind

    def files(self, parts: Sequence[str]) -> dict[str, FileEntry]:
        """The listed files of these parts."""
        return {name: entry for name, entry in self.config.files.items() if name.split("/", 1)[0] in parts}

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
        unet, codec = self.load_unet(weights), self.load_codec()
        _check_fit("half the UNet's input", unet.config.in_channels // 2, "the VAE", codec.vae.config.latent_channels)
        return Renderer(
            unet=unet.to(target),
            # The VAE stays in float32: half precision shows as banding, and it is a small share of the work.
            codec=codec.to(target),
            scheduler_config=self.scheduler_config(),
            work_area_px=self.config.work_area_px,
            multiple_px=self.config.multiple_px,
        )

    @_one_at_a_time
    def load_mgie(self, *, device: str = "auto", dtype: str = "float32") -> MGIE:
        """The whole model for training, with the right parts frozen.

        Args:
            dtype: Of the frozen parts of the MLLM; the VAE and what trains are float32.

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
            codec=self.load_codec(),
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
            return ClipPixels(_read_json(self.root / "vision" / _PREPROCESSOR))
        except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BundleError(f"vision/{_PREPROCESSOR} cannot be used: {error}") from error

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
        self.verify((*(_VISION_PARTS if self.config.sees_image else ()), "llm"), hashes=False)
        llm = _load_pretrained(LlamaForCausalLM, self.root / "llm", dtype)
        rows = llm.get_input_embeddings().weight.shape[0]
        if rows != tokenizer.vocab_size:
            raise BundleError(f"the LLM has {rows} word embeddings; the tokenizer has {tokenizer.vocab_size} tokens")
        if not self.config.sees_image:
            return MLLM(None, None, llm, im_patch_id=tokenizer.im_patch_id).eval()
        vision = self.load_vision(dtype)
        weights = _load_safetensors(self.root / "projector" / _WEIGHTS)
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
            head = EditHead(**_read_json(self.root / "edit_head" / _PART_CONFIG))
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise BundleError(f"edit_head/{_PART_CONFIG} cannot be used: {error}") from error
        load_strictly(head, _load_safetensors(self.root / "edit_head" / _WEIGHTS), "edit_head")
        return head.eval()

    @_one_at_a_time
    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The `unet` part, on the CPU, not training."""
        self.verify(("unet",), hashes=False)
        return _load_pretrained(UNet2DConditionModel, self.root / "unet", dtype)

    @_one_at_a_time
    def load_codec(self) -> LatentCodec:
        """The `vae` part, float32, on the CPU, not training."""
        self.verify(("vae",), hashes=False)
        vae = _load_pretrained(AutoencoderKL, self.root / "vae", torch.float32)
        return LatentCodec(vae, makes_change=self.config.makes_change).eval()

    def scheduler_config(self) -> dict[str, Any]:
        """diffusers' configuration of the noise schedule."""
        self.verify(("scheduler",), hashes=False)
        return _read_json(self.root / "scheduler" / _SCHEDULER)

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


class BundleWriter:
    """Writes a bundle next to its final place and moves it there when complete; on an error nothing is left.

        with BundleWriter(out, config) as writer:
            writer.add_pretrained("llm", llm)

    Args:
        out: The bundle's folder; must not exist, or be an older bundle if `replace`.
        config: `files` is filled in by the writer, `parts` must match what is added.

    Raises:
        BundleError: `out` is taken, or on leaving, the parts added are not those of `config`.
    """

    def __init__(self, out: Path, config: BundleConfig, *, replace: bool = False) -> None:
        self._out, self._config, self._replace = out, config, replace
        if out.exists() and not (replace and ((out / CONFIG_FILE).exists() or not any(out.iterdir()))):
            raise BundleError(f"{out} exists{' and is not a bundle' if replace else ''}; choose another output folder")

    def __enter__(self) -> "BundleWriter":  # noqa: PYI034  # the tests' type checker sees functions without their class
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self._out.name}-", dir=self._out.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def folder(self, part: Part) -> Path:
        """The part's folder, for callers that write its files themselves."""
        folder = self._staging / part
        folder.mkdir(exist_ok=True)
        return folder

    def add_pretrained(self, part: Part, model: Any, *, tokenizer: Any = None) -> None:
        """A transformers or diffusers model in its own layout, with its transformers tokenizer beside it."""
        with _quiet():
            model.save_pretrained(self.folder(part), safe_serialization=True)
            config = json.loads((self.folder(part) / _PART_CONFIG).read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None):  # a folder of the machine that wrote it
                _write_json(self.folder(part) / _PART_CONFIG, config)
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder(part))

    def add_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The `tokenizer` part."""
        tokenizer.save(self.folder("tokenizer"))

    def add_clip_pixels(self, config: Mapping[str, Any]) -> None:
        """The preprocessing of the `vision` part."""
        _write_json(self.folder("vision") / _PREPROCESSOR, config)

    def add_projector(self, weights: Mapping[str, Tensor]) -> None:
        """The `projector` part: `weight` and `bias`."""
        save_file(_contiguous(weights), self.folder("projector") / _WEIGHTS)

    def add_edit_head(self, config: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
        """The `edit_head` part."""
        _write_json(self.folder("edit_head") / _PART_CONFIG, config)
        save_file(_contiguous(weights), self.folder("edit_head") / _WEIGHTS)

    def add_scheduler(self, config: Mapping[str, Any]) -> None:
        """The `scheduler` part."""
        _write_json(self.folder("scheduler") / _SCHEDULER, config)

    def _finish(self) -> None:
        added = sorted(path.name for path in self._staging.iterdir())
        if added != sorted(self._config.parts):
            raise BundleError(f"parts written are {added}; the configuration says {sorted(self._config.parts)}")
        paths = sorted(path for path in self._staging.rglob("*") if path.is_file())
        files = {
            path.relative_to(self._staging).as_posix(): FileEntry(sha256=hash_file(path), size=path.stat().st_size)
            for path in paths
        }
        if bad := [name for name in files if not name.endswith(_ALLOWED_SUFFIXES)]:
            raise BundleError(
                f"{bad[0]} cannot be part of a bundle; only {', '.join(_ALLOWED_SUFFIXES)} files are read"
            )
        config = dataclasses.replace(self._config, files=files)
        _write_json(self._staging / CONFIG_FILE, dataclasses.asdict(config))
        self._staging.chmod(0o755)  # mkdtemp makes it private
        if self._replace and self._out.exists():
            shutil.rmtree(self._out)
        try:
            self._staging.replace(self._out)
        except OSError as error:  # another process wrote it in the meantime: what it finished is not taken away
            raise BundleError(f"{self._out} cannot be put in place: {error.strerror}") from error


def required_parts(config: BundleConfig) -> tuple[Part, ...]:
    """The parts that turn words into conditioning."""
    if config.conditioner == "text":
        return TEXT_PARTS
    return tuple(part for part in MLLM_PARTS if config.sees_image or part not in _VISION_PARTS)


def parse_config(content: bytes) -> BundleConfig:
    """The record in a `bundle.json`.

    Raises:
        BundleError: It is not JSON, or a field is unknown, missing or not allowed.
    """
    try:
        data = json.loads(content)
        # First: a later version may have fields that are unknown here.
        if (version := data.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
            raise BundleError(f"{CONFIG_FILE} has format version {version!r:.80}; this program reads {FORMAT_VERSION}")
        data |= {name: tuple(data[name]) for name in ("parts", "examples") if name in data}
        provenance = data["provenance"]
        data["provenance"] = Provenance(
            made_by=provenance["made_by"],
            sources=tuple(provenance["sources"]),
            data=provenance["data"],
            licences=tuple(provenance["licences"]),
        )
        data["defaults"] = EditSettings(**data["defaults"])
        data["generation"] = GenerationConfig(**data["generation"])
        data["files"] = {name: FileEntry(**entry) for name, entry in data["files"].items()}
        config = BundleConfig(**data)
        _check_types(config)
        for record in (config.provenance, *config.files.values()):
            _check_types(record)
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise BundleError(f"{CONFIG_FILE} cannot be read: {error}") from error
    return config


def _check_types(record: Any) -> None:
    """Raises TypeError unless every plain field of a record read from JSON has the type that it is declared with."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type in (str, int, bool) and type(value) is not field.type:
            raise TypeError(f"{field.name} is {value!r:.80}; it must be a {field.type.__name__}")


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Loads `weights` into `module`.

    Raises:
        BundleError: Keys are missing or unexpected, or sizes differ; all are listed.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if problems := list_misfits(expected, {key: tuple(value.shape) for key, value in weights.items()}):
        raise BundleError(f"weights of {name} do not fit: {'; '.join(problems)}")
    module.load_state_dict(dict(weights))


def list_misfits(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of the `given` shapes from standing in for the `expected` ones, by name."""
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in expected]
    problems += [
        f"{key} has shape {given[key]}, not {shape}"
        for key, shape in expected.items()
        if given.get(key, shape) != shape
    ]
    return problems


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
        with _quiet():
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


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path.parent.name}/{path.name} holds a {type(data).__name__}; it must be an object")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in weights.items()}


def _escapes(name: str) -> bool:
    """Whether a listed file would lie outside the bundle."""
    return name.startswith("/") or "\\" in name or ".." in name.split("/")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars off: a library does not draw on its caller's terminal."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
