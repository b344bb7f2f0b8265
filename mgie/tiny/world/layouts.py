"""Raw data sets of the world, in every layout that is read: as large as one likes, the same bytes each time.

Each writer takes encoded edits one by one and keeps none (parquet: a row group). The layouts' own oddities are kept:
which of captions, masks and splits there are, is the layout's. Knows nothing of readers.
"""

import base64
import contextlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mgie.config import check_choice
from mgie.errors import ConfigError
from mgie.tiny.world.samples import SIDE_PX, Sample, Split, make_sample

_QUALITY = 95
_ROWS_PER_GROUP = 100
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_Rows = Iterator["_Row"]
_Writer = Callable[[Path, _Rows, Split], None]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """An edit with its pictures encoded."""

    number: int
    origin: dict[str, Any]
    "arguments of `make_sample`"
    source: bytes
    goal: bytes
    mask: bytes
    sample: Sample

    @property
    def name(self) -> str:
        return f"{self.number:07d}"

    def facts(self) -> dict[str, Any]:
        """All that is no picture, under the names that the project's own columns have."""
        sample = self.sample
        return {
            "instruction": sample.instruction,
            "source_caption": sample.source_caption,
            "goal_caption": sample.goal_caption,
            "operation": sample.operation,
            "family": sample.family,
            "held_out": sample.held_out,
            "is_ambiguous": sample.is_ambiguous,
            "tiny_world": self.origin,
            "verbose": sample.verbose,
            "expressive": sample.expressive,
        }


def write_layout(
    layout: str, folder: Path, count: int, *, seed: int = 0, split: Split = "train", side_px: int = SIDE_PX
) -> None:
    """Writes the first samples of a split as a raw data set.

    Args:
        layout: One of `LAYOUTS`.
        folder: Where it goes; made where it is not there.

    Raises:
        ConfigError: There is no such layout, or `count` is below 1.
    """
    check_choice("layout", layout, LAYOUTS)
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1", param="count")
    folder.mkdir(parents=True, exist_ok=True)
    origins = ({"seed": seed, "split": split, "number": number, "side_px": side_px} for number in range(count))
    LAYOUTS[layout](folder, map(_row, origins), split)


def _row(origin: dict[str, Any]) -> _Row:
    sample = make_sample(**origin)
    encoded = []
    for image in (sample.source, sample.goal):
        out = io.BytesIO()
        image.save(out, format="jpeg", quality=_QUALITY)
        encoded.append(out.getvalue())
    mask = io.BytesIO()
    sample.mask.save(mask, format="png")
    return _Row(
        number=origin["number"],
        origin=origin,
        source=encoded[0],
        goal=encoded[1],
        mask=mask.getvalue(),
        sample=sample,
    )


def _ipr2pr(folder: Path, rows: _Rows, split: Split) -> None:  # noqa: ARG001
    seeds = []
    for row in rows:
        place = folder / row.name
        place.mkdir(exist_ok=True)
        (place / "0_0.jpg").write_bytes(row.source)
        (place / "0_1.jpg").write_bytes(row.goal)
        sample = row.sample
        prompt = {"input": sample.source_caption, "edit": sample.instruction, "output": sample.goal_caption}
        _dump(place / "prompt.json", prompt)
        seeds.append([row.name, ["0"]])
    _dump(folder / "seeds.json", seeds)


def _parquet(path: str, make: Callable[[_Row], dict[str, Any]], *, val: str = "val") -> _Writer:
    """A layout of one parquet file, written a row group at a time; `{split}` in its path is filled in.

    Args:
        val: Name of the validation split.
    """

    def write(folder: Path, rows: _Rows, split: Split) -> None:
        file = folder / path.format(split=val if split == "val" else split)
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
                table = _table([make(row) for row in group])
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
                writer.write_table(table)

    return write


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Columns of these rows; what `_cell` makes is of the hub's type for images."""
    images = {name for name, value in rows[0].items() if isinstance(value, dict) and value.keys() == {"bytes", "path"}}
    return pa.table(
        {name: pa.array([row[name] for row in rows], _IMAGE if name in images else None) for name in rows[0]}
    )


def _cell(data: bytes, name: str) -> dict[str, Any]:
    return {"bytes": data, "path": name}


def _instructpix2pix(row: _Row) -> dict[str, Any]:
    return {
        "original_prompt": row.sample.source_caption,
        "original_image": _cell(row.source, f"{row.name}_0.jpg"),
        "edit_prompt": row.sample.instruction,
        "edited_prompt": row.sample.goal_caption,
        "edited_image": _cell(row.goal, f"{row.name}_1.jpg"),
    }


def _magicbrush(row: _Row) -> dict[str, Any]:
    return {
        "img_id": str(row.number),
        "turn_index": 1,
        "source_img": _cell(row.source, f"{row.name}-input.png"),
        "mask_img": _cell(row.mask, f"{row.name}-mask1.png"),
        "instruction": row.sample.instruction,
        "target_img": _cell(row.goal, f"{row.name}-output1.png"),
    }


def _ultraedit(row: _Row) -> dict[str, Any]:
    return {
        "clip_sim_source": 0.0,
        "ssim": 0.0,
        "source_caption": row.sample.source_caption,
        "target_caption": row.sample.goal_caption,
        "idx": row.number,
        "edit_prompt": row.sample.instruction,
        "edit_object": row.sample.edit.slots.get("name", "NONE"),
        "source_image": _cell(row.source, f"{row.name}_0.jpg"),
        "edited_image": _cell(row.goal, f"{row.name}_1.jpg"),
        "mask_image": _cell(row.mask, f"{row.name}_m.png"),
    }


