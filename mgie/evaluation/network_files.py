"""Where the networks are that metrics look through: a folder, or a hub id with its commit. Needs no torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mgie.bundle.record import hash_file
from mgie.errors import BundleError
from mgie.storage.hub import fetch_snapshot, is_hub_id

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
    if not is_hub_id(where):
        raise BundleError(
            f"network {where!r} {'is a file' if folder.exists() else 'does not exist'}; give a folder or a hub id (org/name)"
        )
    root = fetch_snapshot(where, _CONTENT, what="network")
    if not list(root.glob("*.safetensors")):  # as with some older repositories; of the same commit
        fetch_snapshot(where, ["pytorch_model.bin"], revision=root.name, what="network")
    identity = f"{where.partition('@')[0]}@{root.name}"
    return Network(where=identity, folder=root, identity=identity)
