"""Where the networks are that metrics look through: a folder, or a hub id with its commit. Needs no torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from mgie.bundle.record import hash_file
from mgie.errors import BundleError

_CONTENT = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Where a network is, and which one it is."""

    where: str
    "what finds the same one again, also on another machine: folder, or hub id with its commit"
    folder: Path
    identity: str
    "name and hash of the content, or hub id with its commit"


def find_network(where: str) -> Network:
    """The network in a folder, or on the hub (`org/name` or `org/name@revision`).

    Raises:
        BundleError: There is none.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            digest.update(f"{path.name} {hash_file(path)}\n".encode())
        folder = folder.absolute()
        return Network(where=str(folder), folder=folder, identity=f"{folder.name} {digest.hexdigest()[:16]}")
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise BundleError(f"network {where!r} is not a folder; give a folder or a hub id (org/name)")
    repo, _, revision = where.partition("@")
    try:
        root = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(_CONTENT)))
        if not list(root.glob("*.safetensors")):  # as with some older repositories; of the same commit
            snapshot_download(repo, revision=root.name, allow_patterns=["pytorch_model.bin"])
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError, OSError) as e:
        raise BundleError(f"network {where!r} is neither a local folder nor to be had from the hub: {e}") from e
    identity = f"{repo}@{root.name}"
    return Network(where=identity, folder=root, identity=identity)
