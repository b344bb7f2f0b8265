"""Where bundles come from: the embedded default, a local folder, a Hugging Face hub id, `s3://...` and other stores.

Remote bundles are fetched part by part into a local cache: `bundle.json` at once, a part's files when it is
loaded. Knows nothing of what the parts mean.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mgie.bundle.embedded import EMBEDDED, cache_folder, ensure_bundle
from mgie.bundle.record import CONFIG_FILE, BundleRecord, hash_file
from mgie.config import FileEntry
from mgie.errors import BundleError, ConfigError
from mgie.storage.atomic import atomic_file
from mgie.storage.hub import fetch_snapshot, is_hub_id


def locate_bundle(where: str | Path) -> BundleRecord:
    """The bundle named; its parts are fetched when they are checked or loaded.

    Args:
        where: `tiny` or another embedded name; a local folder; `org/name` or `org/name@revision` on the
            Hugging Face hub; `s3://bucket/prefix`, `gs://..`, `az://..` (see `mgie/storage/folder.py`).

    Raises:
        BundleError: There is no such bundle, or it cannot be read.
    """
    name = str(where)
    if "://" in name:
        return _open_store(name)
    # Before folders: what works in one working directory works in all. `./tiny` and Path("tiny") are folders.
    if isinstance(where, str) and name in EMBEDDED:
        return BundleRecord(ensure_bundle(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return BundleRecord(folder)
    if isinstance(where, str) and is_hub_id(name):
        return _open_hub(name)
    raise BundleError(
        f"bundle {name!r} {'is a file' if folder.exists() else 'does not exist'}; "
        f"give a folder, {' or '.join(EMBEDDED)}, a hub id (org/name) or s3://bucket/prefix"
    )


def locate_bundles(*wheres: str | Path) -> dict[str, BundleRecord]:
    """Several bundles by their own names, in the order given.

    Raises:
        BundleError: One is missing or damaged, or two have the same name.
    """
    found: dict[str, BundleRecord] = {}
    for where in wheres:
        one = locate_bundle(where)
        if found.setdefault(one.config.name, one) is not one:
            raise BundleError(f"bundle {where} is named {one.config.name!r}, as another one; names must differ")
    return found


def _open_hub(name: str) -> BundleRecord:
    root = fetch_snapshot(name, [CONFIG_FILE], what="bundle")

    def fetch(parts: Sequence[str]) -> None:
        # The folder is named by its commit: parts come from the same one, whatever a branch moves to in the
        # meantime. And only what the bundle lists is fetched.
        fetch_snapshot(name, [CONFIG_FILE, *bundle.files(parts)], revision=root.name, what="bundle")

    bundle = BundleRecord(root, fetch=fetch)
    return bundle


def _open_store(url: str) -> BundleRecord:
    from mgie.storage.folder import open_folder

    try:
        store = open_folder(url)
        content = store.read(CONFIG_FILE)
    except (ConfigError, OSError) as error:
        raise BundleError(f"bundle {url}: {CONFIG_FILE} cannot be fetched: {error}") from error
    # One folder per version of the bundle: files of an older one are never mixed in.
    root = cache_folder() / store.url.replace("://", "/") / hashlib.sha256(content).hexdigest()[:16]
    try:
        with atomic_file(root / CONFIG_FILE) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise BundleError(f"{root} cannot be written: {error}; set MGIE_CACHE to a writable folder") from error

    def fetch(parts: Sequence[str]) -> None:
        for relative, entry in bundle.files(parts).items():
            if _is_complete(root / relative, entry):
                continue
            try:
                # Another process may be fetching the same file, and one that is corrupted never takes its place.
                with atomic_file(root / relative) as partial:
                    store.download(relative, partial)
                    if hash_file(partial) != entry.sha256:
                        raise BundleError(f"{store.url}/{relative} does not have the sha256 that {CONFIG_FILE} says")
            except OSError as error:
                raise BundleError(f"{store.url}/{relative} cannot be fetched: {error}") from error

    bundle = BundleRecord(root, fetch=fetch)
    return bundle


def _is_complete(path: Path, entry: FileEntry) -> bool:
    """Whether a cached file is there; its content was checked when it was fetched."""
    return path.is_file() and path.stat().st_size == entry.size
