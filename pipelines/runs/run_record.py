"""What fills a folder and how far it is: the record `run.json`, and claiming a folder for a run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Folder

RUN_FILE = "run.json"
RUN_FORMAT = 1


def fingerprint(content: Any) -> str:
    """Short hash of JSON content: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json`: what fills a folder, and how far it is."""

    job: str
    fingerprint: str
    "of what decides the result: settings and input"
    config: Mapping[str, Any]
    "the resolved configuration"
    is_finished: bool = False
    report: Mapping[str, Any] | None = None
    "counts and durations, when finished"

    def write(self, folder: Folder) -> None:
        """Replaces the record of the folder."""
        content = {"format": RUN_FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        folder.write(RUN_FILE, (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def read_run(folder: Folder) -> RunRecord | None:
    """The record of a folder; None if it holds none.

    Raises:
        DataError: It cannot be understood.
    """
    try:
        content = json.loads(folder.read(RUN_FILE))
        if content.pop("format") != RUN_FORMAT:
            raise DataError(f"{folder.url}/{RUN_FILE} is of another version of this software; give another folder")
        return RunRecord(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder.url}/{RUN_FILE} is damaged: {error!r}") from error


def claim(folder: Folder, run: RunRecord) -> RunRecord:
    """Begins `run` in the folder, or continues it there.

    Returns:
        `run`, or the record of the same run that was begun or finished before.

    Raises:
        ConfigError: The folder holds another run (what differs is named), or something that is no run.
        DataError: Its record cannot be understood.
    """
    found = read_run(folder)
    if found is None:
        if names := [entry.name for entry in folder.list()]:
            raise ConfigError(f"folder {folder.url} is not empty and holds no run ({names[0]}, ...); give another one")
        run.write(folder)
        return run
    if (found.job, found.fingerprint) == (run.job, run.fingerprint):
        return found
    now = json.loads(json.dumps(run.config, default=str))  # as it would be read back
    names = sorted(name for name in {*now, *found.config} if now.get(name) != found.config.get(name))
    difference = f"job {found.job}, not {run.job}" if found.job != run.job else ", ".join(names) or "the input's files"
    raise ConfigError(
        f"folder {folder.url} holds another run: {difference} differ"
        f" (fingerprint {found.fingerprint}, this run {run.fingerprint}); give another folder"
    )
