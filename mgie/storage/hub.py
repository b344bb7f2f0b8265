"""The Hugging Face hub: what its ids look like, and the files of a repository at one commit."""

from collections.abc import Sequence
from pathlib import Path

from mgie.errors import BundleError


def is_hub_id(where: str) -> bool:
    """Whether a name has the form of a hub id (`org/name`, `org/name@revision`), not of a path that says it is one."""
    return where.count("/") == 1 and not where.startswith((".", "/", "~"))


def fetch_snapshot(where: str, patterns: Sequence[str], *, revision: str = "", what: str) -> Path:
    """Folder of a repository's files, fetched unless they are in the hub's own cache; it is named by the commit.

    Args:
        where: `org/name` or `org/name@revision`.
        patterns: Names of the files that are wanted, with `*`.
        revision: Wins over the one in `where`; the default branch without either.
        what: What `where` should be, for the message: "bundle".

    Raises:
        BundleError: There is no such repository or revision, access is refused, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download  # here, because most bundles are folders

    repo, _, given = where.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or given or None, allow_patterns=list(patterns)))
    except (OSError, errors.HFValidationError) as error:
        reasons = {
            errors.GatedRepoError: "its owner must give access first: ask on its page, then `hf auth login`",
            errors.HfHubHTTPError: "the hub has no such model or revision, or it is private: `hf auth login`",
            errors.LocalEntryNotFoundError: "the hub cannot be reached, and its cache holds no copy",
            errors.HFValidationError: "it is no hub id",
        }
        reason = next((words for kind, words in reasons.items() if isinstance(error, kind)), "it cannot be fetched")
        detail = str(error).strip().partition("\n")[0]
        raise BundleError(f"{what} {where!r} is no folder here, and as a hub id: {reason} ({detail})") from error
