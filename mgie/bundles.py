"""Where bundles come from: the embedded default, a local folder, a Hugging Face hub id, `s3://...`.

Remote bundles are fetched part by part into a local cache: `bundle.json` at once, a part's files when it is
loaded. Knows nothing of what the parts mean.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import boto3
import botocore.exceptions
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from mgie.checkpoint import CONFIG_FILE, Bundle, hash_file
from mgie.config import FileEntry
from mgie.errors import BundleError
from mgie.tiny import ensure_bundle
from mgie.tiny.recipe import EMBEDDED, cache_folder


def open_bundle(where: str | Path) -> Bundle:
    """The bundle named.

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
    if Path(name).is_dir():
        return Bundle(Path(name))
    if name in EMBEDDED:
        return Bundle(ensure_bundle(name))
    if isinstance(where, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_hub(name)
    raise BundleError(
        f"bundle {name!r} is not a folder; give a folder, {' or '.join(EMBEDDED)}, a hub id (org/name) or s3://bucket/prefix"
    )


def _open_hub(name: str) -> Bundle:
    repo, _, revision = name.partition("@")

    def download(patterns: Sequence[str]) -> Path:
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))
        except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError, OSError) as error:
            raise BundleError(f"bundle {name!r} is neither a local folder nor to be had from the hub: {error}") from error

    root = download([CONFIG_FILE])
    return Bundle(root, fetch=lambda parts: download([CONFIG_FILE, *(f"{part}/*" for part in parts)]))


def _open_s3(url: str) -> Bundle:
    parsed = urlparse(url)
    bucket, prefix = parsed.netloc, parsed.path.strip("/")
    client = boto3.client("s3")

    def download(relative: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, then moved: another process may be fetching the same file.
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
        os.close(handle)
        try:
            client.download_file(bucket, f"{prefix}/{relative}" if prefix else relative, partial)
            os.replace(partial, target)
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            raise BundleError(f"{url}/{relative} cannot be read: {error}") from error
        finally:
            Path(partial).unlink(missing_ok=True)

    staging = cache_folder() / "s3" / bucket / prefix
    download(CONFIG_FILE, staging / CONFIG_FILE)
    # One folder per version of the bundle: files of an older one are never mixed in.
    root = staging / hash_file(staging / CONFIG_FILE)[:16]
    root.mkdir(exist_ok=True)
    (root / CONFIG_FILE).write_bytes((staging / CONFIG_FILE).read_bytes())

    def fetch(parts: Sequence[str]) -> None:
        for relative, entry in bundle.files(parts).items():
            if not _is_complete(root / relative, entry):
                download(relative, root / relative)
                if hash_file(root / relative) != entry.sha256:
                    (root / relative).unlink()
                    raise BundleError(f"{url}/{relative} does not have the sha256 that {CONFIG_FILE} says")

    bundle = Bundle(root, fetch=fetch)
    return bundle


def _is_complete(path: Path, entry: FileEntry) -> bool:
    """Whether a cached file is there; its content was checked when it was fetched."""
    return path.is_file() and path.stat().st_size == entry.size
