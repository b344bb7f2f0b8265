"""Writes the same edits in every raw layout, for tests."""

import base64
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mgie.config import ImageLimits
from mgie.storage.folder import open_folder
from pipelines.readers import Columns, Layout, make_reader
from pipelines.readers.manifest_rows import Row, RowMaker

IMAGE_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Edit:
    source: bytes | None
    goal: bytes | None
    instruction: Any = "make it night"
    mask: bytes | None = None
    source_caption: str | None = "a house"
    goal_caption: str | None = "a house at night"


def picture(seed: int, wh: tuple[int, int] = (40, 32), kind: str = "jpeg") -> bytes:
    """A small picture of smooth noise: pictures of different seeds look different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(wh, Image.Resampling.BICUBIC).save(out, format=kind)
    return out.getvalue()


def edits(count: int = 5) -> list[Edit]:
    return [Edit(picture(2 * i), picture(2 * i + 1), instruction=f"change number {i}") for i in range(count)]


def _write(path: Path, data: bytes | None) -> None:
    """A missing image is a file that is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is not None:
        path.write_bytes(data)


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_ipr2pr(folder: Path, rows: Sequence[Edit]) -> None:
    for i, edit in enumerate(rows):
        name = f"{i:07d}"
        _write(folder / name / f"{100 + i}_0.jpg", edit.source)
        _write(folder / name / f"{100 + i}_1.jpg", edit.goal)
        prompt = {"input": edit.source_caption, "edit": edit.instruction, "output": edit.goal_caption}
        _dump(folder / name / "prompt.json", prompt)
    _dump(folder / "seeds.json", [[f"{i:07d}", [100 + i]] for i in range(len(rows))])


def _cell(data: bytes | None) -> dict[str, Any] | None:
    return None if data is None else {"bytes": data, "path": "whatever.jpg"}


def write_parquet(path: Path, columns: dict[str, list[Any]], *, rows_per_group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: pa.array(values, IMAGE_CELL)
        if isinstance(next((v for v in values if v is not None), None), dict)
        else values
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path, row_group_size=rows_per_group)


def write_instructpix2pix(folder: Path, rows: Sequence[Edit]) -> None:
    write_parquet(
        folder / "data" / "train-00000-of-00001-abc.parquet",
        {
            "original_prompt": [e.source_caption for e in rows],
            "original_image": [_cell(e.source) for e in rows],
            "edit_prompt": [e.instruction for e in rows],
            "edited_prompt": [e.goal_caption for e in rows],
            "edited_image": [_cell(e.goal) for e in rows],
        },
    )


