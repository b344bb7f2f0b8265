"""The rows of a training run in its folder: frozen from the ledgers when it begins, opened by each worker.

    data/<k>/train.arrow, validation.arrow   rows of ledger k, see `mgie.data.examples`
    data/data.json                           `FrozenRows`, written last

Knows nothing of models or Ray.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from mgie.data.examples import COLUMNS, TRAIN_FILE, VALIDATION_FILE, ExampleCounts, Examples, freeze_examples
from mgie.data.ledger import images_root, read_edits
from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import with_retries
from pipelines.runs.run_record import fingerprint

DATA, RECORD_FILE = "data", "data/data.json"
_FORMAT = 1
_SHARD_ROWS_0_1 = 2048  # of runs that do not say it


@dataclass(frozen=True, kw_only=True)
class FrozenLedger:
    """What was taken of a ledger."""

    url: str
    images: str
    "root of the rows' images"
    counts: ExampleCounts


@dataclass(frozen=True, kw_only=True)
class FrozenRows:
    """`data.json`."""

    ledgers: tuple[FrozenLedger, ...]
    shard_rows: int = 0
    "neighbouring rows that an epoch keeps together; 0 = none, as in every run begun after version 0.1.0"

    @property
    def fingerprint(self) -> str:
        """Hash of all rows, in order."""
        return fingerprint([ledger.counts.fingerprint for ledger in self.ledgers])

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets, sorted."""
        return tuple(sorted({name for ledger in self.ledgers for name in ledger.counts.datasets}))

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return sum(ledger.counts.num_train for ledger in self.ledgers)

    @property
    def num_validation(self) -> int:
        """Rows to validate on."""
        return sum(ledger.counts.num_validation for ledger in self.ledgers)


@dataclass(frozen=True)
class OpenRows:
    """Each ledger's rows; lists of one length."""

    train: list[Examples]
    validation: list[Examples]


def freeze_rows(
    run: Folder, ledgers: Sequence[Folder], *, images: Sequence[str], validation_share: float, needs_expressive: bool
) -> FrozenRows:
    """The run's own copy of the ledgers' rows: made now, or when the run began.

    Args:
        images: Roots of the images instead of those that the ledgers name; none, or one per ledger.

    Raises:
        DataError: A ledger cannot be read, its rows lack words, or none is left to train on.
        OSError: A store is in trouble.
    """
    if run.exists(RECORD_FILE):
        return _read(run)
    frozen = []
    for number, ledger in enumerate(ledgers):
        root = images_root(ledger, moved_to=images[number] if images else None)
        batches = read_edits(ledger, columns=COLUMNS)
        with tempfile.TemporaryDirectory(prefix="mgie-rows-") as local:
            counts = freeze_examples(
                batches, Path(local), validation_share=validation_share, needs_expressive=needs_expressive
            )
            for name in (TRAIN_FILE, VALIDATION_FILE):
                with run.publish(f"{DATA}/{number}/{name}") as path:
                    shutil.copyfile(Path(local) / name, path)
        frozen.append(FrozenLedger(url=ledger.url, images=root, counts=counts))
    rows = FrozenRows(ledgers=tuple(frozen))
    record = {"format": _FORMAT, **dataclasses.asdict(rows)}
    run.write(RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    return rows


def _read(run: Folder) -> FrozenRows:
    try:
        content = json.loads(run.read(RECORD_FILE))
        if content["format"] != _FORMAT:
            raise DataError(f"{run.url}/{RECORD_FILE} has format {content['format']!r}; this program reads {_FORMAT}")
        ledgers = [
            FrozenLedger(
                url=ledger["url"],
                images=ledger["images"],
                counts=ExampleCounts(**{**ledger["counts"], "datasets": tuple(ledger["counts"]["datasets"])}),
            )
            for ledger in content["ledgers"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run.url}/{RECORD_FILE} is damaged: {error!r}") from error
    return FrozenRows(ledgers=tuple(ledgers), shard_rows=content.get("shard_rows", _SHARD_ROWS_0_1))


def open_rows(run: Folder, images: Sequence[Folder], scratch: Path) -> OpenRows:
    """The rows, memory-mapped: in place on a local disk, else from a copy in `scratch`.

    Args:
        images: Roots of the images, one per ledger.

    Raises:
        DataError: A file is damaged.
        OSError: The store is in trouble.
    """

    def path_of(name: str) -> Path:
        if run.is_local:
            return Path(run.at(name))
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        local = pafs.LocalFileSystem()
        with_retries(
            lambda: pafs.copy_files(
                run.at(name), str(path), source_filesystem=run.filesystem, destination_filesystem=local
            )
        )
        return path

    return OpenRows(
        *(
            [Examples(path_of(f"{DATA}/{number}/{name}"), root.read) for number, root in enumerate(images)]
            for name in (TRAIN_FILE, VALIDATION_FILE)
        )
    )
