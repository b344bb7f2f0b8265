"""What is special to each layout."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgie.data.ledger import rejection_code, to_table
from mgie.errors import DataError
from mgie.storage.folder import open_folder
from pipelines.readers import Columns, Layout, make_reader
from pipelines.readers.duplicates import PAIR_BYTES, find_duplicates
from pipelines.readers.manifest_rows import STAGED_SCHEMA
from pipelines.readers.plain_pickle import read_plain_pickle
from tests.pipelines import raw_data
from tests.pipelines.raw_data import Edit, bad, edits, good, picture, read_rows

_KEYS = st.sampled_from(
    ["input", "output", "request", "expert_summary", "img0", "img1", "sents", "uid", "edit", "instruction", "mask"]
)


def _read(layout: Layout, tmp_path: Path, columns: Columns = raw_data.OWN) -> list[dict[str, Any]]:
    return read_rows(layout, tmp_path / "raw", tmp_path / "out", columns)


# ---- IPr2Pr


def test_ipr2pr_splits_by_position_in_seeds_json(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", edits(20))
    listed = json.loads((tmp_path / "raw" / "seeds.json").read_text())
    (tmp_path / "raw" / "seeds.json").write_text(json.dumps(listed[::-1]))
    rows = _read("ipr2pr", tmp_path)
    assert [row["split"] for row in rows] == ["train"] * 18 + ["val", "test"]
    assert rows[-1]["source"].startswith("0000000/")  # the first folder by name is the last of the list


def test_ipr2pr_without_seeds_json_takes_folders_and_seeds_sorted(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", edits(3))
    (tmp_path / "raw" / "seeds.json").unlink()
    (tmp_path / "raw" / "0000001" / "7_1.jpg").write_bytes(picture(9))  # a goal without its source
    rows = _read("ipr2pr", tmp_path)
    assert [row["source"] for row in rows] == [
        "0000000/100_0.jpg",
        "0000001/101_0.jpg",
        "0000001/7_0.jpg",
        "0000002/102_0.jpg",
    ]
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["missing_file"]


def test_ipr2pr_takes_the_caption_under_either_name_and_the_edit_alone(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", edits(3))
    for name, prompt in (("0000000", {"caption": "a cat", "edit": "x"}), ("0000001", {"edit": "y"})):
        (tmp_path / "raw" / name / "prompt.json").write_text(json.dumps(prompt))
    rows = _read("ipr2pr", tmp_path)
    assert [row["source_caption"] for row in rows] == ["a cat", None, "a house"]


def test_ipr2pr_keeps_scores_and_survives_a_damaged_line_of_them(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", edits(1))
    lines = '{"seed": 100, "clip_sim_0": 0.25}\n{"seed": '
    (tmp_path / "raw" / "0000000" / "metadata.jsonl").write_text(lines)
    (row,) = _read("ipr2pr", tmp_path)
    assert json.loads(row["provenance"])["clip_sim_0"] == 0.25


def test_ipr2pr_rejects_every_seed_of_a_folder_without_prompt(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", edits(2))
    (tmp_path / "raw" / "seeds.json").write_text(json.dumps([["0000000", [100, 200]], ["0000001", [101]]]))
    (tmp_path / "raw" / "0000000" / "prompt.json").write_text("{")
    rows = _read("ipr2pr", tmp_path)
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_row", "bad_row"]
    assert len(good(rows)) == 1


def test_real_ipr2pr_samples_are_read(sample_photos: Path, tmp_path: Path) -> None:
    rows = read_rows("ipr2pr", sample_photos / "ipr2pr", tmp_path)
    assert len(rows) == 4
    assert bad(rows) == []
    assert len({row["id"] for row in rows}) == 4
    assert len({row["instruction"] for row in rows}) == 2
    assert {tuple(json.loads(row["provenance"])["source_wh"]) for row in rows} == {(512, 512)}


# ---- Hugging Face hub


def test_magicbrush_keeps_turns_sessions_masks_and_null_masks(tmp_path: Path) -> None:
    rows = edits(3)
    mask = picture(50, kind="png")
    raw_data.write_magicbrush(tmp_path / "raw", [Edit(rows[0].source, rows[0].goal, mask=mask), *rows[1:]])
    found = _read("magicbrush", tmp_path)
    assert bad(found) == []
    assert [(row["session"], row["turn"]) for row in found] == [("0", 1), ("0", 2), ("1", 1)]
    assert (tmp_path / "out" / found[0]["mask"]).read_bytes() == mask
    assert found[0]["mask"].endswith(".png")
    assert [row.get("mask") for row in found[1:]] == [None, None]
    assert {row["split"] for row in found} == {"val"}  # dev


def test_ultraedit_parts_are_training_data_and_null_masks_are_fine(tmp_path: Path) -> None:
    raw_data.write_ultraedit(tmp_path / "raw", edits(2))
    rows = _read("ultraedit", tmp_path)
    assert bad(rows) == []
    assert [(row["split"], row.get("mask")) for row in rows] == [("train", None)] * 2
    provenance = json.loads(rows[1]["provenance"])
    assert (provenance["hub_split"], provenance["idx"], provenance["clip_sim_source"]) == ("FreeForm_0", 1, 0.25)
    assert "ssim" not in provenance  # not a number is no score


def test_ultraedit_without_extra_columns_is_read(tmp_path: Path) -> None:
    raw_data.write_ultraedit(tmp_path / "raw", edits(2))
    (path,) = (tmp_path / "raw").glob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["mask_image", "ssim", "edit_object"]), path)
    assert len(good(_read("ultraedit", tmp_path))) == 2


def test_hq_edit_gives_each_edit_and_its_inverse(tmp_path: Path) -> None:
    raw_data.write_hq_edit(tmp_path / "raw", edits(2))
    there, back, *_ = _read("hq-edit", tmp_path)
    assert (back["source"], back["goal"]) == (there["goal"], there["source"])
    assert (back["source_caption"], back["goal_caption"]) == (there["goal_caption"], there["source_caption"])
    assert back["instruction"] == "undo: change number 0"
    assert back["id"] != there["id"]
    assert json.loads(back["provenance"])["direction"] == "inverse"


def test_images_out_of_tables_are_written_once(tmp_path: Path) -> None:
    source = picture(1)
    raw_data.write_instructpix2pix(
        tmp_path / "raw", [Edit(source, picture(2 + i), instruction=f"request {i}") for i in range(6)]
    )
    rows = _read("instructpix2pix", tmp_path)
    assert len({row["source"] for row in rows}) == 1
    assert len(list((tmp_path / "out" / "images").iterdir())) == 7
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert _read("instructpix2pix", tmp_path) == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()} == before


def test_a_table_of_another_layout_is_refused_by_its_columns(tmp_path: Path) -> None:
    raw_data.write_hq_edit(tmp_path / "raw", edits(2))
    with pytest.raises(DataError, match=r"lacks the columns .*edit_prompt"):
        _read("ultraedit", tmp_path)


def test_a_file_without_footer_is_one_rejected_row_and_the_rest_is_read(tmp_path: Path) -> None:
    raw_data.write_ultraedit(tmp_path / "raw", edits(2))
    (path,) = (tmp_path / "raw").glob("*.parquet")
    (tmp_path / "raw" / "FreeForm_1-00000-of-00001.parquet").write_bytes(path.read_bytes()[:-100])
    rows = _read("ultraedit", tmp_path)
    assert len(good(rows)) == 2
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_file"]
    assert "FreeForm_1" in bad(rows)[0]["reason"]


def test_a_damaged_row_group_is_one_rejected_row_and_the_others_are_read(tmp_path: Path) -> None:
    raw_data.write_ultraedit(tmp_path / "raw", edits(6))  # three row groups of two
    (path,) = (tmp_path / "raw").glob("*.parquet")
    column = pq.ParquetFile(path).metadata.row_group(1).column(5)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    path.write_bytes(data)
    rows = _read("ultraedit", tmp_path)
    assert [row["instruction"] for row in good(rows)] == [f"change number {i}" for i in (0, 1, 4, 5)]
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_file"]
    assert json.loads(good(rows)[2]["provenance"])["row"] == 4


def test_large_row_groups_are_streamed(tmp_path: Path) -> None:
    """Arrow's memory is that of a few pages, of a row group of 128 MB. (A page cannot be read in parts.)"""
    rows, cell = 256, os.urandom(250_000)
    blank = [{"bytes": cell, "path": None}] * rows
    table = {"input": ["a"] * rows, "edit": ["b"] * rows, "inverse_edit": ["c"] * rows, "output": ["d"] * rows}
    path = tmp_path / "raw" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    images = pa.array(blank, raw_data.IMAGE_CELL)
    pq.write_table(
        pa.table({**table, "input_image": images, "output_image": images}),
        path,
        use_dictionary=False,
        compression="NONE",
        write_batch_size=4,
    )
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    del blank, images
    raw = open_folder(path.parent)
    reader = make_reader("hq-edit", Columns())
    (shard,) = reader.shards(raw)
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for _ in reader.read(raw, shard):
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == 2 * rows
    assert most < 32 * 2**20, f"{most / 2**20:.0f} MB of a row group of 128 MB"


