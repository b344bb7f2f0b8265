"""The numbers of a run: what is written is read back exactly, and later attempts win."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mgie.errors import ConfigError
from mgie.storage.folder import open_folder
from pipelines.reports.train import plot_run
from pipelines.training import tracking
from pipelines.training.tracking import (
    FileTracker,
    TensorBoardTracker,
    Trackers,
    open_tracker,
    read_last,
    read_lines,
    read_metrics,
)


def test_numbers_come_back_exactly_and_what_is_not_finite_as_none(tmp_path: Path) -> None:
    run = open_folder(tmp_path)
    tracker = FileTracker(run, flush_every_s=1000)
    values = {"loss": 1 / 3, "edit": np.nextafter(0.1, 1).item(), "is_finite": True, "grad_norm": math.inf}
    tracker.log(1, values)
    tracker.log(2, {"loss": math.nan})
    assert read_last(run) == {}, "nothing is written before a flush"
    tracker.close()
    assert read_metrics(run).steps == {1: {**values, "grad_norm": None}, 2: {"loss": None}}


def test_of_a_step_that_was_made_twice_the_later_attempt_counts(tmp_path: Path) -> None:
    run = open_folder(tmp_path)
    for first, last in ((1, 6), (5, 8), (7, 9)):
        tracker = FileTracker(run, flush_every_s=0)
        for step in range(first, last + 1):
            tracker.log(step, {"loss": first + step / 100})
            if step == 6:
                tracker.log(step, {"validation/loss": 0.5})
    metrics = read_metrics(run)
    assert [scalars["loss"] for scalars in metrics.steps.values()] == [
        1.01, 1.02, 1.03, 1.04, 5.05, 5.06, 7.07, 7.08, 7.09,
    ]  # fmt: skip
    assert list(metrics.steps) == list(range(1, 10))
    assert metrics.steps[6]["validation/loss"] == 0.5
    assert metrics.num_repeated == 4
    assert (read_last(run)["step"], read_last(run)["loss"]) == (9, 7.09)
    assert len(list(read_lines(run))) == 6 + 4 + 3 + 2


def test_parts_stay_small_and_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PART_LINES", 3)
    run = open_folder(tmp_path)
    tracker = FileTracker(run, flush_every_s=0)
    for step in range(1, 9):
        tracker.log(step, {"loss": step / 7})
    names = [entry.name for entry in run.list("metrics")]
    assert names == ["000001-00000001.jsonl", "000001-00000004.jsonl", "000001-00000007.jsonl"]
    assert [scalars["loss"] for scalars in read_metrics(run).steps.values()] == [step / 7 for step in range(1, 9)]


def test_pictures_are_files(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    Trackers([FileTracker(open_folder(tmp_path), flush_every_s=0)]).picture(12, "step", picture)
    with Image.open(tmp_path / "samples" / "step-00000012.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(picture))


def test_tensorboard_hides_what_an_attempt_that_was_killed_wrote_of_later_steps(tmp_path: Path) -> None:
    run = open_folder(tmp_path)
    for first, value in ((0, 1.0), (2, 2.0)):
        tracker = TensorBoardTracker(run, tmp_path, step=first)
        for step in range(first + 1, first + 4):
            tracker.log(step, {"loss": value, "flops_utilisation": None})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip


def test_event_files_of_a_run_in_a_store_are_copied_at_each_flush(tmp_path: Path, s3: str) -> None:
    run = open_folder(f"{s3}/run")
    tracker = TensorBoardTracker(run, tmp_path, step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.flush()
    [before] = run.list("tensorboard")
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    [after] = run.list("tensorboard")
    assert after.name == before.name
    assert after.num_bytes > before.num_bytes > 0


def test_the_summary_shows_every_line_and_skips_what_was_not_finite() -> None:
    steps = {
        step: {"loss": None if step == 5 else 10 / step, "learning_rate/unet": 1e-4, "other": 3.0}
        for step in range(1, 11)
    }
    steps[10]["validation/loss"] = 2.0
    svg = plot_run(steps)
    for name in ("loss", "validation/loss", "learning_rate/unet", "gradient norm: nothing to show"):
        assert f">{name}</text>" in svg
    assert "other" not in svg
    assert svg.count("<circle") == 9 + 1 + 10
    assert "nan" not in svg
    assert "loss: nothing" not in plot_run({}) and "losses: nothing to show" in plot_run({})  # noqa: PT018
    many = plot_run({step: {"loss": 1.0} for step in range(1, 100_001)})
    assert len(many) < 50_000
    assert json.dumps(many)


def test_a_tracker_is_chosen_by_name_and_may_be_ones_own(tmp_path: Path) -> None:
    run = open_folder(tmp_path / "run")
    assert open_tracker("none", run, tmp_path, step=0) is None
    chosen = open_tracker("tensorboard", run, tmp_path, step=0)
    assert isinstance(chosen, TensorBoardTracker)
    chosen.close()
    own = open_tracker("pipelines.training.tracking:TensorBoardTracker", run, tmp_path, step=3)
    assert isinstance(own, TensorBoardTracker)
    own.close()
    for name in ("wandb", "pipelines.nothing:Tracker", "pipelines.training.tracking:Nothing"):
        with pytest.raises(ConfigError, match=f"tracker is '{name}'; it must be tensorboard, none, or module:callable"):
            open_tracker(name, run, tmp_path, step=0)
