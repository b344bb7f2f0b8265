"""What is scored: rows of a ledger or manifest, alone or chained to sessions, with results that are there already.

Plain Python, no Ray. Rows come in the order of their ids, which are hashes: the first so many are a random choice.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from mgie.data.ledger import EDITS_SCHEMA, is_ledger, read_latest, read_ledger, read_manifest, rejection, to_table
from mgie.errors import ConfigError, DataError
from mgie.evaluation.metrics import METRICS, Metric, NetworkName, RowScorer
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent
from pipelines.runs.settings import load_named

COPY, CEILING, EDITED = "copy", "vae ceiling", "edited"
"Settings that are no sampling: the input as it is, the goal through the VAE; and the one of a run without a sweep."
IMAGES = ("source", "goal", "mask", "edited")
PLANNED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        *(pa.field(name, pa.string()) for name in (*IMAGES, "source_caption", "goal_caption")),
        pa.field("turns", pa.string(), nullable=False),
        pa.field("facts", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""A row to be scored: source of the first turn, goal and mask of the last, and
edited   URI of a result that is there already, below the folder of results
turns    JSON list of {id, instruction, expressive}: the edits to be made, one after the other
facts    JSON object: what rows can be grouped by, and what a `RowScorer` needs to know of them
"""
SCORE_ROW_SCHEMA = pa.schema([*PLANNED_SCHEMA, *(pa.field(f"{name}_data", pa.binary()) for name in IMAGES)])


def scores_schema(metrics: Mapping[str, Metric]) -> pa.Schema:
    """Columns of scores by these metrics; null where one was not measured."""
    texts = ("source", "goal", "edited", "instruction", "expressive", "facts")
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("setting", pa.string(), nullable=False),
            pa.field("attempt", pa.int32(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            *(pa.field(name, pa.string()) for name in texts),
            *(pa.field(name, pa.float64()) for name in metrics),
        ]
    )


SCORES_SCHEMA = scores_schema(METRICS)
"""One row per id, setting and attempt:
setting      `copy`, `vae ceiling`, `edited`, or a scale of a sweep
edited       URI of the result; null for baselines
instruction  of the last turn        expressive   what guided its edit
then the metrics (`mgie.evaluation.metrics.METRICS`, and those of a `RowScorer`)
"""

Protocol = Literal["single-turn", "multi-turn"]
Row = dict[str, Any]

_COLUMNS = ["id", "dataset", "split", "source", "goal", "mask", "instruction", "source_caption", "goal_caption", "turn", "session", "provenance"]  # fmt: skip
_FACTS = ("dataset", "split", "turn", "session")


def read_rows(
    folder: Folder, *, split: str, max_rows: int | None, protocol: Protocol, gives_expressive: bool
) -> list[Row]:
    """Rows to be scored (`PLANNED_SCHEMA`), of their first attempt.

    Args:
        folder: Ledger or manifest. split: Of which; `all`.
        max_rows: At most so many; None = all.
        protocol: `multi-turn` makes one row of each session: its turns edited one after the other.
        gives_expressive: Whether the ledger's expressive instructions are given to the model.

    Raises:
        ConfigError: Expressive instructions are asked for of a manifest.
        DataError: The folder cannot be read, there are no such rows, or they have no sessions.
    """
    found = [row for row in _read(folder, gives_expressive=gives_expressive) if split in ("all", row["split"])]
    if not found:
        raise DataError(f"{folder.url} holds no rows of split {split!r}")
    chains = [[row] for row in found] if protocol == "single-turn" else _sessions(found)
    rows = [
        _planned(chain) | {"reason": _problem(chain, protocol, gives_expressive=gives_expressive)} for chain in chains
    ]
    return sorted(rows, key=lambda row: int(row["id"]))[:max_rows]


def _read(folder: Folder, *, gives_expressive: bool) -> list[Row]:
    has_attempts = is_ledger(folder)
    if gives_expressive and not has_attempts:
        raise ConfigError(f"{folder.url} is no ledger: it has no expressive instructions to give")
    columns = [*_COLUMNS, "expressive"] if gives_expressive else _COLUMNS
    # Also the rows that got no expressive instruction: the data set is scored, not the ledger.
    batches = (
        read_ledger(folder, status=None, columns=columns) if has_attempts else read_manifest(folder, columns=columns)
    )
    rows: list[Row] = pa.Table.from_batches(batches).to_pylist()
    return rows


def _sessions(rows: Sequence[Row]) -> list[list[Row]]:
    """The turns of each session, in order."""
    sessions: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["session"] is None or row["turn"] is None:
            raise DataError(f"row {row['id']} has no session and turn, which the multi-turn protocol needs")
        sessions[row["dataset"], row["split"], row["session"]].append(row)
    return [sorted(turns, key=lambda row: row["turn"]) for turns in sessions.values()]