# ---- annotations


def test_magicbrush_test_folder_keeps_turns_masks_and_local_captions(tmp_path: Path) -> None:
    first, *rest = edits(3)
    mask = picture(51, kind="png")
    raw_data.write_magicbrush_test(
        tmp_path / "raw", [Edit(first.source, first.goal, mask=mask, goal_caption="only the hat"), *rest]
    )
    rows = _read("magicbrush-test", tmp_path)
    assert bad(rows) == []
    assert [(row["session"], row["turn"], row["split"]) for row in rows] == [
        ("9000", 1, "test"),
        ("9000", 2, "test"),
        ("9001", 1, "test"),
    ]
    assert rows[0]["goal_caption"] == "only the hat"
    assert (tmp_path / "raw" / rows[0]["mask"]).read_bytes() == mask
    assert rows[1].get("mask") is None


def test_magicbrush_test_folder_needs_no_captions(tmp_path: Path) -> None:
    raw_data.write_magicbrush_test(tmp_path / "raw", edits(2))
    (tmp_path / "raw" / "local_descriptions" / "captions.json").unlink()
    assert [row["source_caption"] for row in _read("magicbrush-test", tmp_path)] == [None, None]


def _write_requests(layout: Layout, folder: Path, requests: list[str]) -> None:
    """One photo pair with many requests, in the layouts that are made of such."""
    source, goal = picture(1), picture(2)
    match layout:
        case "gier":
            raw_data.write_gier(folder, [Edit(source, goal)])
            record = {"input": "0_O.jpg", "output": "0_E.jpg", "request": "please"}
            half = len(requests) // 2
            record |= {"expert_summary": requests[:half], "amateur_summary": requests[half:]}
            (folder / "splits" / "val.json").write_text(json.dumps([record]))
        case "ma5k":
            raw_data.write_ma5k(folder, [Edit(source, goal)])
            records = [
                {"input": "0_O.jpg", "output": "0_E.jpg", "request": one, "request_idx": i}
                for i, one in enumerate(requests)
            ]
            (folder / "annotations" / "test_sess_1.json").write_text(json.dumps(records))
        case "evr":
            raw_data.write_evr(folder, [Edit(source, goal)])
            record = {"img0": "0_O.jpg", "img1": "0_E.jpg", "sents": requests, "uid": "u"}
            (folder / "adobe" / "valid.json").write_text(json.dumps([record]))
        case _:
            raw_data.write_magicbrush(folder, [Edit(source, goal, instruction=one) for one in requests])


