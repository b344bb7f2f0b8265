"""Where bundles come from: the embedded default, a local folder, a Hugging Face hub id, `s3://...`.

Remote bundles are fetched part by part into a local cache: `bundle.json` at once, a part's files when it is
loaded. Knows nothing of what the parts mean.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mgie.bundle.embedded import EMBEDDED, cache_folder, ensure_bundle
from mgie.bundle.record import CONFIG_FILE, BundleRecord, hash_file
from mgie.config import FileEntry
from mgie.errors import BundleError


def locate_bundle(where: str | Path) -> BundleRecord:
    """The bundle named; its parts are fetched when they are checked or loaded.

    Args:
        where: `tiny` or another embedded name; a local folder; `org/name` or `org/name@revision` on the
            Hugging Face hub; `s3://bucket/prefix` (credentials, region and endpoint as boto3 finds them, for
            example AWS_ENDPOINT_URL for a store that is not Amazon's).

    Raises:
        BundleError: There is no such bundle, or it cannot be read.
    """
    name = str(where)
    if name.startswith("s3://"):
        return _open_s3(name)
    # Before folders: what works in one working directory works in all. `./tiny` and Path("tiny") are folders.
    if isinstance(where, str) and name in EMBEDDED:
        return BundleRecord(ensure_bundle(name))
    if Path(name).is_dir():
        return BundleRecord(Path(name))
    if isinstance(where, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_hub(name)
    raise BundleError(
        f"bundle {name!r} is not a folder; give a folder, {' or '.join(EMBEDDED)}, a hub id (org/name) or s3://bucket/prefix"
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
    from huggingface_hub import errors as hub_errors  # here, as below, because most bundles are folders
    from huggingface_hub import snapshot_download

    repo, _, given = name.partition("@")

    def download(patterns: Sequence[str], revision: str | None) -> Path:
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        except (
            hub_errors.HfHubHTTPError,
            hub_errors.LocalEntryNotFoundError,
            hub_errors.HFValidationError,
            OSError,
        ) as error:
            raise BundleError(
                f"bundle {name!r} is neither a local folder nor to be had from the hub: {error}"
            ) from error

    root = download([CONFIG_FILE], given or None)
    # The hub names a snapshot's folder by its commit: parts come from the same one, whatever a branch moves to
    # in the meantime. And only what the bundle lists is fetched.
    bundle = BundleRecord(root, fetch=lambda parts: download([CONFIG_FILE, *bundle.files(parts)], root.name))
    return bundle


def _open_s3(url: str) -> BundleRecord:
    from mgie.storage.s3 import S3_ERRORS, open_s3, split_s3_url

    bucket, prefix = split_s3_url(url)
    cache = cache_folder() / "s3" / bucket / prefix

    def download(relative: str, target: Path, sha256: str | None = None) -> None:
        partial: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Beside its place, then moved: another process may be fetching the same file, and one that is
            # cut off or corrupted never takes its place.
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
            os.close(handle)
            partial = Path(name)
            open_s3().download_file(bucket, f"{prefix}/{relative}" if prefix else relative, name)
            if sha256 is not None and hash_file(partial) != sha256:
                raise BundleError(f"{url}/{relative} does not have the sha256 that {CONFIG_FILE} says")
            partial.replace(target)
        except S3_ERRORS as error:
            raise BundleError(f"{url}/{relative} cannot be fetched: {error}") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".config-") as scratch:
            download(CONFIG_FILE, Path(scratch) / CONFIG_FILE)
            # One folder per version of the bundle: files of an older one are never mixed in.
            root = cache / hash_file(Path(scratch) / CONFIG_FILE)[:16]
            root.mkdir(exist_ok=True)
            (Path(scratch) / CONFIG_FILE).replace(root / CONFIG_FILE)
    except OSError as error:
        raise BundleError(f"{cache} cannot be written: {error}; set MGIE_CACHE to a writable folder") from error

    def fetch(parts: Sequence[str]) -> None:
        for relative, entry in bundle.files(parts).items():
            if not _is_complete(root / relative, entry):
                download(relative, root / relative, entry.sha256)

    bundle = BundleRecord(root, fetch=fetch)
    return bundle


def _is_complete(path: Path, entry: FileEntry) -> bool:
    """Whether a cached file is there; its content was checked when it was fetched."""
    return path.is_file() and path.stat().st_size == entry.size
