"""MGIE's own files.

    ipr2pr.tsv              two base64 JPEGs a line: source and goal
    ipr2pr.pkl              {task: [[{input, answer, instruction, lineidx}]]}: plain data in a pickle; may be absent
    ipr2pr_expressive.json  {item: {instruction, expressive}}; may be absent

With the pickle, its records say which line is which edit (`lineidx` is a line number or a line's byte offset:
whichever all of them are), and `input` is the item in the JSON. Without, the items of the JSON are the lines of
the TSV in order. The expressive instructions go to the provenance.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from typing import Any

from mgie.errors import DataError
from mgie.storage.folder import Folder
from pipelines.readers.base import BadRow, RawEdit, Shard, as_record, guarded, kept, ranges, read_json, text
from pipelines.readers.plain_pickle import read_plain_pickle
from pipelines.readers.tables import line_starts

_Item = tuple[int | None, dict[str, Any]]
"Byte where the line begins, if there is one, and the record."

TSV_FILE, PICKLE_FILE, JSON_FILE = "ipr2pr.tsv", "ipr2pr.pkl", "ipr2pr_expressive.json"


class MGIEReader:
    """See the module."""

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """Yes: the images are base64 in the TSV."""
        return True

    def shards(self, folder: Folder) -> list[Shard]:
        """Ranges of records, each with where its line begins."""
        expressive = as_record(read_json(folder, JSON_FILE)) if folder.exists(JSON_FILE) else {}
        starts = line_starts(folder, TSV_FILE)
        if folder.exists(PICKLE_FILE):
            items = _by_pickle(read_plain_pickle(folder.read(PICKLE_FILE)), starts, expressive)
        else:
            items = _by_position(starts, expressive)
        num_bytes = folder.num_bytes(TSV_FILE) or 0
        return [
            Shard(file=TSV_FILE, start=start, stop=stop, items=tuple(items[start:stop]), num_bytes=num_bytes)
            for start, stop in ranges(len(items))
        ]

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """One edit for each record."""
        with folder.filesystem.open_input_file(folder.at(shard.file)) as file:
            lines = io.BufferedReader(file, buffer_size=1 << 20)
            for number, (start, record) in enumerate(shard.items, shard.start):
                where = {"file": shard.file, "row": number, **kept(record, "item", "expressive")}
                yield from guarded(
                    lambda start=start, record=record, where=where: [  # type: ignore[misc]
                        _edit(lines, start, record, where)
                    ],
                    split=shard.split,
                    provenance=where,
                )


def _edit(lines: io.BufferedReader, start: int | None, record: dict[str, Any], where: dict[str, Any]) -> RawEdit:
    """Raises DataError."""
    if start is None:
        raise DataError(f"lineidx is {record['lineidx']!r}, which is no line of {TSV_FILE}")
    lines.seek(start)
    try:
        source, goal = (base64.b64decode(one, validate=True) for one in lines.readline().rstrip(b"\r\n").split(b"\t"))
    except (ValueError, binascii.Error) as error:
        raise DataError(f"line at byte {start} is not two base64 images: {error}") from error
    return RawEdit(split="train", source=source, goal=goal, instruction=text(record, "instruction"), provenance=where)


def _by_position(starts: list[int], expressive: Mapping[str, Any]) -> list[_Item]:
    """Item i of the JSON is line i of the TSV. Raises DataError if their numbers differ."""
    if len(starts) - 1 != len(expressive):
        raise DataError(
            f"{TSV_FILE} has {len(starts) - 1} lines and {JSON_FILE} {len(expressive)} items;"
            f" without {PICKLE_FILE}, which joins them, both must have as many"
        )
    return [
        (start, {"item": item, **_fields(found)})
        for start, (item, found) in zip(starts[:-1], expressive.items(), strict=True)
    ]


def _by_pickle(content: object, starts: list[int], expressive: Mapping[str, Any]) -> list[_Item]:
    """Records with the byte where their line begins; None if there is no such line. Raises DataError."""
    groups = [group for task in as_record(content).values() for group in (task if isinstance(task, list) else [task])]
    records = [as_record(record) for group in groups for record in (group if isinstance(group, list) else [group])]
    indices = [record.get("lineidx") for record in records]
    indices = [index if isinstance(index, int) else None for index in indices]
    line_at = {start: start for start in starts[:-1]}
    if not all(index in line_at for index in indices):
        line_at = dict(enumerate(starts[:-1]))
    return [
        (
            line_at.get(index) if index is not None else None,
            {
                "item": str(record.get("input")),
                "lineidx": index,
                "instruction": record.get("instruction"),
                "expressive": _fields(expressive.get(str(record.get("input")))).get("expressive"),
            },
        )
        for index, record in zip(indices, records, strict=True)
    ]


def _fields(found: object) -> dict[str, Any]:
    known = found if isinstance(found, Mapping) else {}
    return {"instruction": known.get("instruction"), "expressive": known.get("expressive")}
