import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from mgie.data.ledger import (
    LEDGER_SCHEMA,
    MANIFEST_SCHEMA,
    compact_ledger,
    count_ledger,
    images_root,
    list_parquet,
    read_edits,
    read_ledger,
    read_manifest,
    rejection,
    rejection_code,
    row_id,
    split_rows,
    to_table,
    write_images_root,
)
from mgie.errors import DataError
from mgie.storage.folder import Folder, open_folder, resolve_uri

LOCAL = pafs.LocalFileSystem()
ROW: dict[str, Any] = {
    "dataset": "d",
    "split": "train",
    "source": "a_0.jpg",
    "goal": "a_1.jpg",
    "instruction": "make it night",
    "provenance": "{}",
}


def _row(number: int, attempt: int = 1, status: str = "ok", **changes: Any) -> dict[str, Any]:
    return {**ROW, "id": number, "attempt": attempt, "status": status, **changes}


def _write(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema = LEDGER_SCHEMA) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(to_table(rows, schema), folder / name)


def _read(folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [row for batch in read_ledger(open_folder(folder), **options) for row in batch.to_pylist()]


def test_edits_are_read_of_ledgers_and_of_manifests(tmp_path: Path) -> None:
    columns = ["id", "expressive", "instruction"]
    _write(tmp_path / "ledger", "a.parquet", [_row(1, expressive="Night."), _row(2, status="rejected")])
    _write(tmp_path / "manifest", "a.parquet", [{**ROW, "id": 1}, {**ROW, "id": 2}], MANIFEST_SCHEMA)
    read = {
        name: [row for batch in read_edits(open_folder(tmp_path / name), columns=columns) for row in batch.to_pylist()]
        for name in ("ledger", "manifest")
    }
    words = {"instruction": "make it night"}
    assert read["ledger"] == [{"id": 1, "expressive": "Night.", **words}]
    assert read["manifest"] == [{"id": 1, "expressive": None, **words}, {"id": 2, "expressive": None, **words}]


# ---- identity


def test_row_id_is_what_it_was_when_the_first_manifests_were_written() -> None:
    """Ids are stored for years: this number must never change."""
    assert row_id(b"source", b"goal", "make it night", "forward") == 248339616512510693


def test_row_id_depends_on_each_part_and_on_where_one_ends() -> None:
    ids = [
        row_id(b"ab", b"c", "x", "forward"),
        row_id(b"a", b"bc", "x", "forward"),
        row_id(b"c", b"ab", "x", "forward"),
        row_id(b"ab", b"c", "y", "forward"),
        row_id(b"ab", b"c", "x", "inverse"),
    ]
    assert len(set(ids)) == 5


@given(st.binary(max_size=8), st.binary(max_size=8), st.text(max_size=8))
def test_row_id_fits_int64(source: bytes, goal: bytes, instruction: str) -> None:
    if instruction.isprintable():
        assert 0 <= row_id(source, goal, instruction, "forward") < 2**63


def test_the_code_of_a_reason_is_what_comes_before_the_colon() -> None:
    assert rejection_code(rejection("bad_image", "goal: it is damaged")) == "bad_image"


# ---- where images lie


@pytest.mark.parametrize(
    ("root", "uri", "expected"),
    [
        ("/data/x", "a/b.jpg", "/data/x/a/b.jpg"),
        ("s3://bucket/x/", "a b/ü%20#?.jpg", "s3://bucket/x/a b/ü%20#?.jpg"),
        ("/data", "./a//b.jpg", "/data/a/b.jpg"),
        ("/", "a", "/a"),
    ],
)
def test_a_uri_is_joined_to_its_root(root: str, uri: str, expected: str) -> None:
    assert resolve_uri(root, uri) == expected


@pytest.mark.parametrize(
    "uri", ["", "/etc/passwd", "../x", "a/../../x", "a/..", "s3://other/x", "file:///x", "a\0b", "a\nb"]
)
def test_a_uri_that_leads_out_is_refused(uri: str) -> None:
    with pytest.raises(DataError, match="relative path"):
        resolve_uri("/data", uri)


@pytest.mark.parametrize("root", ["/somewhere/else", "s3://bucket/prefix"])
def test_an_absolute_root_is_read_as_it_was_written(root: str, tmp_path: Path) -> None:
    write_images_root(open_folder(tmp_path), root)
    assert images_root(open_folder(tmp_path)) == root
    assert images_root(open_folder(tmp_path), moved_to="/new") == "/new"


def test_a_relative_root_moves_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "manifest").mkdir(parents=True)
    write_images_root(open_folder(tmp_path / "run" / "manifest"), "..")
    assert images_root(open_folder(tmp_path / "run" / "manifest")) == str(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert images_root(open_folder(tmp_path / "moved" / "manifest")) == str(tmp_path / "moved")


def test_a_folder_without_root_was_not_finished(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="does not exist or is empty"):
            images_root(open_folder(folder))
    (tmp_path / "part-a.parquet").touch()
    with pytest.raises(DataError, match="did not finish"):
        images_root(open_folder(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "root": "x"}'])
def test_a_damaged_root_is_a_data_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text(content)
    with pytest.raises(DataError, match=r"images\.json"):
        images_root(open_folder(tmp_path))


# ---- reading


def test_the_ledger_reader_returns_the_highest_attempt_of_each_id(tmp_path: Path) -> None:
    _write(tmp_path / "l", "b.parquet", [_row(1, 2, verbose="new"), _row(3, 1, "rejected", reason="x: y")])
    _write(
        tmp_path / "l", "a.parquet", [_row(1, 1, "rejected", reason="x: y"), _row(2, 1), _row(3, 2, verbose="newer")]
    )
    assert [(r["id"], r["attempt"]) for r in _read(tmp_path / "l")] == [(2, 1), (3, 2), (1, 2)]  # order of the files
    assert {r["id"]: r["verbose"] for r in _read(tmp_path / "l", status=None)} == {1: "new", 2: None, 3: "newer"}


def test_a_row_whose_last_attempt_failed_is_rejected(tmp_path: Path) -> None:
    _write(tmp_path / "l", "a.parquet", [_row(1), _row(2, 1), _row(2, 2, "rejected", reason="x: y")])
    assert [r["id"] for r in _read(tmp_path / "l")] == [1]
    assert [(r["id"], r["reason"]) for r in _read(tmp_path / "l", status="rejected")] == [(2, "x: y")]


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.booleans()), min_size=1, max_size=30),
    batch_rows=st.integers(1, 7),
)
def test_the_ledger_reader_equals_a_plain_loop(
    rows: list[tuple[int, int, bool]], batch_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    for part in range(0, len(rows), 8):
        some = [
            _row(number, attempt, "ok" if is_ok else "rejected", verbose=str(part + i))
            for i, (number, attempt, is_ok) in enumerate(rows[part : part + 8])
        ]
        _write(folder, f"{part:03d}.parquet", some)
    best: dict[int, tuple[int, int, bool]] = {}
    for place, (number, attempt, is_ok) in enumerate(rows):
        if number not in best or attempt > best[number][0]:
            best[number] = (attempt, place, is_ok)
    found = _read(folder, status=None, batch_rows=batch_rows)
    assert {(r["id"], r["attempt"], r["verbose"]) for r in found} == {(n, a, str(p)) for n, (a, p, _) in best.items()}
    assert len(found) == len(best)
    counts = count_ledger(open_folder(folder))
    assert counts.num_rows == len(rows)
    assert (counts.num_ids, counts.num_ok) == (len(best), sum(is_ok for _, _, is_ok in best.values()))
    assert counts.num_ok + counts.num_rejected == counts.num_ids
    assert counts.num_repeated == len(rows) - len({(number, attempt) for number, attempt, _ in rows})


def test_columns_are_chosen_in_order(tmp_path: Path) -> None:
    _write(tmp_path / "l", "a.parquet", [_row(1)])
    (batch,) = read_ledger(open_folder(tmp_path / "l"), columns=["instruction", "id"])
    assert batch.schema.names == ["instruction", "id"]
    with pytest.raises(DataError, match="nonsense"):
        list(read_ledger(open_folder(tmp_path / "l"), columns=["nonsense"]))


def test_a_ledger_without_good_rows_is_a_data_error(tmp_path: Path) -> None:
    _write(tmp_path / "l", "a.parquet", [_row(1, 1, "rejected")])
    with pytest.raises(DataError, match="no rows of status 'ok'"):
        _read(tmp_path / "l")
    assert len(_read(tmp_path / "l", status=None)) == 1


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_no_rows_is_a_data_error(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no rows"):
        _read(tmp_path / folder)
    with pytest.raises(DataError, match="no rows"):
        list(read_manifest(open_folder(tmp_path / folder)))
    assert count_ledger(open_folder(tmp_path / folder)).num_rows == 0


def test_missing_and_wrong_columns_are_named(tmp_path: Path) -> None:
    table = to_table([_row(1)], LEDGER_SCHEMA).drop_columns(["goal", "verbose"])
    table = table.set_column(table.schema.get_field_index("attempt"), "attempt", pa.array(["one"]))
    (tmp_path / "l").mkdir()
    pq.write_table(table, tmp_path / "l" / "a.parquet")
    with pytest.raises(DataError, match=r"attempt is string, not int32"):
        _read(tmp_path / "l", columns=["instruction"])
    with pytest.raises(DataError, match=r"missing columns goal.*"):
        list(read_manifest(open_folder(tmp_path / "l")))


def test_a_null_where_none_is_allowed_is_a_data_error(tmp_path: Path) -> None:
    schema = pa.schema([field.with_nullable(True) for field in MANIFEST_SCHEMA])
    _write(tmp_path / "m", "a.parquet", [{**ROW, "id": 1, "instruction": None}], schema)
    with pytest.raises(DataError, match="1 nulls in column 'instruction'"):
        list(read_manifest(open_folder(tmp_path / "m")))


def test_what_other_writers_make_of_the_types_is_read(tmp_path: Path) -> None:
    """Ray and pandas write text as large strings, integers as int64, and a column of nulls without a type."""
    table = to_table([_row(1), _row(2)], LEDGER_SCHEMA)
    for name, column in (
        ("instruction", table["instruction"].cast(pa.large_string())),
        ("attempt", table["attempt"].cast(pa.int64())),
        ("mask", pa.nulls(2)),
        ("extra", pa.array([1, 2])),
    ):
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    (tmp_path / "l").mkdir()
    pq.write_table(table, tmp_path / "l" / "a.parquet")
    (batch,) = read_ledger(open_folder(tmp_path / "l"))
    assert batch.schema == LEDGER_SCHEMA


def test_a_damaged_file_is_a_data_error(tmp_path: Path) -> None:
    _write(tmp_path / "l", "a.parquet", [_row(1)])
    data = (tmp_path / "l" / "a.parquet").read_bytes()
    (tmp_path / "l" / "a.parquet").write_bytes(data[:-5])
    with pytest.raises(DataError, match="cannot be read"):
        _read(tmp_path / "l")


def test_hidden_files_are_no_part_of_a_folder(tmp_path: Path) -> None:
    for name in (".a.parquet", "_a.parquet", "b.parquet", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.parquet").mkdir()
    assert list_parquet(open_folder(tmp_path)) == [str(tmp_path / "b.parquet")]


# ---- rewriting


def test_compaction_keeps_what_the_reader_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in range(5):
        rows = [_row(int(i), part + 1, "ok" if i % 3 else "rejected", verbose=f"{part}") for i in rng.permutation(20)]
        _write(tmp_path / "l", f"{part}.parquet", rows)
    before = _read(tmp_path / "l", status=None)
    counts = compact_ledger(open_folder(tmp_path / "l"), rows_per_file=7)
    assert (counts.num_rows, counts.num_ids) == (100, 20)
    assert _read(tmp_path / "l", status=None) == before
    assert len(list_parquet(open_folder(tmp_path / "l"))) == 3
    again = compact_ledger(open_folder(tmp_path / "l"))
    assert (again.num_rows, again.num_repeated) == (20, 0)
    assert _read(tmp_path / "l", status=None) == before


def test_compaction_killed_before_the_old_files_go_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "l", "a.parquet", [_row(1), _row(2)])
    _write(tmp_path / "l", "b.parquet", [_row(2, 2), _row(3)])

    class KilledError(Exception):
        pass

    class FileSystem(pafs.LocalFileSystem):
        """Reads and writes as any, and dies at the first deletion."""

        def delete_file(self, path: str) -> None:
            raise KilledError(path)

    with pytest.raises(KilledError):
        compact_ledger(Folder(str(tmp_path / "l"), FileSystem(), str(tmp_path / "l")))
    assert len(list_parquet(open_folder(tmp_path / "l"))) == 3
    assert sorted((r["id"], r["attempt"]) for r in _read(tmp_path / "l")) == [(1, 1), (2, 2), (3, 1)]
    compact_ledger(open_folder(tmp_path / "l"))
    assert len(list_parquet(open_folder(tmp_path / "l"))) == 1
    assert sorted((r["id"], r["attempt"]) for r in _read(tmp_path / "l")) == [(1, 1), (2, 2), (3, 1)]


@given(sizes=st.lists(st.integers(0, 9), max_size=6), rows_per_table=st.integers(1, 10))
def test_split_rows_regroups_and_keeps_the_order(sizes: list[int], rows_per_table: int) -> None:
    schema = pa.schema([("x", pa.int64())])
    start = np.cumsum([0, *sizes])
    batches = [pa.record_batch([np.arange(a, b)], schema=schema) for a, b in itertools.pairwise(start)]
    tables = list(split_rows(batches, schema, rows_per_table))
    assert [x for table in tables for x in table["x"].to_pylist()] == list(range(sum(sizes)))
    assert all(len(table) == rows_per_table for table in tables[:-1])
    assert len(tables[-1]) <= rows_per_table


def test_rows_that_do_not_fit_the_schema_are_a_data_error() -> None:
    with pytest.raises(DataError, match="schema"):
        to_table([{"id": "seven"}], MANIFEST_SCHEMA)
