import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgie.errors import DataError
from mgie.evaluation.bootstrap import bootstrap_means
from mgie.storage.folder import Folder, open_folder
from pipelines.reports.evaluate import (
    REPORT_HTML,
    REPORT_JSON,
    REPORT_MD,
    SWEEP_SVG,
    ReportPlan,
    make_report,
    markdown,
    write_report,
)
from pipelines.reports.sweep_plot import plot_sweep
from pipelines.stages.score_rows import COPY, SCORES_SCHEMA
from tests.pipelines.evaluation_data import picture, write_png

NUM = 20


def _plan(**given: Any) -> ReportPlan:
    defaults: dict[str, Any] = {
        "about": {"edited_by": "me <b>", "networks": {"clip": "clip 123"}},
        "settings": (COPY, "edited"),
        "sweep": {},
        "networks": ("clip",),
        "by": (),
        "rank_by": "l1",
        "num_pictures": 2,
        "seed": 0,
    }
    return ReportPlan(**(defaults | given))


def _row(number: int, setting: str, **given: Any) -> dict[str, Any]:
    rng = np.random.default_rng([number, len(setting)])
    facts = {"kind": "ab"[number % 2], "nested": {"x": 1}}
    row = dict.fromkeys(SCORES_SCHEMA.names) | {
        "id": 100 - number, "setting": setting, "attempt": 1, "status": "ok", "facts": json.dumps(facts),
        "source": f"images/{number}.png", "goal": f"images/{number}.png", "instruction": f"do <i>{number}</i>",
        "edited": None if setting == COPY else f"images/{number}.png",
        "l1": float(rng.random()), "psnr": 20.0, "clip_i": 0.5,
    }  # fmt: skip
    return row | given


def _rows(settings: tuple[str, ...] = (COPY, "edited")) -> list[dict[str, Any]]:
    return [_row(number, setting) for number in range(NUM) for setting in settings]


def _folder(path: Path) -> Folder:
    for number in range(NUM):
        write_png(path, str(number), picture(number, (300, 200)))
    return open_folder(path)


def test_means_and_intervals_are_those_of_the_rows() -> None:
    rows = _rows()
    report = make_report(rows, _plan())
    [group] = report["tables"][0]["groups"]
    for setting in (COPY, "edited"):
        values = np.array([row["l1"] for row in sorted(rows, key=lambda r: r["id"]) if row["setting"] == setting])
        found = group["settings"][setting]["l1"]
        assert found["mean"] == pytest.approx(values.mean(), abs=1e-6)
        [expected] = bootstrap_means(values[:, None], seed=0)
        assert expected is not None
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert group["settings"]["edited"]["psnr"] == {"mean": 20.0, "low": 20.0, "high": 20.0, "num": NUM}


def test_all_settings_are_compared_on_the_same_rows() -> None:
    rows = _rows()
    for row in rows:
        if row["id"] == 97 and row["setting"] == "edited":
            row |= {"status": "rejected", "reason": "edit_failed: too long", "l1": None}
        elif row["id"] == 96:
            row |= {"status": "rejected", "reason": "missing_file: x", "l1": None}
        elif row["id"] not in (96, 97):
            row["l1"] = 0.25
    report = make_report(rows, _plan())
    assert report["rows"] == {"compared": NUM - 2, "left_out": 2, "reasons": {"edit_failed": 1, "missing_file": 1}}
    settings = report["tables"][0]["groups"][0]["settings"]
    assert settings[COPY]["l1"] == settings["edited"]["l1"] == {"mean": 0.25, "low": 0.25, "high": 0.25, "num": NUM - 2}
    assert "2 left out (1 edit_failed, 1 missing_file)" in markdown(report)


def test_rows_are_grouped_by_what_is_known_of_them() -> None:
    report = make_report(_rows(), _plan(by=("kind", "nested")))
    _, kinds, nested = report["tables"]
    assert [(group["value"], group["rows"]) for group in kinds["groups"]] == [("a", 10), ("b", 10)]
    even = [row["l1"] for row in _rows() if row["setting"] == "edited" and row["id"] % 2 == 0]
    assert kinds["groups"][0]["settings"]["edited"]["l1"]["mean"] == pytest.approx(np.mean(even), abs=1e-6)
    assert len(nested["groups"]) == 1
    assert "| b | 10 | edited |" in markdown(report)