def _hq_edit(row: _Row) -> dict[str, Any]:
    return {
        "input": row.sample.source_caption,
        "input_image": _cell(row.source, f"{row.name}_0.jpg"),
        "edit": row.sample.instruction,
        "inverse_edit": f"undo this: {row.sample.expressive}",
        "output": row.sample.goal_caption,
        "output_image": _cell(row.goal, f"{row.name}_1.jpg"),
    }


def _own(row: _Row) -> dict[str, Any]:
    pictures = {"source": row.source, "goal": row.goal, "mask": row.mask}
    return {**{key: _cell(data, f"{row.name}_{key}") for key, data in pictures.items()}, **row.facts()}


def _write_pictures(folder: Path, rows: _Rows) -> Iterator[tuple[_Row, str, str]]:
    """Writes source and goal of each row as files and gives their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        before, after = f"{row.name}_0.jpg", f"{row.name}_1.jpg"
        (folder / before).write_bytes(row.source)
        (folder / after).write_bytes(row.goal)
        yield row, before, after


def _gier(folder: Path, rows: _Rows, split: Split) -> None:
    records = [
        {
            "input": before,
            "output": after,
            "request": row.sample.verbose,
            "expert_summary": [row.sample.instruction],
            "amateur_summary": [],
            "operator": {row.sample.operation: {"local": row.sample.family != "optimization", "ids": []}},
        }
        for row, before, after in _write_pictures(folder / "images", rows)
    ]
    _dump(folder / "GIER.json", records)
    _dump(folder / "splits" / f"{split}.json", records)


def _ma5k(folder: Path, rows: _Rows, split: Split) -> None:
    records = [
        {"input": before, "output": after, "request": row.sample.instruction, "request_idx": 0}
        for row, before, after in _write_pictures(folder / "images", rows)
    ]
    _dump(folder / "annotations" / f"{split}_sess_1.json", records)


def _evr(folder: Path, rows: _Rows, split: Split) -> None:
    records = [
        {"img0": before, "img1": after, "sents": [row.sample.instruction], "uid": row.name}
        for row, before, after in _write_pictures(folder / "adobe" / "images", rows)
    ]
    _dump(folder / "adobe" / f"{'valid' if split == 'val' else split}.json", records)


def _magicbrush_test(folder: Path, rows: _Rows, split: Split) -> None:  # noqa: ARG001
    sessions: dict[str, Any] = {}
    captions: dict[str, Any] = {}
    for row in rows:
        names = {key: f"{row.name}-{key}1.png" for key in ("input", "mask", "output")}
        place = folder / "images" / row.name
        place.mkdir(parents=True, exist_ok=True)
        for key, data in (("input", row.source), ("mask", row.mask), ("output", row.goal)):
            (place / names[key]).write_bytes(data)
        sessions[row.name] = [{**names, "instruction": row.sample.instruction}]
        captions[row.name] = {names["input"]: row.sample.source_caption, names["output"]: row.sample.goal_caption}
    _dump(folder / "edit_sessions.json", sessions)
    _dump(folder / "local_descriptions" / "captions.json", captions)


def _mgie(folder: Path, rows: _Rows, split: Split) -> None:  # noqa: ARG001
    """Without the pickle: items of the JSON are lines of the TSV."""
    expressive = {}
    with (folder / "ipr2pr.tsv").open("wb") as table:
        for row in rows:
            table.write(b"\t".join(base64.b64encode(one) for one in (row.source, row.goal)) + b"\n")
            item = {"instruction": row.sample.instruction, "expressive": row.sample.expressive}
            expressive[f"{row.name}/0_0.jpg"] = item
    _dump(folder / "ipr2pr_expressive.json", expressive)


def _jsonl(folder: Path, rows: _Rows, split: Split) -> None:
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
        for row, before, after in _write_pictures(folder / "images", rows):
            mask = f"{row.name}_m.png"
            (folder / "images" / mask).write_bytes(row.mask)
            names = {"source": before, "goal": after, "mask": mask}
            lines.write(json.dumps({**{key: f"images/{name}" for key, name in names.items()}, **row.facts()}) + "\n")


def _webdataset(folder: Path, rows: _Rows, split: Split) -> None:
    with tarfile.open(folder / f"{split}-0000.tar", "w") as tar:
        for row in rows:
            facts = json.dumps(row.facts()).encode()
            members = {"source.jpg": row.source, "goal.jpg": row.goal, "mask.png": row.mask, "json": facts}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{row.name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


LAYOUTS: dict[str, _Writer] = {
    "ipr2pr": _ipr2pr,
    "instructpix2pix": _parquet("data/{split}-00000-of-00001-world.parquet", _instructpix2pix),
    "magicbrush": _parquet("data/{split}-00000-of-00001.parquet", _magicbrush, val="dev"),
    "magicbrush-test": _magicbrush_test,
    "ultraedit": _parquet("FreeForm_0-00000-of-00001.parquet", _ultraedit),
    "hq-edit": _parquet("data/{split}-00000-of-00001.parquet", _hq_edit),
    "gier": _gier,
    "ma5k": _ma5k,
    "evr": _evr,
    "mgie": _mgie,
    "parquet": _parquet("{split}.parquet", _own),
    "jsonl": _jsonl,
    "webdataset": _webdataset,
}
