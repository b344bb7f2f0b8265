"""The job: before it starts, then cut off and continued."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mgie.data.ledger import to_table
from mgie.errors import BundleError, ConfigError, DataError
from mgie.storage.folder import open_folder
from pipelines import edit
from pipelines.evaluate import EvaluateConfig, _plan, evaluate, main
from pipelines.reports.evaluate import REPORT_HTML, REPORT_JSON, REPORT_MD, SWEEP_SVG
from pipelines.stages.score_rows import SCORES_SCHEMA, read_rows
from tests.mgie.networks import write_clip, write_dino
from tests.pipelines.chaos import ROOT, Cluster
from tests.pipelines.evaluation_data import drawn_rows, session_rows, write_manifest
from tests.pipelines.jobs import cut_after, kill_when, leave_ray_out, run_here, stuck

pytestmark = pytest.mark.slow

REPORTS = (REPORT_JSON, REPORT_MD, REPORT_HTML)


# ---- before it starts


def _config(folder: Path, **given: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{"ledger": str(folder / "manifest"), "out": str(folder / "out"), "bundle": "random"} | given
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows_per_commit": 0}, "rows_per_commit is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank_by": "beauty"}, "rank_by is 'beauty'; it must be one of l1, l2,"),
        ({"sweep_image_guidance": (1.0, 2.0), "image_guidance_scale": 1.5}, "and one scale of it"),
        ({"results": "x", "steps": 3}, "steps is given, but the results are there already"),
        ({"results": "x", "protocol": "multi-turn"}, "protocol is given, but the results"),
        ({"steps": 0}, "steps is 0"),
        ({"sweep_image_guidance": (1.0, -2.0)}, "image_guidance_scale is -2"),
        ({"by": ("kind", "color")}, "by is 'color'; the rows have dataset, kind, split"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    write_manifest(tmp_path, drawn_rows(tmp_path, 2))
    with pytest.raises(ConfigError, match=message):
        evaluate(_config(tmp_path, **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clip", "clip_direction", "dino", "lpips"])
def test_a_network_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, drawn_rows(tmp_path, 2))
    with pytest.raises(BundleError, match="network 'gone' does not exist"):
        evaluate(_config(tmp_path, **{name: "gone"}))
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is empty"):
        evaluate(_config(tmp_path))


def test_only_failed_rows_are_tried_again(tmp_path: Path) -> None:
    manifest, out = write_manifest(tmp_path, drawn_rows(tmp_path, 4)), open_folder(tmp_path / "out")
    rows = read_rows(open_folder(manifest), split="all", max_rows=None, protocol="single-turn", gives_expressive=False)
    ids = [row["id"] for row in rows]
    written = [
        {"id": ids[0], "setting": "copy", "attempt": 1, "status": "ok"},
        {"id": ids[0], "setting": "edited", "attempt": 1, "status": "rejected"},
        {"id": ids[1], "setting": "copy", "attempt": 1, "status": "rejected"},
        {"id": ids[1], "setting": "copy", "attempt": 2, "status": "ok"},
    ]
    with out.publish("part-0.parquet") as path:
        pq.write_table(to_table(written, SCORES_SCHEMA), path)
    assert _plan(_config(tmp_path), out, rows).num_rows == 2
    assert _plan(_config(tmp_path, retry_failed=True), out, rows).num_rows == 3
    pending = pq.read_table(tmp_path / "out" / "_work").to_pylist()
    assert [(row["id"], row["attempt"]) for row in pending] == [(ids[2], 1), (ids[3], 1), (ids[0], 2)]


# ---- the job


def _flags(ledger: Path, out: Path, *more: str) -> list[str]:
    flags = ["--ledger", str(ledger), "--out", str(out), "--bundle", "random", "--device", "cpu", "--steps", "2"]
    # Of two CPUs there is room for one process that reads, beside the one that scores.
    return [*flags, "--rows-per-commit", "2", "--score.num-cpus", "1.75", *more]


def _reports(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in REPORTS]


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.endure)])
def test_a_job_that_was_cut_off_is_continued_and_gives_the_same_report(
    cluster: Cluster, tmp_path: Path, is_killed: bool
) -> None:
    num_rows = 40 if is_killed else 8
    rows = drawn_rows(tmp_path, num_rows)
    (tmp_path / rows[3]["goal"]).write_bytes(b"broken")
    ledger = write_manifest(tmp_path, rows)
    flags = ["--by", "kind", "--clip", str(write_clip(tmp_path / "clip")), "--dino", str(write_dino(tmp_path / "dino"))]
    status, text = run_here(main, _flags(ledger, tmp_path / "undisturbed", *flags))
    assert status == (0 if is_killed else 4), text
    assert f"{num_rows - 1} rows compared, 1 left out (1 bad_image)" in text

    out = tmp_path / "out"
    command = _flags(ledger, out, *flags)
    with pytest.MonkeyPatch.context() as patch:
        if is_killed:
            last = max(rows, key=lambda row: row["id"])
            with stuck(tmp_path / last["source"]):
                script = ROOT / "pipelines" / "evaluate.py"
                kill_when(command, cluster, script, tmp_path, lambda: bool(list(out.glob("part-*.parquet"))))
        else:
            leave_ray_out(patch)
            with cut_after(2):
                run_here(main, command)
        before = {path: path.read_bytes() for path in out.glob("part-*.parquet")}
        assert 0 < len(before) < num_rows // 2
        assert not (out / REPORT_JSON).exists()

        status, text = run_here(main, command)
    assert status == (0 if is_killed else 4), text
    assert f"{num_rows - 2 * len(before)} rows to score" in text
    assert all(path.read_bytes() == content for path, content in before.items())
    scored = pq.ParquetDataset([str(path) for path in out.glob("part-*.parquet")]).read().to_pylist()
    assert len({(row["id"], row["setting"]) for row in scored}) == len(scored) == num_rows * 3
    assert _reports(out) == _reports(tmp_path / "undisturbed")
    assert len(list((out / "images").iterdir())) == num_rows - 1

    report = json.loads((out / REPORT_JSON).read_bytes())
    measured = report["tables"][0]["groups"][0]["settings"]["edited"]
    assert {"l1", "ssim", "clip_i", "clip_t", "dino"} <= measured.keys()
    assert report["not_measured"]["lpips"] == "no network was given (--lpips)"
    assert {name: identity.split()[0] for name, identity in report["about"]["networks"].items()} == {"clip": "clip", "dino": "dino"}  # fmt: skip
    assert str(tmp_path) not in json.dumps(report)

    # Nothing is left to score: no cluster is joined, and the same scores are grouped anew.
    again = EvaluateConfig(
        ledger=str(ledger), out=str(out), bundle="random", device="cpu", steps=2, rows_per_commit=2,
        clip=str(tmp_path / "clip"), dino=str(tmp_path / "dino"), by=("split",),
    )  # fmt: skip
    outcome = evaluate(again)
    assert outcome.num_rejected == 1
    assert [table["by"] for table in outcome.report["tables"]] == [None, "split"]
    with pytest.raises(ConfigError, match=r"holds another run: settings\.edited\.steps was 2, is 3\. Give"):
        evaluate(EvaluateConfig(**(vars(again) | {"steps": 3})))


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_or_not")
def test_results_of_bulk_edits_sessions_and_sweeps_are_scored(tmp_path: Path) -> None:
    ledger = write_manifest(tmp_path, [*session_rows(tmp_path, "s", [1, 2]), *session_rows(tmp_path, "t", [1])])
    edited = tmp_path / "edited"
    status, text = run_here(
        edit.main, [ledger, "--out", edited, "--steps", "2", "--device", "cpu", "--bundle", "random"]
    )
    assert status == 0, text
    scoring = ["--ledger", ledger, "--device", "cpu", "--bundle", "random"]
    status, text = run_here(main, [*scoring, "--results", edited, "--out", tmp_path / "results"])
    assert status == 0, text
    report = json.loads((tmp_path / "results" / REPORT_JSON).read_bytes())
    settings = report["tables"][0]["groups"][0]["settings"]
    assert list(settings) == ["copy", "edited"]
    assert settings["edited"]["l1"]["num"] == 3
    assert (tmp_path / "results" / REPORT_HTML).read_text().count("data:image/jpeg") == 9

    status, text = run_here(main, _flags(ledger, tmp_path / "turns", "--protocol", "multi-turn", "--no-ceiling"))
    assert status == 0, text
    assert "2 rows compared, 0 left out" in text

    direction = ["--clip-direction", str(write_clip(tmp_path / "clip")), "--sweep-image-guidance", "1", "1.5", "2.2"]
    rows = drawn_rows(tmp_path, 2)
    status, text = run_here(main, _flags(write_manifest(tmp_path, rows), tmp_path / "sweep", *direction))
    assert status == 0, text
    report = json.loads((tmp_path / "sweep" / REPORT_JSON).read_bytes())
    assert [point["image_guidance_scale"] for point in report["sweep"]] == [1, 1.5, 2.2]
    assert (tmp_path / "sweep" / SWEEP_SVG).exists()
    settings = report["tables"][0]["groups"][0]["settings"]
    assert list(settings) == ["copy", "vae ceiling", "image guidance 1", "image guidance 1.5", "image guidance 2.2"]
    assert settings["copy"]["similarity"]["mean"] == pytest.approx(1, abs=1e-5)
    assert settings["copy"]["direction"]["mean"] == 0