def _planned(chain: Sequence[Row]) -> Row:
    first, last = chain[0], chain[-1]
    facts = json.loads(last["provenance"]) | {name: last[name] for name in _FACTS if last[name] is not None}
    return {
        "id": last["id"],
        "attempt": 1,
        "source": first["source"],
        "goal": last["goal"],
        "mask": last["mask"] if len(chain) == 1 else None,  # it does not cover what the turns before change
        "source_caption": first["source_caption"],
        "goal_caption": last["goal_caption"],
        "turns": json.dumps([{name: row.get(name) for name in ("id", "instruction", "expressive")} for row in chain]),
        "facts": json.dumps(facts, sort_keys=True),
    }


def _problem(chain: Sequence[Row], protocol: Protocol, *, gives_expressive: bool) -> str | None:
    """Why a row cannot be scored."""
    numbers = [row["turn"] for row in chain]
    if protocol == "multi-turn" and numbers != list(range(1, len(chain) + 1)):
        return rejection("bad_row", f"the session has turns {numbers}; none may be missing")
    if gives_expressive and not all(row["expressive"] for row in chain):
        return rejection("no_summary", "the ledger has no expressive instruction for the row")
    return None


def add_results(rows: Sequence[Row], results: Folder) -> list[Row]:
    """The rows with the results of a run of `edit` for their sources and instructions.

    Raises:
        DataError: The folder holds no such run, or several results for one source and instruction.
    """
    last = read_latest(results, EDITS_SCHEMA).to_pylist()
    if not last:
        raise DataError(f"{results.url} holds no results of pipelines/edit.py")
    found: dict[tuple[str, str], Row] = {}
    for row in last:
        key = row["image"], row["instruction"]
        if key in found:
            raise DataError(f"{results.url} holds several results for {key[0]} and {key[1]!r}: which one is meant?")
        found[key] = row
    return [_with_result(row, found) for row in rows]


def _with_result(row: Row, found: Mapping[tuple[str, str], Row]) -> Row:
    result = found.get((row["source"], json.loads(row["turns"])[0]["instruction"]))
    if result is None:
        return row | {"reason": rejection("missing_file", "there is no result for the row")}
    return row | {"edited": result["edited"], "reason": row["reason"] or result["reason"]}


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What is done with every row."""

    bundle: str | None
    "who edits; None = results are there already"
    settings: Mapping[str, Mapping[str, Any]]
    "sampling settings by the name of the setting; a single `edited` where results are there already"
    has_ceiling: bool
    "whether the goal through the VAE is scored too"
    networks: Mapping[NetworkName, str]
    "where each network is"
    scorer: str | None = None
    "`module:callable` that makes a RowScorer"
    seed: int
    "a row's own seed follows from it and the row's id"
    batch_size: int
    device: str
    dtype: str

    @property
    def names(self) -> tuple[str, ...]:
        """All settings, baselines first."""
        return (COPY, *([CEILING] if self.has_ceiling else []), *self.settings)

    @property
    def metrics(self) -> dict[str, Metric]:
        """All that may be measured, by name of the column."""
        return metrics_of(self.scorer)


def open_scorer(name: str | None) -> RowScorer | None:
    """The scorer of a name. Raises ConfigError if there is none."""
    return load_named(name, param="scorer")() if name else None


def metrics_of(scorer: str | None) -> dict[str, Metric]:
    """All that may be measured with a scorer, by name of the column."""
    opened = open_scorer(scorer)
    return {**METRICS, **(opened.metrics if opened else {})}


class FetchPictures:
    """Reads the images of planned rows.

    Args:
        images: Folder of source, goal and mask. results: Folder of results that are there already.
    """

    def __init__(self, images: Folder, results: Folder) -> None:
        self._folders = dict.fromkeys(IMAGES, images) | {"edited": results}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the bytes, or a reason."""
        return to_table([row | self._fetch(row) for row in table.to_pylist()], SCORE_ROW_SCHEMA)

    def _fetch(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in [name for name in IMAGES if row[name] is not None and row["reason"] is None]:
            try:
                found[f"{name}_data"] = self._folders[name].read(row[name])
            except DataError as error:
                return {"reason": rejection("bad_row", f"{name}: {error}")}
            except OSError as error:
                if not is_absent(error):
                    raise  # the store is in trouble, not the row: the task fails and is tried again
                return {"reason": rejection("missing_file", f"{name}: {row[name]}")}
        return found
