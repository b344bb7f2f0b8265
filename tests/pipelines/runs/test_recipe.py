"""Recipes: what is done is not done again, what a change concerns is, and a failure stops what follows."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from mgie.errors import ConfigError, MGIEError
from pipelines import tiny
from pipelines.runs.recipe import Stage, folders, make

QUIET = Console(quiet=True)
_APPEND = "import sys, pathlib; pathlib.Path(sys.argv[1], 'ran').open('a').write(' '.join(sys.argv[2:]) + ';')"


def _stage(*arguments: str, needs: tuple[str, ...] = (), code: tuple[str, ...] = ()) -> Stage:
    return Stage(arguments=("-c", _APPEND, "{out}", *arguments), needs=needs, code=code)


STAGES = {
    "data": _stage("{share}"),
    "model": _stage("--data", "{data}/x", "{1000*share}", needs=("data",)),
    "other": _stage("o"),
    "both": _stage("{model}", "{other}", needs=("model", "other")),
}


def _ran(places: dict[str, Path]) -> dict[str, str]:
    return {name: (place / "ran").read_text() for name, place in places.items() if (place / "ran").exists()}


def test_stages_run_once_in_order_with_folders_and_numbers_filled_in(tmp_path: Path) -> None:
    places = make(STAGES, tmp_path, share=0.25, parallel=2, console=QUIET)
    expected = {
        "data": "0.25;",
        "model": f"--data {places['data']}/x 250;",
        "other": "o;",
        "both": f"{places['model']} {places['other']};",
    }
    assert _ran(places) == expected
    assert json.loads((places["both"] / "done.json").read_text())["seconds"] >= 0
    assert make(STAGES, tmp_path, share=0.25, parallel=1, console=QUIET) == places
    assert _ran(places) == expected


def test_a_change_concerns_what_reads_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folders(STAGES, tmp_path, share=1.0)
    changed = {**STAGES, "model": _stage("--data", "{data}/y", "{1000*share}", needs=("data",))}
    after = folders(changed, tmp_path, share=1.0)
    assert [name for name in STAGES if before[name] != after[name]] == ["model", "both"]
    monkeypatch.setattr("pipelines.runs.recipe.ROOT", tmp_path)
    (tmp_path / "code.py").write_text("a = 1\n")
    coded = {**STAGES, "other": dataclasses.replace(STAGES["other"], code=("code.py",))}
    before = folders(coded, tmp_path, share=1.0)
    (tmp_path / "code.py").write_text("a = 2\n")
    after = folders(coded, tmp_path, share=1.0)
    assert [name for name in STAGES if before[name] != after[name]] == ["other", "both"]


def test_a_stage_that_fails_is_named_and_what_needs_it_does_not_run(tmp_path: Path) -> None:
    stages = {**STAGES, "model": Stage(arguments=("-c", "raise SystemExit('no memory')"), needs=("data",))}
    with pytest.raises(MGIEError, match="stage model failed with status 1; its output is in"):
        make(stages, tmp_path, share=1.0, parallel=1, console=QUIET)
    places = folders(stages, tmp_path, share=1.0)
    assert "no memory" in (places["model"] / "output.txt").read_text()
    assert "both" not in _ran(places)
    fixed = make({**stages, "model": STAGES["model"]}, tmp_path, share=1.0, parallel=1, console=QUIET)
    assert _ran(fixed)["data"] == "1.0;"


def test_until_runs_what_a_stage_needs_and_no_more(tmp_path: Path) -> None:
    places = make(STAGES, tmp_path, share=1.0, parallel=1, console=QUIET, until=["model"])
    assert set(_ran(places)) == {"data", "model"}


def test_the_embedded_models_recipe_is_whole(tmp_path: Path) -> None:
    places = folders(tiny.STAGES, tmp_path, share=1.0)
    for number, (name, stage) in enumerate(tiny.STAGES.items()):
        earlier = list(tiny.STAGES)[:number]
        assert set(stage.needs) <= set(earlier), name
        named = {need for need in earlier for part in stage.arguments if f"{{{need}}}" in part}
        assert named == set(stage.needs), name
        assert all((Path(tiny.__file__).parents[1] / path).exists() for path in stage.code)
    assert len(set(places.values())) == len(places)


def test_with_a_gpu_every_training_of_a_unet_gets_one_and_nothing_else_changes() -> None:
    stages = tiny.on_gpu(tiny.STAGES)
    with_gpu = {name for name, stage in stages.items() if stage.arguments[-2:] == ("--workers.num-gpus", "1")}
    assert with_gpu == {"ip2p", "mgie"}
    assert all(stages[name] == stage for name, stage in tiny.STAGES.items() if name not in with_gpu)


@pytest.mark.parametrize("share", [0.0, -1.0, 101.0, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 100"):
        tiny.TinyConfig(share=share)