def write_magicbrush(folder: Path, rows: Sequence[Edit]) -> None:
    write_parquet(
        folder / "data" / "dev-00000-of-00001.parquet",
        {
            "img_id": [str(i // 2) for i in range(len(rows))],
            "turn_index": [i % 2 + 1 for i in range(len(rows))],
            "source_img": [_cell(e.source) for e in rows],
            "mask_img": pa.array([_cell(e.mask) for e in rows], IMAGE_CELL),
            "instruction": [e.instruction for e in rows],
            "target_img": [_cell(e.goal) for e in rows],
        },
    )


def write_ultraedit(folder: Path, rows: Sequence[Edit]) -> None:
    write_parquet(
        folder / "FreeForm_0-00000-of-00001.parquet",
        {
            "clip_sim_source": [0.25] * len(rows),
            "ssim": [float("nan")] * len(rows),
            "source_caption": [e.source_caption for e in rows],
            "target_caption": [e.goal_caption for e in rows],
            "idx": list(range(len(rows))),
            "edit_prompt": [e.instruction for e in rows],
            "edit_object": ["house"] * len(rows),
            "source_image": [_cell(e.source) for e in rows],
            "edited_image": [_cell(e.goal) for e in rows],
            "mask_image": pa.array([_cell(e.mask) for e in rows], IMAGE_CELL),
        },
    )


def write_hq_edit(folder: Path, rows: Sequence[Edit]) -> None:
    write_parquet(
        folder / "data" / "train-00000-of-00001.parquet",
        {
            "input": [e.source_caption for e in rows],
            "input_image": [_cell(e.source) for e in rows],
            "edit": [e.instruction for e in rows],
            "inverse_edit": [f"undo: {e.instruction}" for e in rows],
            "output": [e.goal_caption for e in rows],
            "output_image": [_cell(e.goal) for e in rows],
        },
    )


def _write_images(folder: Path, rows: Sequence[Edit]) -> None:
    for i, edit in enumerate(rows):
        _write(folder / f"{i}_O.jpg", edit.source)
        _write(folder / f"{i}_E.jpg", edit.goal)


def write_gier(folder: Path, rows: Sequence[Edit]) -> None:
    _write_images(folder / "images", rows)
    records = [
        {
            "input": f"{i}_O.jpg",
            "output": f"{i}_E.jpg",
            "request": "could somebody please help",
            "expert_summary": [e.instruction],
            "amateur_summary": [],
            "operator": {"brightness": {"local": False, "ids": []}},
        }
        for i, e in enumerate(rows)
    ]
    _dump(folder / "GIER.json", records)
    _dump(folder / "splits" / "train.json", records[:-1])
    _dump(folder / "splits" / "val.json", records[-1:])


def write_ma5k(folder: Path, rows: Sequence[Edit]) -> None:
    _write_images(folder / "images", rows)
    records = [
        {"input": f"{i}_O.jpg", "output": f"{i}_E.jpg", "request": e.instruction, "request_idx": i}
        for i, e in enumerate(rows)
    ]
    _dump(folder / "annotations" / "train_sess_1.json", records[:-1])
    _dump(folder / "annotations" / "test_sess_1.json", records[-1:])


def write_evr(folder: Path, rows: Sequence[Edit]) -> None:
    _write_images(folder / "adobe" / "images", rows)
    records = [
        {"img0": f"{i}_O.jpg", "img1": f"{i}_E.jpg", "sents": [e.instruction], "uid": f"u{i}"}
        for i, e in enumerate(rows)
    ]
    _dump(folder / "adobe" / "train.json", records[:-1])
    _dump(folder / "adobe" / "valid.json", records[-1:])


def write_magicbrush_test(folder: Path, rows: Sequence[Edit]) -> None:
    sessions: dict[str, list[dict[str, Any]]] = {}
    captions: dict[str, dict[str, Any]] = {}
    for i, edit in enumerate(rows):
        session, turn = str(9000 + i // 2), i % 2 + 1
        names = {"input": f"{session}-input{turn}.png", "output": f"{session}-output{turn}.png"}
        names["mask"] = f"{session}-mask{turn}.png"
        _write(folder / "images" / session / names["input"], edit.source)
        _write(folder / "images" / session / names["output"], edit.goal)
        _write(folder / "images" / session / names["mask"], edit.mask)
        record = {**names, "mask": names["mask"] if edit.mask else None, "instruction": edit.instruction}
        sessions.setdefault(session, []).append(record)
        caption = captions.setdefault(session, {})
        caption[names["input"]], caption[names["output"]] = edit.source_caption, edit.goal_caption
    _dump(folder / "edit_sessions.json", sessions)
    _dump(folder / "local_descriptions" / "captions.json", captions)


def write_mgie(folder: Path, rows: Sequence[Edit], *, join: str = "offsets") -> None:
    """`join`: what `lineidx` holds, "offsets" or "lines"; "none" = no pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [b"\t".join(base64.b64encode(one or b"") for one in (e.source, e.goal)) + b"\n" for e in rows]
    (folder / "ipr2pr.tsv").write_bytes(b"".join(lines))
    offsets = [sum(len(line) for line in lines[:i]) for i in range(len(lines))]
    items = [f"{i:07d}/{100 + i}_0.jpg" for i in range(len(rows))]
    if join != "none":
        records = [
            {
                "input": item,
                "answer": item.replace("_0", "_1"),
                "instruction": e.instruction,
                "lineidx": offsets[i] if join == "offsets" else i,
            }
            for i, (item, e) in enumerate(zip(items, rows, strict=True))
        ]
        (folder / "ipr2pr.pkl").write_bytes(pickle.dumps({"task": [[record] for record in records]}))
    expressive = {
        item: {"instruction": e.instruction, "expressive": f"The picture shows {e.instruction}."}
        for item, e in zip(items, rows, strict=True)
    }
    _dump(folder / "ipr2pr_expressive.json", expressive)


def write_own_parquet(folder: Path, rows: Sequence[Edit]) -> None:
    write_parquet(
        folder / "mine.parquet",
        {
            "before": pa.array([e.source for e in rows], pa.binary()),
            "after": pa.array([e.goal for e in rows], pa.binary()),
            "say": [e.instruction for e in rows],
            "was": [e.source_caption for e in rows],
            "is": [e.goal_caption for e in rows],
        },
    )


def write_jsonl(folder: Path, rows: Sequence[Edit]) -> None:
    _write_images(folder / "pictures of mine", rows)
    records = [
        {
            "before": f"pictures of mine/{i}_O.jpg",
            "after": f"pictures of mine/{i}_E.jpg",
            "say": e.instruction,
            "was": e.source_caption,
            "is": e.goal_caption,
        }
        for i, e in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_webdataset(folder: Path, rows: Sequence[Edit]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for i, e in enumerate(rows):
            texts = {"say": e.instruction, "was": e.source_caption, "is": e.goal_caption}
            members = {"before.jpg": e.source, "after.jpg": e.goal, "json": json.dumps(texts).encode()}
            for name, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(f"sub/{i:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


OWN = Columns(source="before", goal="after", instruction="say", source_caption="was", goal_caption="is")

WRITERS: dict[Layout, Callable[[Path, Sequence[Edit]], None]] = {
    "ipr2pr": write_ipr2pr,
    "instructpix2pix": write_instructpix2pix,
    "magicbrush": write_magicbrush,
    "magicbrush-test": write_magicbrush_test,
    "ultraedit": write_ultraedit,
    "hq-edit": write_hq_edit,
    "gier": write_gier,
    "ma5k": write_ma5k,
    "evr": write_evr,
    "mgie": write_mgie,
    "parquet": write_own_parquet,
    "jsonl": write_jsonl,
    "webdataset": write_webdataset,
}


def read_rows(layout: Layout, folder: Path, out: Path, columns: Columns = OWN) -> list[Row]:
    """All rows of a raw data set, as the job would make them, without Ray."""
    raw = open_folder(folder)
    reader = make_reader(layout, columns)
    maker = RowMaker(
        folder=raw,
        extract_to=open_folder(out) if reader.extracts(raw) else None,
        dataset=layout,
        licence=None,
        limits=ImageLimits(),
    )
    return [row for shard in reader.shards(raw) for row in maker.rows(reader.read(raw, shard), num_threads=2)]


def good(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("reason") is None]


def bad(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("reason") is not None]


def with_one(rows: Sequence[Edit], index: int, **changes: Any) -> list[Edit]:
    return [replace(edit, **changes) if i == index else edit for i, edit in enumerate(rows)]
