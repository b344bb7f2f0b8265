import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mgie.data.ledger import EDITS_SCHEMA, rejection_code, to_table
from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Folder, open_folder
from pipelines.stages.score_rows import PLANNED_SCHEMA, add_results, read_rows
from tests.pipelines.evaluation_data import drawn_rows, row, session_rows, write_ledger, write_manifest


def _read(folder: Path, **given: Any) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {"split": "all", "max_rows": None, "protocol": "single-turn", "gives_expressive": False}
    return read_rows(open_folder(folder), **(defaults | given))


def _turns(planned: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(planned["turns"])
    return found


def test_rows_come_in_the_order_of_ids_whatever_that_of_the_files(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 6)
    found = _read(write_manifest(tmp_path, rows))
    assert [one["id"] for one in found] == sorted(one["id"] for one in rows)
    assert _read(write_manifest(tmp_path, rows[::-1])) == found
    assert _read(tmp_path / "manifest", max_rows=2) == found[:2]
    to_table(found, PLANNED_SCHEMA)
    assert json.loads(found[0]["facts"])["kind"] in "ab"
    assert [one["reason"] for one in found] == [None] * 6


def test_a_split_is_chosen(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 4)
    rows[1]["split"] = "val"
    assert [one["id"] for one in _read(write_manifest(tmp_path, rows), split="val")] == [rows[1]["id"]]
    with pytest.raises(DataError, match="holds no rows of split 'train'"):
        _read(tmp_path / "manifest", split="train")


def test_all_rows_of_a_ledger_are_scored_unless_its_words_are_given_and_lacking(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 3)
    rows[0]["expressive"], rows[1]["expressive"] = "It is dark.", "It is light."
    ledger = write_ledger(tmp_path, rows)
    free, given = _read(ledger), _read(ledger, gives_expressive=True)
    assert [one["reason"] for one in free] == [None] * 3
    assert [turn["expressive"] for one in free for turn in _turns(one)] == [None] * 3
    by_id = {one["id"]: one for one in given}
    assert [_turns(by_id[one["id"]])[0]["expressive"] for one in rows] == ["It is dark.", "It is light.", None]
    assert rejection_code(by_id[rows[2]["id"]]["reason"]) == "no_summary"
    assert by_id[rows[0]["id"]]["reason"] is None
    with pytest.raises(ConfigError, match="is no ledger"):
        _read(write_manifest(tmp_path, rows), gives_expressive=True)


def test_a_session_is_one_row_from_its_first_source_to_its_last_goal(tmp_path: Path) -> None:
    three, one = session_rows(tmp_path, "s", [1, 2, 3]), session_rows(tmp_path, "t", [1])
    found = {x["id"]: x for x in _read(write_manifest(tmp_path, [*three[::-1], *one]), protocol="multi-turn")}
    assert set(found) == {three[2]["id"], one[0]["id"]}
    chain = found[three[2]["id"]]
    assert (chain["source"], chain["goal"], chain["mask"]) == (three[0]["source"], three[2]["goal"], None)
    assert [turn["id"] for turn in _turns(chain)] == [x["id"] for x in three]
    assert [turn["instruction"] for turn in _turns(chain)] == [x["instruction"] for x in three]
    assert found[one[0]["id"]]["mask"] == one[0]["mask"]
    assert len(_read(tmp_path / "manifest")) == 4  # single-turn: every turn from the source that the data set has


@pytest.mark.parametrize("turns", [[1, 3], [2], [2, 3]])
def test_a_session_that_lacks_a_turn_is_not_scored(tmp_path: Path, turns: list[int]) -> None:
    rows = session_rows(tmp_path, "s", turns)
    [found] = _read(write_manifest(tmp_path, rows), protocol="multi-turn")
    assert rejection_code(found["reason"]) == "bad_row"
    assert f"the session has turns {turns}" in found["reason"]
    assert [one["reason"] for one in _read(tmp_path / "manifest")] == [None] * len(turns)


def test_rows_without_sessions_cannot_be_chained(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 2)
    with pytest.raises(DataError, match="has no session and turn, which the multi-turn protocol needs"):
        _read(write_manifest(tmp_path, rows), protocol="multi-turn")


# ---- results that are there already


def _results(folder: Path, edits: list[dict[str, Any]]) -> Folder:
    folder.mkdir()
    defaults = {"seed": 0, "attempt": 1, "status": "ok"}
    table = to_table([defaults | {"id": number} | edit for number, edit in enumerate(edits)], EDITS_SCHEMA)
    pq.write_table(table, folder / "part-0.parquet")
    return open_folder(folder)


def test_results_are_found_by_source_and_instruction(tmp_path: Path) -> None:
    rows = [row(i, source=f"{i}.png", goal="g.png") for i in range(3)]
    planned = _read(write_manifest(tmp_path, rows))
    edits = [
        {"image": "0.png", "instruction": rows[0]["instruction"], "edited": "images/a.png"},
        {"id": 7, "image": "1.png", "instruction": rows[1]["instruction"], "status": "rejected", "reason": "edit_failed: x"},
        {"id": 7, "image": "1.png", "instruction": rows[1]["instruction"], "edited": "images/b.png", "attempt": 2},
        {"image": "2.png", "instruction": "another"},
    ]  # fmt: skip
    found = {one["id"]: one for one in add_results(planned, _results(tmp_path / "results", edits))}
    first, second, third = (found[one["id"]] for one in rows)
    assert (first["edited"], first["reason"]) == ("images/a.png", None)
    assert (second["edited"], second["reason"]) == ("images/b.png", None)
    assert rejection_code(third["reason"]) == "missing_file"


def test_results_that_do_not_tell_which_one_are_refused(tmp_path: Path) -> None:
    planned = _read(write_manifest(tmp_path, [row(0, source="0.png", goal="g.png")]))
    twice = [{"image": "0.png", "instruction": "x", "seed": seed} for seed in (1, 2)]
    with pytest.raises(DataError, match=r"holds several results for 0\.png and 'x'"):
        add_results(planned, _results(tmp_path / "results", twice))
    with pytest.raises(DataError, match=r"holds no results of pipelines/edit\.py"):
        add_results(planned, open_folder(tmp_path / "none"))
    with pytest.raises(DataError, match="does not have the expected columns"):
        add_results(planned, open_folder(tmp_path / "manifest"))
