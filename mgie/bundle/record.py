"""What a bundle says of itself, without loading any of it; needs no torch.

    bundle.json     `config.BundleConfig`, with sha256 and size of every other file
    <part>/         transformers' or diffusers' own layout, safetensors only

A bundle that lists a file of another kind is refused. Knows nothing of where a bundle comes from (`resolve.py`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mgie.config import (
    FORMAT_VERSION,
    MLLM_PARTS,
    TEXT_PARTS,
    BundleConfig,
    CacheKind,
    EditSettings,
    FileEntry,
    GenerationConfig,
    Part,
    Provenance,
)
from mgie.errors import BundleError, ConfigError

CONFIG_FILE = "bundle.json"
WEIGHTS_FILE, PART_CONFIG_FILE = "model.safetensors", "config.json"
PREPROCESSOR_FILE, SCHEDULER_FILE = "preprocessor_config.json", "scheduler_config.json"
VISION_PARTS: tuple[Part, ...] = ("vision", "projector")  # those of MLLM_PARTS that see the image
ALLOWED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")  # nothing that could be a pickle or a program
_HASH_BLOCK = 1 << 22


class BundleRecord:
    """A bundle that is at hand: its configuration and its files, whose presence and content it checks.

    Args:
        root: Folder with `bundle.json`.
        fetch: Called with the parts about to be read, before they are; brings their files to `root`.

    Raises:
        BundleError: `bundle.json` cannot be read.
    """

    def __init__(self, root: Path, *, fetch: Callable[[Sequence[str]], object] | None = None) -> None:
        self.root = root
        self.fetch = fetch
        try:
            content = (root / CONFIG_FILE).read_bytes()
        except OSError as error:
            raise BundleError(f"{root} is not a bundle: {CONFIG_FILE} cannot be read ({error.strerror})") from error
        self.config = parse_config(content)
        self.identity = hashlib.sha256(content).hexdigest()[:16]
        bad = [name for name in self.config.files if not name.endswith(ALLOWED_SUFFIXES) or _escapes(name)]
        if bad:
            raise BundleError(
                f"bundle {self.config.name!r} lists {bad[0]!r}; only {', '.join(ALLOWED_SUFFIXES)} files below it are read"
            )

    def verify(self, parts: Sequence[Part] | None = None, *, hashes: bool = True) -> None:
        """Checks presence and size, and with `hashes` the content, of the parts' files (None = all).

        Raises:
            BundleError: A file is missing or differs from what `bundle.json` says.
        """
        parts = self.config.parts if parts is None else parts
        self.config.require(parts)
        if self.fetch is not None:
            self.fetch(parts)
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

    def files(self, parts: Sequence[str]) -> dict[str, FileEntry]:
        """The listed files of these parts."""
        return {name: entry for name, entry in self.config.files.items() if name.split("/", 1)[0] in parts}

    def read_json(self, part: Part, name: str = PART_CONFIG_FILE) -> dict[str, Any]:
        """A configuration file of a part.

        Raises:
            BundleError: The part is missing or damaged, or the file is no JSON object.
        """
        self.verify((part,), hashes=False)
        return read_json(self.root / part / name)

    def scheduler_config(self) -> dict[str, Any]:
        """diffusers' configuration of the noise schedule."""
        return self.read_json("scheduler", SCHEDULER_FILE)


def read_json(path: Path, failure: type[BundleError] = BundleError) -> dict[str, Any]:
    """The JSON object in a file; raises `failure` where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise failure(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise failure(f"{path} holds a {type(data).__name__}; it must be an object")
    return data


def required_parts(config: BundleConfig) -> tuple[Part, ...]:
    """The parts that turn words into conditioning."""
    if config.conditioner == "text":
        return TEXT_PARTS
    return tuple(part for part in MLLM_PARTS if config.sees_image or part not in VISION_PARTS)


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


def _escapes(name: str) -> bool:
    """Whether a listed file would lie outside the bundle."""
    return name.startswith("/") or "\\" in name or ".." in name.split("/")


def encoder_identity(bundle: BundleRecord, kind: CacheKind) -> str:
    """What decides an encoder's output: its files, so that bundles with the same part share a cache."""
    part: Part = "vae" if kind == "vae_moments" else "vision"
    bundle.config.require((part,))
    content: list[Any] = sorted((name, entry.sha256) for name, entry in bundle.files((part,)).items())
    if kind == "clip_features":
        content.append(bundle.config.vision_select_layer)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
