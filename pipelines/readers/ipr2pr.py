"""IPr2Pr, the data set of InstructPix2Pix as folders.

    seeds.json              [[folder, [seed, ...]], ...]; may be absent: then all folders, sorted by name
    <folder>/prompt.json    edit, output, and the source caption as input or caption; samples may hold edit alone
    <folder>/metadata.jsonl one line per seed; may be absent
    <folder>/<seed>_0.jpg   source        <folder>/<seed>_1.jpg   goal

Splits go by position in that order: the first 90 % train, 5 % val, 5 % test.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent
from pipelines.readers.base import (
    BadRow,
    RawEdit,
    Shard,
    as_record,
    guarded,
    kept,
    ranges,
    read_json,
    read_records,
    text,
    text_or_none,
)

FOLDERS_PER_SHARD = 250  # about four seeds each
_IMAGE = re.compile(r"(.+)_[01]\.jpg")


class IPr2PrReader:
    """See the module."""

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """No: the images are files."""
        return False

    def shards(self, folder: Folder) -> list[Shard]:
        """Ranges of folders, each with its split and, from `seeds.json`, its seeds."""
        listed: list[tuple[str, list[str] | None]]
        if folder.exists("seeds.json"):
            listed = [_seeds(entry) for entry in read_records(folder, "seeds.json")]
        else:
            listed = [(entry.name, None) for entry in folder.list() if entry.is_folder]
        if not listed:
            raise DataError(f"{folder.url} holds neither seeds.json nor folders; it must be in the IPr2Pr layout")
        items = [(name, _split(i, len(listed)), seeds) for i, (name, seeds) in enumerate(listed)]
        return [
            Shard(file=f"folders {start} to {stop - 1}", start=start, stop=stop, items=tuple(items[start:stop]))
            for start, stop in ranges(len(items), FOLDERS_PER_SHARD)
        ]

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The seeds of each folder."""
        for name, split, seeds in shard.items:
            yield from self._read_folder(folder, name, split, seeds)

    def _read_folder(
        self, folder: Folder, name: str, split: str, seeds: list[str] | None
    ) -> Iterator[RawEdit | BadRow]:
        here = {"folder": name}
        try:
            if seeds is None:
                seeds = sorted({m[1] for entry in folder.list(name) if (m := _IMAGE.fullmatch(entry.name))})
            metadata = _metadata(folder, name)
            prompt = as_record(read_json(folder, f"{name}/prompt.json"))
        except DataError as error:
            for where in [{**here, "seed": seed} for seed in seeds or []] or [here]:
                yield BadRow(split=split, code="bad_row", message=str(error), provenance=where)
            return
        if not seeds:
            yield BadRow(split=split, code="bad_row", message=f"{name} holds no images", provenance=here)
        for seed in seeds:
            provenance = {**here, "seed": seed, **metadata.get(seed, {})}
            yield from guarded(
                lambda seed=seed, provenance=provenance: [  # type: ignore[misc]
                    RawEdit(
                        split=split,
                        source=f"{name}/{seed}_0.jpg",
                        goal=f"{name}/{seed}_1.jpg",
                        instruction=text(prompt, "edit"),
                        source_caption=text_or_none(prompt, "input") or text_or_none(prompt, "caption"),
                        goal_caption=text_or_none(prompt, "output"),
                        provenance=provenance,
                    )
                ],
                split=split,
                provenance=provenance,
            )


def _seeds(entry: object) -> tuple[str, list[str]]:
    """One entry of `seeds.json`. Raises DataError: positions decide the splits, so none may be left out."""
    match entry:
        case [str(name), [*seeds]] if all(isinstance(seed, (str, int)) for seed in seeds):
            return name, [str(seed) for seed in seeds]
    raise DataError(f"seeds.json has the entry {entry!r:.80}; each must be [folder, [seed, ...]]")


def _split(position: int, num_folders: int) -> str:
    if position < num_folders * 90 // 100:
        return "train"
    return "val" if position < num_folders * 95 // 100 else "test"


def _metadata(folder: Folder, name: str) -> dict[str, Mapping[str, Any]]:
    """Scores by seed. They are extras: a line that cannot be read is left out."""
    try:
        lines = folder.read(f"{name}/metadata.jsonl").splitlines()
    except OSError as error:
        if not is_absent(error):
            raise
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "seed" in record:
            scores = ("p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")
            found[str(record["seed"])] = kept(record, *scores)
    return found
