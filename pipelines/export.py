#!/usr/bin/env python3
"""A ledger -> files for other software: parquet that Hugging Face `datasets` reads, or MGIE's own TSV and JSON.

    huggingface   data/<split>-00000-of-0000N.parquet: the columns of the ledger, with images in place of URIs
    mgie          ipr2pr.tsv: two base64 JPEGs a line; ipr2pr_expressive.json: {id: {instruction, expressive}},
                  item i of which is line i

Only rows that are ok, of their highest attempt. An image that cannot be read stops the export: it would be
incomplete. The same command after a kill begins again; after the end it does nothing. Needs no Ray.
"""

import base64
import dataclasses
import io
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mgie.config import check_range
from mgie.data.ledger import LEDGER_SCHEMA, images_root, read_ledger
from mgie.errors import ConfigError, DataError
from mgie.images.files import DEFAULT_QUALITY, detect_format, read_image
from mgie.storage.folder import Folder, open_folder
from mgie.storage.retry import is_absent
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import Bar
from pipelines.runs.run import open_run
from pipelines.runs.run_record import RunRecord, fingerprint

Format = Literal["huggingface", "mgie"]
Split = Literal["all", "train", "val", "test"]
TSV_FILE, JSON_FILE = "ipr2pr.tsv", "ipr2pr_expressive.json"

_IMAGES = ("source", "goal", "mask")
_LEFT_OUT = ("split", "status", "reason", "attempt")  # in the names of the files, or the same in every row
_HUB_SPLITS = {"val": "validation"}
_GROUP_ROWS = 100  # images make rows large: this is what `datasets` itself writes
_NUM_THREADS = 8
_Row = dict[str, Any]
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A ledger -> files for other software."""

    ledger: str
    "folder of the ledger's parquet files, local or s3://bucket/prefix"
    out: str
    "folder to fill, local or s3://"
    format: Format = "huggingface"
    "what to write"
    split: Split = "all"
    "which rows"
    images: str | None = None
    "root of the images, where they lie elsewhere by now; without it, as the ledger's images.json says"
    rows_per_file: int = 1000
    "rows of a parquet file"
    endpoint: str | None = None
    "address of an S3 store that is not Amazon's; without it, AWS_ENDPOINT_URL"

    def __post_init__(self) -> None:
        check_range("rows_per_file", self.rows_per_file, 1, 1_000_000)


def export(config: ExportConfig, *, console: Console | None = None) -> dict[str, int]:
    """Runs the export; does nothing where it is done. Returns the rows written, by split.

    Raises:
        ConfigError: The output folder holds something else.
        DataError: The ledger has no such rows, or an image is missing.
        OSError: A store is in trouble.
    """
    ledger = open_folder(config.ledger, endpoint=config.endpoint)
    output = open_folder(config.out, endpoint=config.endpoint)
    if (ledger.url + "/").startswith(output.url + "/"):
        raise ConfigError(f"out is {output.url}, which holds the ledger; give another folder", param="out")
    root = open_folder(images_root(ledger, moved_to=config.images), endpoint=config.endpoint)
    content = {
        **{name: getattr(config, name) for name in ("format", "split", "rows_per_file")},
        "ledger": ledger.url,
        "images": root.url,
    }
    files = [dataclasses.asdict(entry) for entry in ledger.list() if entry.name.endswith(".parquet")]
    record = RunRecord(job="export", fingerprint=fingerprint({**content, "files": files}), config=content)
    with open_run(output, record, config, console, is_done_once=True) as run:
        if run.is_finished:
            return dict((run.found.report or {})["splits"])
        run.begin()
        run.say(f"reading the ledger {ledger.url} ...")
        counts: Counter[str] = Counter()
        for batch in read_ledger(ledger, columns=["split"]):
            counts.update(batch.column(0).to_pylist())
        splits = {name: counts[name] for name in sorted(counts) if config.split in ("all", name)}
        if not splits:
            raise DataError(f"ledger {ledger.url} has no rows of split {config.split!r}; it has {dict(counts)}")
        with run.bar("rows", sum(splits.values())) as bar:
            if config.format == "mgie":
                _write_mgie(ledger, root, output, set(splits), bar)
            else:
                for split, num_rows in splits.items():
                    rows = _rows(ledger, {split}, bar)
                    _write_hub(rows, root, output, split=split, num_rows=num_rows, rows_per_file=config.rows_per_file)
        run.finish({"splits": splits})
    return splits


# ---- rows with their images


def _rows(ledger: Folder, splits: set[str], bar: Bar) -> Iterator[_Row]:
    for batch in read_ledger(ledger, batch_rows=256):
        for row in (row for row in batch.to_pylist() if row["split"] in splits):
            yield row
            bar.show(bar.done + 1)


def _with_images(
    rows: Iterator[_Row], root: Folder, make: Callable[[_Row, dict[str, bytes]], _Made]
) -> Generator[_Made, None, None]:
    """`make(row, image bytes by column)` of each row, in order; a few rows are fetched ahead."""

    def fetch(row: _Row) -> _Made:
        return make(row, {name: _image(root, row, name) for name in _IMAGES if row[name] is not None})

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting: deque[Future[_Made]] = deque()
        for row in rows:
            waiting.append(pool.submit(fetch, row))
            if len(waiting) >= 2 * _NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _image(root: Folder, row: _Row, name: str) -> bytes:
    """Raises DataError if it is not there, OSError when the store is in trouble."""
    try:
        return root.read(row[name])
    except OSError as error:
        if not is_absent(error):
            raise
        raise DataError(f"the {name} image {row[name]!r} of row {row['id']} is not in {root.url}") from error


# ---- Hugging Face


def _hub_schema() -> pa.Schema:
    """The ledger's columns with images as {bytes, path}, and the note by which `datasets` knows them as images."""
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [
        pa.field(field.name, cell) if field.name in _IMAGES else field
        for field in LEDGER_SCHEMA
        if field.name not in _LEFT_OUT
    ]
    # Source: the "huggingface" key of a parquet schema's metadata, as datasets' `Features.arrow_schema` writes it.
    features = {
        field.name: {"_type": "Image"} if field.name in _IMAGES else {"dtype": _hub_type(field.type), "_type": "Value"}
        for field in fields
    }
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _hub_type(kind: pa.DataType) -> str:
    return {"double": "float64"}.get(str(kind), str(kind))


