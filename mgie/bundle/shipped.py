"""The trained bundles that come with the package: packed small, unpacked into the cache on first use.

    weights.npz          every different tensor once, in float16: all high bytes, then all low bytes, which compresses
                         better than numbers do; deflated
    index.json           which tensors each file of weights holds: shapes and places in `weights.npz`
    <bundle>/...         the other files as they are, `bundle.json` among them

The bundles share many tensors: an MGIE's LLM is a LLaVA's but for its word embeddings. Unpacking gives the bundles that
were packed, byte by byte. Knows nothing of how they were trained.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors.numpy import load_file, save_file

from mgie.bundle.record import CONFIG_FILE, BundleRecord
from mgie.errors import BundleError
from mgie.storage.atomic import atomic_folder

ShippedName = Literal["tiny", "tiny-llava", "tiny-summarizer"]
SHIPPED: tuple[ShippedName, ...] = get_args(ShippedName)

_INDEX, _WEIGHTS, _SUFFIX = "index.json", "weights.npz", ".safetensors"
_METADATA = {"format": "pt"}


def shipped_folder() -> Path:
    """Where the packed bundles lie in the installed package."""
    return Path(str(resources.files("mgie.bundle"))) / "shipped"


def shipped_hash() -> str:
    """Changes with the shipped weights; part of the unpacked bundles' folder names.

    Raises:
        BundleError: The package holds none.
    """
    try:  # the bundles' own records hold a digest of each of their files
        content = b"".join((shipped_folder() / name / CONFIG_FILE).read_bytes() for name in SHIPPED)
    except OSError as error:
        raise BundleError(f"the package's own bundles cannot be read: {error}") from error
    return hashlib.sha256(content).hexdigest()[:12]


def pack(bundles: Mapping[str, BundleRecord], out: Path) -> None:
    """Packs bundles, their weights rounded to float16, into a folder that does not exist.

    Args:
        bundles: Bundles by the name under which each is unpacked, which also becomes the bundle's own.

    Raises:
        BundleError: A tensor is not of floating point, or float16 cannot hold it.
        FileExistsError: `out` exists.
    """
    out.mkdir(parents=True)
    places: dict[str, int] = {}
    parts: list[bytes] = []
    index: dict[str, dict[str, dict[str, Any]]] = {}
    for name, bundle in bundles.items():
        half = _write_half(bundle, out / f".{name}", name)
        index[name] = {}
        for file in (*half.config.files, CONFIG_FILE):
            if not file.endswith(_SUFFIX):
                (out / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(half.root / file, out / name / file)
                continue
            index[name][file] = {}
            for key, tensor in load_file(half.root / file).items():
                content = tensor.tobytes()
                digest = hashlib.sha256(content).hexdigest()
                if digest not in places:
                    places[digest] = sum(map(len, parts)) // 2
                    parts.append(content)
                index[name][file][key] = [list(tensor.shape), places[digest]]
        shutil.rmtree(half.root)
    planes = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 2)  # little-endian: the low byte comes first
    np.savez_compressed(out / _WEIGHTS, high=planes[:, 1], low=planes[:, 0])
    (out / _INDEX).write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")


def unpack(packed: Path, name: str, out: Path) -> None:
    """Writes one of the packed bundles to `out`, which must not exist; whole or not at all.

    Raises:
        BundleError: It is not among them, or they are damaged.
        OSError: `out` cannot be written.
    """
    try:
        files = json.loads((packed / _INDEX).read_text(encoding="utf-8"))[name]
        with np.load(packed / _WEIGHTS) as planes:
            numbers = np.stack([planes["low"], planes["high"]], axis=1).reshape(-1).view(np.float16)
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"the package's own bundle {name!r} cannot be read: {error!r}") from error
    with atomic_folder(out) as staging:
        shutil.copytree(packed / name, staging, dirs_exist_ok=True)
        for file, tensors in files.items():
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            found = {
                key: numbers[start : start + math.prod(shape)].reshape(shape) for key, (shape, start) in tensors.items()
            }
            save_file(found, staging / file, metadata=_METADATA)
        BundleRecord(staging).verify()


def _write_half(bundle: BundleRecord, out: Path, name: str) -> BundleRecord:
    """The bundle under another name, its weights in float16."""
    from mgie.bundle.writer import BundleWriter  # here, because it needs torch, which unpacking does without

    with BundleWriter(out, dataclasses.replace(bundle.config, name=name, files={})) as writer:
        for part in bundle.config.parts:
            for file in bundle.files([part]):
                target = writer.folder(part).parent / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if not file.endswith(_SUFFIX):
                    shutil.copyfile(bundle.root / file, target)
                    continue
                half = {}
                for key, tensor in load_file(bundle.root / file).items():
                    half[key] = tensor.astype(np.float16)
                    if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(half[key]).all():
                        raise BundleError(f"{name}: tensor {key} of {file} cannot be float16")
                save_file(half, target, metadata=_METADATA)
    return BundleRecord(out)
