"""The comparison: every variant's stages, and verdicts against values that are known."""

import json
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.data.ledger import to_table
from mgie.errors import DataError
from pipelines.compare import CLAIMS, VARIANTS, CompareConfig, compare, stages
from pipelines.reports.compare import METRICS, markdown, plot
from pipelines.runs.recipe import folders, make
from pipelines.stages.score_rows import scores_schema

pytestmark = pytest.mark.slow

L1 = {"ip2p": 0.30, "ft": 0.25, "fz": 0.31, "lgie": 0.29, "e2e": 0.20, "e2e without L_ins": 0.20}
NUM_ROWS = 60
CONFIG = CompareConfig(seeds=2)


def _write_scores(places: dict[str, Path], *, num_rows: int = NUM_ROWS) -> None:
    for variant in VARIANTS:
        for seed in range(2):
            folder = places[f"scores-{variant.replace(' ', '-')}-{seed}"] / "scores"
            folder.mkdir(parents=True)
            rng = np.random.default_rng([7, seed])  # rows differ alike in all variants
            rows = []
            for number in range(num_rows):
                facts = {"is_ambiguous": number % 3 == 0, "family": "scene" if number % 2 else "modification"}
                value = L1[variant] + 0.1 * rng.random() + (0.05 if seed else -0.05)
                scores = {"l1": value, "object_check": 1 - value, "inside_l1": None if number % 2 else value}
                for setting, found in (("copy", dict.fromkeys(scores, 0.5)), ("edited", scores)):
                    row = {"id": number, "setting": setting, "attempt": 1, "status": "ok", "facts": json.dumps(facts)}
                    rows.append({**dict.fromkeys(METRICS), **row, **found})
            pq.write_table(to_table(rows, scores_schema(METRICS)), folder / "part-a.parquet")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    return folders(stages(CONFIG), tmp_path, share=1.0)


def test_every_variant_trains_from_the_same_and_is_scored_on_the_same() -> None:
    found = stages(CONFIG)
    for number, (name, stage) in enumerate(found.items()):
        assert set(stage.needs) <= set(list(found)[:number]), name
    starts = {v: found[f"train-{v.replace(' ', '-')}-0"].needs for v in VARIANTS if v != "fz"}
    assert starts["ip2p"] == starts["ft"] == ("ledger", "cache", "ip2p-bundle")
    assert starts["lgie"] == starts["e2e"] == starts["e2e without L_ins"] == ("ledger", "cache", "mgie-start")
    scored = [found[f"scores-{v.replace(' ', '-')}-1"] for v in VARIANTS]
    assert all(stage.needs[0] == "test-ledger" for stage in scored)
    assert {v for v, stage in zip(VARIANTS, scored, strict=True) if "--give-expressive" in stage.arguments} == {
        "ft",
        "fz",
    }
    assert found["scores-fz-0"].needs == ("test-ledger", "ip2p-bundle")


def test_it_can_begin_with_the_models_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """Not as a process: each would import torch anew."""
        executable, option, module, *arguments = command
        assert (executable, option) == (sys.executable, "-m")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return subprocess.CompletedProcess(command, int(end.code or 0))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("pipelines.runs.recipe.subprocess.run", run_here)
    trained, taken = stages(CompareConfig()), stages(CompareConfig(shipped=True))
    names = [name for name in trained if trained[name] != taken[name]]
    assert sorted(names) == ["llava", "summarizer", "vae"]
    places = make(taken, tmp_path, share=1.0, parallel=1, console=Console(quiet=True), until=names)
    assert Bundle(places["llava"] / "bundle").identity == open_bundle("tiny-llava").identity
    assert Bundle(places["summarizer"] / "bundle").identity == open_bundle("tiny-summarizer").identity
    shipped = open_bundle("tiny").root / "vae"
    assert {path.name: path.read_bytes() for path in (places["vae"] / "vae").iterdir()} == {
        path.name: path.read_bytes() for path in shipped.iterdir()
    }


def test_means_differences_and_verdicts_are_those_of_the_scores(places: dict[str, Path]) -> None:
    _write_scores(places)
    comparison = compare(places, CONFIG)
    groups = {(group.name, group.metric): group for group in comparison.groups}
    whole = groups["all", "l1"]
    assert whole.rows == NUM_ROWS
    for claim, (better, worse) in zip(whole.gains, CLAIMS, strict=True):
        gain = whole.gains[claim]
        assert gain is not None
        # The rows differ alike, so a difference is exact though the means are not.
        assert gain.mean == pytest.approx(L1[worse] - L1[better], abs=1e-9)
        assert gain.high - gain.low < 1e-9
    means = {name: interval.mean for name, interval in whole.means.items() if interval is not None}
    assert means["copy"] == 0.5
    assert means["e2e"] == pytest.approx(0.25, abs=0.02)
    assert groups["ambiguous", "l1"].rows == NUM_ROWS // 3
    inside = groups["modification", "inside_l1"].means["e2e"]
    assert inside is not None
    assert inside.num == NUM_ROWS // 2
    assert groups["scene", "inside_l1"].means["e2e"] is None
    text = markdown(comparison)
    assert "| e2e > ft | yes (+0.0500 [+0.0500, +0.0500])" in text
    assert "| e2e > e2e without L_ins | undecided" in text
    assert "| ft > fz | yes" in text
    assert json.loads(json.dumps(comparison.as_json()))["rows"] == NUM_ROWS
    ET.fromstring(plot(comparison))


def test_variants_scored_on_different_rows_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    _write_scores(places)
    path = next((places["scores-ft-1"] / "scores").glob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(2), path)
    with pytest.raises(DataError, match="different rows"):
        compare(places, CONFIG)