@pytest.mark.parametrize("layout", ["gier", "ma5k", "evr", "magicbrush"])
def test_none_of_many_requests_for_one_photo_is_lost(layout: Layout, tmp_path: Path) -> None:
    import numpy as np

    requests = [f"request number {i}" for i in range(12)]
    _write_requests(layout, tmp_path / "raw", requests)
    rows = _read(layout, tmp_path)
    assert bad(rows) == []
    assert [row["instruction"] for row in rows] == requests
    signatures = np.frombuffer(b"".join(row["signatures"] for row in rows), np.uint8).reshape(-1, PAIR_BYTES)
    assert len(np.unique(signatures, axis=0)) == 1  # the photos do look the same
    repeats = find_duplicates(
        np.array([row["id"] for row in rows]), np.array([row["instruction_key"] for row in rows]), signatures
    )
    assert (repeats == -1).all()


def test_gier_notes_who_wrote_and_the_operators(tmp_path: Path) -> None:
    _write_requests("gier", tmp_path / "raw", ["by an expert", "by an amateur"])
    rows = _read("gier", tmp_path)
    assert [json.loads(row["provenance"])["writer"] for row in rows] == ["expert", "amateur"]
    assert json.loads(rows[0]["provenance"])["request"] == "please"


def test_gier_without_splits_is_training_data(tmp_path: Path) -> None:
    raw_data.write_gier(tmp_path / "raw", edits(3))
    for path in (tmp_path / "raw" / "splits").iterdir():
        path.unlink()
    assert [row["split"] for row in _read("gier", tmp_path)] == ["train"] * 3