def test_what_was_not_measured_is_named_with_the_reason() -> None:
    report = make_report(_rows(), _plan())
    assert "clip_i" not in report["not_measured"]
    assert report["not_measured"]["dino"] == "no network was given (--dino)"
    assert report["not_measured"]["direction"] == "no network was given (--clip-direction)"
    assert report["not_measured"]["clip_t"] == "no row has a goal caption"  # the network is there
    assert report["not_measured"]["inside_l1"] == "no row has a mask"
    text = markdown(report)
    assert "- not measured: DINO: no network was given (--dino)" in text
    assert "- network clip: clip 123" in text
    assert "| DINO" not in text


def test_the_report_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = _rows()
    mixed = rows[:]
    random.Random(0).shuffle(mixed)
    plan = _plan(by=("kind",))
    assert json.dumps(make_report(mixed, plan)) == json.dumps(make_report(rows, plan))


@pytest.mark.parametrize("rank_by", ["l1", "psnr"])
def test_the_best_median_and_worst_are_shown_once(rank_by: str) -> None:
    rows = _rows()
    for row in rows:
        row |= {"l1": row["id"] / 100, "psnr": -float(row["id"])}
    found = make_report(rows, _plan(rank_by=rank_by))["pictures"]
    assert [(one["rank"], one["id"]) for one in found] == [
        ("best", 81), ("best", 82), ("median", 90), ("median", 91), ("worst", 99), ("worst", 100),
    ]  # fmt: skip
    assert found[0]["scores"]["l1"] == 0.81
    few = make_report([row for row in rows if row["id"] > 98], _plan(num_pictures=4))["pictures"]
    assert [(one["rank"], one["id"]) for one in few] == [("best", 99), ("worst", 100)]


def test_nothing_scored_is_an_error() -> None:
    rows = [_row(0, name, status="rejected", reason="bad_image: x") for name in (COPY, "edited")]
    with pytest.raises(DataError, match=r"none of 1 rows could be scored: \{'bad_image': 1\}"):
        make_report(rows, _plan())


def test_the_page_brings_all_it_shows_and_says_words_as_words(tmp_path: Path) -> None:
    out, images = open_folder(tmp_path / "out"), _folder(tmp_path / "in")
    report = write_report(out, images, images, _rows(), _plan())
    assert json.loads(out.read(REPORT_JSON)) == report
    assert out.read(REPORT_MD).decode() == markdown(report)
    page = out.read(REPORT_HTML).decode()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 * 6
    assert all(source.startswith("data:image/jpeg;base64,/9j/") for source in sources)
    assert not re.search(r"href=|url\(|@import|<script|<link|https?:", page)
    assert len(re.findall(r"do &lt;i&gt;\d+&lt;/i&gt;", page)) == 6
    assert "me &lt;b&gt;" in page
    assert max(map(len, sources)) < 40_000
    assert not out.exists(SWEEP_SVG)
    write_report(open_folder(tmp_path / "again"), images, images, _rows(), _plan())
    for name in (REPORT_JSON, REPORT_MD, REPORT_HTML):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_sweep_is_plotted_where_both_axes_were_measured(tmp_path: Path) -> None:
    scales = {f"image guidance {s:g}": s for s in (1.0, 1.5, 2.0)}
    rows = _rows((COPY, *scales))
    plan = _plan(settings=(COPY, *scales), sweep=scales, networks=("clip", "clip_direction"))
    images = _folder(tmp_path / "in")
    blind = write_report(open_folder(tmp_path / "blind"), images, images, rows, plan)
    assert blind["sweep"] == []
    for row in rows:
        scale = scales.get(row["setting"], 0.0)
        row |= {"direction": 0.2 - scale / 20, "similarity": 0.7 + scale / 10}
    out = open_folder(tmp_path / "out")
    report = write_report(out, images, images, rows, plan)
    assert [point["image_guidance_scale"] for point in report["sweep"]] == [1.0, 1.5, 2.0]
    assert [point["direction"] for point in report["sweep"]] == pytest.approx([0.15, 0.125, 0.1])
    svg = out.read(SWEEP_SVG).decode()
    assert svg in out.read(REPORT_HTML).decode()
    assert len(re.findall("<circle", svg)) == 3
    assert report["pictures"][0]["setting"] == "image guidance 1"


def test_the_plot_puts_direction_to_the_right_and_similarity_upwards() -> None:
    points = [
        {"image_guidance_scale": 1.0, "direction": 0.2, "similarity": 0.7},
        {"image_guidance_scale": 2.0, "direction": 0.1, "similarity": 0.9},
    ]
    (x1, y1), (x2, y2) = (map(float, one) for one in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot_sweep(points)))
    assert x1 > x2
    assert y1 > y2  # downwards in an SVG
    assert "<circle" in plot_sweep(points[:1])
