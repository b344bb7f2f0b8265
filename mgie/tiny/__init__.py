"""The embedded default: tiny bundles that are built once, on this machine, without any download."""

from pathlib import Path

from mgie.checkpoint import CONFIG_FILE
from mgie.errors import BundleError
from mgie.tiny.recipe import EmbeddedName, build, cache_folder, recipe_hash


def ensure_bundle(name: EmbeddedName = "tiny") -> Path:
    """Folder of an embedded bundle; builds it into the user's cache where it is not there yet.

    Raises:
        BundleError: The cache folder cannot be written.
    """
    folder = cache_folder() / f"{name}-{recipe_hash()}"
    if (folder / CONFIG_FILE).is_file():
        return folder
    try:
        build(name, folder)
    except (OSError, BundleError) as error:
        # Another process may have finished the same bundle in the meantime: then it serves as well.
        if not (folder / CONFIG_FILE).is_file():
            raise BundleError(
                f"the embedded bundle cannot be built in {folder.parent}: {error}; set MGIE_CACHE to a writable folder"
            ) from error
    return folder