def test_gier_record_without_summaries_is_rejected(tmp_path: Path) -> None:
    raw_data.write_gier(tmp_path / "raw", edits(2))
    (tmp_path / "raw" / "splits" / "val.json").write_text(json.dumps([{"input": "0_O.jpg", "output": "0_E.jpg"}, 7]))
    assert [rejection_code(row["reason"]) for row in bad(_read("gier", tmp_path))] == ["bad_row", "bad_row"]


@pytest.mark.parametrize("place", ["adobe/images", "images", "adobe", "."])
def test_evr_finds_its_images(place: str, tmp_path: Path) -> None:
    raw_data.write_evr(tmp_path / "raw", edits(2))
    if place != "adobe/images":
        (tmp_path / "raw" / place).mkdir(exist_ok=True)
        for path in (tmp_path / "raw" / "adobe" / "images").iterdir():
            path.rename(tmp_path / "raw" / place / path.name)
    assert len(good(_read("evr", tmp_path))) == 2


# ---- MGIE's own


@pytest.mark.parametrize("join", ["offsets", "lines", "none"])
def test_mgie_lines_are_joined_with_their_instructions(join: str, tmp_path: Path) -> None:
    written = edits(4)
    raw_data.write_mgie(tmp_path / "raw", written, join=join)
    rows = _read("mgie", tmp_path)
    assert [row["instruction"] for row in rows] == [edit.instruction for edit in written]
    assert [(tmp_path / "out" / row["source"]).read_bytes() for row in rows] == [edit.source for edit in written]
    assert json.loads(rows[2]["provenance"])["expressive"] == "The picture shows change number 2."


def test_mgie_records_may_come_in_any_order(tmp_path: Path) -> None:
    raw_data.write_mgie(tmp_path / "raw", edits(4))
    path = tmp_path / "raw" / "ipr2pr.pkl"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({"task": content["task"][::-1]}, protocol=2))
    rows = _read("mgie", tmp_path)
    assert [row["instruction"] for row in rows] == [f"change number {i}" for i in (3, 2, 1, 0)]
    assert (tmp_path / "out" / rows[0]["source"]).read_bytes() == edits(4)[3].source


def test_mgie_record_without_its_line_is_rejected(tmp_path: Path) -> None:
    raw_data.write_mgie(tmp_path / "raw", edits(3), join="lines")
    records = pickle.loads((tmp_path / "raw" / "ipr2pr.pkl").read_bytes())["task"]
    records[1][0]["lineidx"] = 99
    (tmp_path / "raw" / "ipr2pr.pkl").write_bytes(pickle.dumps({"task": records}))
    rows = _read("mgie", tmp_path)
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_row"]
    assert [row["instruction"] for row in good(rows)] == ["change number 0", "change number 2"]


def test_mgie_without_pickle_refuses_unequal_numbers(tmp_path: Path) -> None:
    raw_data.write_mgie(tmp_path / "raw", edits(3), join="none")
    (tmp_path / "raw" / "ipr2pr_expressive.json").write_text("{}")
    with pytest.raises(DataError, match=r"3 lines and .* 0 items"):
        _read("mgie", tmp_path)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    raw_data.write_mgie(tmp_path / "raw", edits(1))
    (tmp_path / "raw" / "ipr2pr.pkl").write_bytes(
        pickle.dumps({"task": [[_Malicious(tmp_path / "hit")]]}, protocol=protocol)
    )
    with pytest.raises(DataError, match="only plain data"):
        _read("mgie", tmp_path)
    assert not (tmp_path / "hit").exists()
    pickle.loads((tmp_path / "raw" / "ipr2pr.pkl").read_bytes())
    assert (tmp_path / "hit").exists()  # it would have run


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_as_python_reads_them(protocol: int) -> None:
    shared = ["again", "again"]
    value = {
        "task": [
            [{"input": "a", "n": 3, "big": 2**70, "x": 1.5, "none": None, "yes": True, "t": (1, 2, 3, 4), "e": ()}]
        ],
        "shared": [shared, shared, {"ü": [True, False]}],
        "long": list(range(2000)),
    }
    assert read_plain_pickle(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"(", b"a.", b"]a.", b"\x80\x04h\x05.", b"t.", b"no pickle at all", b"K"]
)
def test_a_damaged_pickle_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError):
        read_plain_pickle(data)


# ---- your own


