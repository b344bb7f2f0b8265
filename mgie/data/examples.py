"""The rows that a run trains on, by number: frozen from a ledger when the run begins, then read where they lie.

A ledger may be compacted or grow while a run goes on for days. So a run keeps its own copy of what it needs of each
row (id, words, URIs of the images) as Arrow files, which are memory-mapped: any row is at hand, and a million rows
cost no memory. Images stay where they are; their content follows from the id.

Knows nothing of order, batches or stores of images.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from mgie.data.collate import EditExample
from mgie.errors import DataError, ImageError
from mgie.images.files import read_image
from mgie.storage.retry import is_absent

COLUMNS = ("id", "dataset", "split", "session", "source", "goal", "instruction", "expressive")  # of a ledger
TRAIN_FILE, VALIDATION_FILE = "train.arrow", "validation.arrow"
_SCHEMA = pa.schema(
    [("id", pa.int64()), *((name, pa.string()) for name in ("source", "goal", "instruction", "expressive"))]
)
_BATCH_ROWS = 4096
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ExampleCounts:
    """What was frozen."""

    num_train: int
    num_validation: int
    fingerprint: str
    "hash of ids and words, in order"
    datasets: tuple[str, ...]
    "names of the data sets, sorted"


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """A row without its images."""

    id: int
    source: str
    goal: str
    instruction: str
    expressive: str


def freeze_examples(
    batches: Iterable[pa.RecordBatch], folder: Path, *, validation_share: float, needs_expressive: bool = True
) -> ExampleCounts:
    """Writes the rows of a ledger to `folder`: `train.arrow` and `validation.arrow`.

    Rows of split `val` validate, those of `test` are left out. Where there are none of `val`, a share of the
    training *photos* (or sessions) validates, with all their rows: by hash, so that the same photo always does.

    Args:
        batches: Rows with `COLUMNS`.
        needs_expressive: Every row must have an expressive instruction.

    Raises:
        DataError: A row lacks words, or no row is left to train on.
    """
    table = pa.Table.from_batches([batch.select(COLUMNS) for batch in batches])
    table = table.filter(pc.not_equal(table["split"], "test"))
    for column in ("instruction", "expressive") if needs_expressive else ("instruction",):
        is_blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(table[column]), ""), fill_value=True)
        if without := table["id"].filter(is_blank).to_pylist():
            ids = ", ".join(map(str, without[:_SHOWN]))
            raise DataError(
                f"{len(without)} of {len(table)} rows have no {column} (ids {ids}{', ...' * (len(without) > _SHOWN)}); "
                "complete the ledger with pipelines/summarize.py --retry-failed"
            )
    validates = pc.equal(table["split"], "val")
    if not pc.any(validates).as_py():
        # The turns of a session are edits of one photo.
        photos = pc.coalesce(table["session"], table["source"]).to_pylist()
        validates = pa.chunked_array([[_share_of(photo) < validation_share for photo in photos]], pa.bool_())
    place = table.schema.get_field_index("expressive")
    table = table.set_column(place, "expressive", pc.fill_null(table["expressive"], ""))
    train, validation = table.filter(pc.invert(validates)), table.filter(validates)
    if not len(train):
        raise DataError(f"no row is left to train on: of {len(table)} rows {len(validation)} validate")
    digest = hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in ((TRAIN_FILE, train), (VALIDATION_FILE, validation)):
        with ExitStack() as stack:
            sink = stack.enter_context(pa.OSFile(str(folder / name), "wb"))
            writer = stack.enter_context(pa.ipc.new_file(sink, _SCHEMA))
            for batch in part.select(_SCHEMA.names).cast(_SCHEMA).combine_chunks().to_batches(_BATCH_ROWS):
                digest.update(repr(batch.to_pydict()).encode())
                writer.write_batch(batch)
    return ExampleCounts(
        num_train=len(train),
        num_validation=len(validation),
        fingerprint=digest.hexdigest()[:16],
        datasets=tuple(sorted(pc.unique(table["dataset"]).to_pylist())),
    )


class Examples:
    """Frozen rows, and their images.

    Args:
        path: A file of `freeze_examples`.
        read_bytes: Content of the image with a URI of the rows; raises OSError.

    Raises:
        DataError: The file is damaged.
    """

    def __init__(self, path: Path, read_bytes: Callable[[str], bytes]) -> None:
        self._read_bytes = read_bytes
        try:
            with pa.memory_map(str(path)) as mapped:
                self._table = pa.ipc.open_file(mapped).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"rows of the run, {path}, cannot be read: {error}") from error
        self.ids: npt.NDArray[np.int64] = self._table.column("id").to_numpy()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> ExampleRow:
        """Row `number`, from 0."""
        return ExampleRow(**{name: self._table.column(name)[number].as_py() for name in _SCHEMA.names})

    def rows(self) -> Iterator[ExampleRow]:
        """All of them."""
        return map(self.row, range(len(self)))

    def read(self, row: ExampleRow) -> EditExample:
        """The row with its images.

        Raises:
            DataError: An image is missing or damaged; names the row.
            OSError: The store is in trouble.
        """
        source, goal = self.read_source(row), self._image("goal", row.goal, row)
        return EditExample(source=source, goal=goal, instruction=row.instruction, expressive=row.expressive)

    def read_source(self, row: ExampleRow) -> Image.Image:
        """The row's source image alone. Raises as `read`."""
        return self._image("source", row.source, row)

    def _image(self, name: str, uri: str, row: ExampleRow) -> Image.Image:
        try:
            return read_image(self._read_bytes(uri))
        except (OSError, ImageError) as error:
            if isinstance(error, OSError) and not is_absent(error):
                raise
            raise DataError(f"{name} image {uri} of row {row.id} cannot be read: {error}") from error


def _share_of(photo: str) -> float:
    """A number in [0, 1) that follows from the photo's URI."""
    return int.from_bytes(hashlib.sha256(photo.encode()).digest()[:6], "big") / 2**48
