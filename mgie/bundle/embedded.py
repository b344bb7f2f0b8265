"""The embedded bundles, ready without any download: the trained ones of the tiny world, and untrained ones."""

import hashlib
import os
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import platformdirs

from mgie.bundle.record import CONFIG_FILE
from mgie.bundle.shipped import SHIPPED, ShippedName, shipped_folder, shipped_hash, unpack
from mgie.errors import BundleError

UntrainedName = Literal["random", "random-ip2p", "random-summarizer"]
UNTRAINED: tuple[UntrainedName, ...] = get_args(UntrainedName)
EmbeddedName = ShippedName | UntrainedName
EMBEDDED: tuple[EmbeddedName, ...] = (*SHIPPED, *UNTRAINED)


def recipe_hash() -> str:
    """Changes whenever what decides a bundle's bytes may have; part of the cached bundles' folder names."""
    package = resources.files("mgie")
    names = (
        "bundle/untrained.py",
        "bundle/corpus.txt",
        "bundle/bundle.py",
        "bundle/writer.py",
        "config.py",
        "model/edit_head.py",
        "model/tokens.py",
        "model/tokenizer_training.py",
    )
    content = b"".join(package.joinpath(name).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()[:12]


def cache_folder() -> Path:
    """Where embedded and fetched bundles are kept: $MGIE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("MGIE_CACHE") or platformdirs.user_cache_dir("mgie"))


def ensure_bundle(name: EmbeddedName = "tiny") -> Path:
    """Folder of an embedded bundle; unpacks or builds it into the user's cache where it is not there yet.

    Raises:
        BundleError: The cache folder cannot be written, or the package's own bundles are damaged.
    """
    if name in UNTRAINED:
        version, make = recipe_hash(), partial(_build, name)
    else:
        version, make = shipped_hash(), partial(unpack, shipped_folder(), name)
    folder = cache_folder() / f"{name}-{version}"
    if (folder / CONFIG_FILE).is_file():
        return folder
    try:
        make(folder)
    except (OSError, BundleError) as error:
        # Another process may have finished the same bundle in the meantime: then it serves as well.
        if not (folder / CONFIG_FILE).is_file():
            raise BundleError(
                f"the embedded bundle cannot be made in {folder.parent}: {error}; set MGIE_CACHE to a writable folder"
            ) from error
    return folder


def _build(name: UntrainedName, out: Path) -> None:
    from mgie.bundle.untrained import build  # here, because it needs torch: who finds the bundle made does without

    build(name, out)