def test_parquet_with_file_names_stays_in_place(tmp_path: Path) -> None:
    raw_data.write_jsonl(tmp_path / "raw", edits(3))
    records = [json.loads(line) for line in (tmp_path / "raw" / "rows.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "raw" / "rows.parquet")
    rows = _read("parquet", tmp_path)
    assert len(good(rows)) == 3
    assert not (tmp_path / "out").exists()
    assert rows[0]["source"] == "pictures of mine/0_O.jpg"


def test_columns_are_mapped(tmp_path: Path) -> None:
    raw_data.write_jsonl(tmp_path / "raw", edits(2))
    records = [json.loads(line) for line in (tmp_path / "raw" / "rows.jsonl").read_text().splitlines()]
    extra = {"m": "pictures of mine/0_E.jpg", "round": "2", "chat": 77, "part": "validation"}
    (tmp_path / "raw" / "rows.jsonl").write_text("\n\n".join(json.dumps(record | extra) for record in records))
    columns = Columns(
        source="before", goal="after", instruction="say", mask="m", turn="round", session="chat", split="part",
        keep=("round", "part", "gone"),
    )  # fmt: skip
    rows = _read("jsonl", tmp_path, columns)
    assert [(r["mask"], r["turn"], r["session"], r["split"]) for r in rows] == [(extra["m"], 2, "77", "val")] * 2
    assert rows[0]["source_caption"] is None
    kept = json.loads(rows[0]["provenance"])
    assert (kept["round"], kept["part"], "chat" in kept, "gone" in kept) == ("2", "validation", False, False)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"before": 7, "after": "x", "say": "y"}',
        '{"before": "../../etc/passwd", "after": "/etc/passwd", "say": "y"}',
        '{"before": "\\ud800", "after": "x", "say": "y"}',
        '{"before": "x", "after": "x", "say": "half \\ud800"}',
        '{"before": "a\\u0000b", "after": "x", "say": "y"}',
        '{"before": "pictures of mine", "after": "x", "say": "y"}',
        '{"before": "' + "x" * 5000 + '", "after": "x", "say": "y"}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:30],
)
def test_a_bad_line_is_one_rejected_row(line: str, tmp_path: Path) -> None:
    raw_data.write_jsonl(tmp_path / "raw", edits(2))
    with (tmp_path / "raw" / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    rows = _read("jsonl", tmp_path)
    assert len(good(rows)) == 2
    assert len(bad(rows)) == 1
    assert rejection_code(bad(rows)[0]["reason"]) in {"bad_row", "missing_file"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(records=st.lists(_JSON, min_size=1, max_size=4))
def test_whatever_records_hold_each_is_a_row_and_none_stops_the_job(records: list[Any], tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    for name, content in {
        "GIER.json": records,
        "adobe/train.json": records,
        "annotations/val_sess_1.json": records,
        "edit_sessions.json": {"1": records, "2": records[0]},
        "local_descriptions/captions.json": {"1": records[0]},
        "folder/prompt.json": records[0],
        "seeds.json": [["folder", [1]]],
        "ipr2pr_expressive.json": {str(i): record for i, record in enumerate(records)},
    }.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(json.dumps(content))
    (raw / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (raw / "ipr2pr.tsv").write_text("AAAA\tAAAA\n" * len(records))
    for layout in ("gier", "ma5k", "evr", "magicbrush-test", "ipr2pr", "jsonl", "mgie"):
        rows = read_rows(layout, raw, out, Columns(source="input", goal="output", instruction="instruction"))
        assert len(rows) >= (1 if layout in ("ipr2pr", "magicbrush-test") else len(records))
        assert good(rows) == []
        to_table(rows, STAGED_SCHEMA)


def test_jsonl_is_divided_into_shards_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.readers.tables.ROWS_PER_SHARD", 2)
    monkeypatch.setattr("pipelines.readers.tables._SCAN_BYTES", 7)
    raw_data.write_jsonl(tmp_path / "raw", edits(5))
    path = tmp_path / "raw" / "rows.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # no newline at the end
    raw = open_folder(tmp_path / "raw")
    assert len(make_reader("jsonl", raw_data.OWN).shards(raw)) == 3
    rows = _read("jsonl", tmp_path)
    assert [row["instruction"] for row in rows] == [f"change number {i}" for i in range(5)]
    assert [json.loads(row["provenance"])["row"] for row in rows] == list(range(5))


def test_a_cut_off_tar_gives_its_whole_rows_and_one_rejected(tmp_path: Path) -> None:
    raw_data.write_webdataset(tmp_path / "raw", edits(4))
    (path,) = (tmp_path / "raw").glob("*.tar")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"sub/0002.after.jpg") + 700])
    rows = _read("webdataset", tmp_path)
    assert [row["instruction"] for row in good(rows)] == ["change number 0", "change number 1"]
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_file"]
