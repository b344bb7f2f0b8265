"""The embedded bundles, ready without any download: the trained ones of the tiny world, and untrained ones."""

import os
from functools import partial
from pathlib import Path

import platformdirs

from mgie.checkpoint import CONFIG_FILE
from mgie.errors import BundleError
from mgie.tiny.shipped import SHIPPED, ShippedName, shipped_folder, shipped_hash, unpack
from mgie.tiny.untrained import UNTRAINED, UntrainedName, build, recipe_hash

EmbeddedName = ShippedName | UntrainedName
EMBEDDED: tuple[EmbeddedName, ...] = (*SHIPPED, *UNTRAINED)


def cache_folder() -> Path:
    """Where embedded and fetched bundles are kept: $MGIE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("MGIE_CACHE") or platformdirs.user_cache_dir("mgie"))


def ensure_bundle(name: EmbeddedName = "tiny") -> Path:
    """Folder of an embedded bundle; unpacks or builds it into the user's cache where it is not there yet.

    Raises:
        BundleError: The cache folder cannot be written, or the package's own bundles are damaged.
    """
    if name in UNTRAINED:
        version, make = recipe_hash(), partial(build, name)
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
