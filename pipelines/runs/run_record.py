"""What fills a folder and how far it is: the record `run.json`, and claiming a folder for a run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Folder

RUN_FILE = "run.json"
RUN_FORMAT = 1
_SHOWN_LETTERS = 60


def fingerprint(content: Any) -> str:
    """Short hash of JSON content: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json`: what fills a folder, and how far it is."""

    job: str
    fingerprint: str
    "hash of what decides the result: settings and input"
    config: Mapping[str, Any]
    "the resolved configuration"
    is_finished: bool = False
    report: Mapping[str, Any] | None = None
    "counts and durations, when finished"
    decides: frozenset[str] | None = None
    "names in the configuration of what decides the result, None = all; not stored"

    def write(self, folder: Folder) -> None:
        """Replaces the record of the folder."""
        names = [field.name for field in fields(self) if field.name != "decides"]
        content = {"format": RUN_FORMAT, **{name: getattr(self, name) for name in names}}
        folder.write(RUN_FILE, (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def make_record(job: str, config: Any, decides: Mapping[str, Any]) -> RunRecord:
    """The record of a run that begins.

    Args:
        config: Dataclass of all settings.
        decides: What decides the result, by the names that a difference is told by.
    """
    resolved = {**asdict(config), **decides}
    return RunRecord(job=job, fingerprint=fingerprint(decides), config=resolved, decides=frozenset(decides))


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


def claim(folder: Folder, run: RunRecord, *, may_grow: str = "") -> RunRecord:
    """Begins `run` in the folder, or continues it there.

    Args:
        may_grow: A number in the configuration ("training.steps"): a run that differs in nothing else, and asks for
            more, goes on.

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
    if found.job != run.job:
        raise ConfigError(f"folder {folder.url} holds another run: job {found.job}, not {run.job}; give another folder")
    now = json.loads(json.dumps(run.config, default=str))  # as it would be read back
    decides = run.decides or now.keys()
    differing = [
        difference
        for name in sorted({*now, *found.config} & decides)
        for difference in _differences(name, found.config.get(name), now.get(name))
    ]
    if [name for name, _, _ in differing] == [may_grow] and differing[0][2] > differing[0][1]:
        run.write(folder)
        return run
    told = "; ".join(f"{name} was {_short(old)}, is {_short(new)}" for name, old, new in differing)
    raise ConfigError(
        f"folder {folder.url} holds another run: {told or 'the files of its input were others'}. "
        "Give the old values to continue it, or another folder"
    )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