def _write_hub(
    source: Iterator[_Row], root: Folder, output: Folder, *, split: str, num_rows: int, rows_per_file: int
) -> None:
    schema = _hub_schema()
    num_files = -(-num_rows // rows_per_file)

    def make(row: _Row, images: dict[str, bytes]) -> _Row:
        cells = {
            name: {"bytes": images[name], "path": row[name].rsplit("/", 1)[-1]} if name in images else None
            for name in _IMAGES
        }
        return {name: cells[name] if name in cells else row[name] for name in schema.names}

    with closing(_with_images(source, root, make)) as rows:
        for number in range(num_files):
            name = f"data/{_HUB_SPLITS.get(split, split)}-{number:05d}-of-{num_files:05d}.parquet"
            left = min(rows_per_file, num_rows - number * rows_per_file)
            with output.publish(name) as path, pq.ParquetWriter(path, schema) as writer:
                while left:
                    group = [next(rows) for _ in range(min(_GROUP_ROWS, left))]
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    left -= len(group)


# ---- MGIE's own


def _write_mgie(ledger: Folder, root: Folder, output: Folder, splits: set[str], bar: Bar) -> None:
    def make(row: _Row, images: dict[str, bytes]) -> tuple[bytes, str]:
        line = b"\t".join(base64.b64encode(_as_jpeg(images[name])) for name in ("source", "goal"))
        texts = {"instruction": row["instruction"], "expressive": row["expressive"]}
        return line, f"{json.dumps(str(row['id']))}: {json.dumps(texts, ensure_ascii=False)}"

    with (
        output.publish(TSV_FILE) as tsv_path,
        output.publish(JSON_FILE) as json_path,
        tsv_path.open("wb") as tsv,
        json_path.open("w", encoding="utf-8") as expressive,
        closing(_with_images(_rows(ledger, splits, bar), root, make)) as rows,
    ):
        separator = "{\n"
        for line, item in rows:
            tsv.write(line + b"\n")
            expressive.write(separator + item)  # by hand: the whole object need not fit in memory
            separator = ",\n"
        expressive.write("\n}\n")


def _as_jpeg(data: bytes) -> bytes:
    """JPEG files as they are, unless a camera may have noted how to turn them; all else upright at quality 95."""
    if detect_format(data) == "JPEG" and b"Exif\0\0" not in data[:65536]:
        return data
    out = io.BytesIO()
    read_image(data).save(out, format="jpeg", quality=DEFAULT_QUALITY["jpeg"])
    return out.getvalue()


def _run(config: ExportConfig, *, console: Console) -> Ending:
    splits = export(config, console=console)
    shown = ", ".join(f"{name} {count}" for name, count in splits.items())
    return Ending(said=f"exported {sum(splits.values())} rows ({shown}) to {config.out}")


def main() -> int:
    """The export as a command; returns the exit status."""
    return run_command(ExportConfig, _run, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
