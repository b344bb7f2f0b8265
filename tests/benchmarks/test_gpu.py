"""`benchmarks/gpu.py` in miniature on a CPU: nothing here depends on how fast the machine is."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mgie.config import TrainingConfig

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NETWORKS = ("look", "prompt", "token", "unet", "encode", "decode")
FIGURES = {
    "ceiling.copy_gb_per_s",
    "ceiling.product_tflop_per_s",
    "build.total_s",
    "build.prompt_tokens",
    *(f"weights.{part}_gb" for part in ("llm", "vision", "projector", "edit_head", "unet", "vae")),
    *(f"flops.{network}_tflop" for network in NETWORKS),
    *(
        f"{network}.batch_{batch}.{figure}"
        for (network, batch), figure in product(
            [("unet", 1), ("unet", 2), ("look", 1), ("look", 2), ("encode", 1), ("decode", 1)],
            ("call_s", "calls_per_s", "compute_share"),
        )
    ),
    *(
        f"llm.batch_{batch}.{figure}"
        for batch, figure in product((1, 2), ("prompt_s", "tokens_per_s", "bandwidth_share"))
    ),
    *(
        f"edit.batch_{batch}.steps_{steps}.{figure}"
        for batch, steps, figure in product(
            (1, 2), (1, 2), ("total_s", "derive_s", "render_s", "peak_gb", "bound_s", "bound_share")
        )
    ),
    *(
        f"train.batch_{batch}.{figure}"
        for batch, figure in product((1, 2), ("step_s", "samples_per_s", "wait_share", "peak_gb", "loss"))
    ),
    "load.write_s",
    "load.bundle_gb",
    *(
        f"load.{how}.{figure}"
        for how, figure in product(("cached", "dropped"), ("conditioner_s", "renderer_s", "gb_per_s"))
    ),
}
PARTS = {
    "ceilings", "build", "networks batch 1", "networks batch 2", "llm batch 1", "llm batch 2", "edit batch 1 steps 1",
    "edit batch 2 steps 1", "edit batch 1 steps 2", "edit batch 2 steps 2", "load write", "train batch 1", "train batch 2",
    "load cached", "load dropped",
}  # fmt: skip


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--size", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)


def _last_line(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """A run of everything, and its file."""
    out = tmp_path_factory.mktemp("gpu") / "results" / "gpu-cpu.json"
    return _run("--budget-s", "3600", "--out", str(out)), out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in ("gpu", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_figure_is_measured_positive_and_finite(whole: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    result = _last_line(whole[0])
    assert result["skipped"] == result["failed"] == {}
    assert set(result["figures"]) == FIGURES
    for name, value in result["figures"].items():
        assert math.isfinite(value), name
        # The last two follow from a difference of two times, which other work on the machine may turn round.
        may_be_negative = name.endswith(("wait_share", "tokens_per_s", "bandwidth_share"))
        assert value > 0 or may_be_negative, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ratio_is_the_lower_bound_of_the_shortest_edit_over_its_time(
    whole: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    result = _last_line(whole[0])
    assert result["name"] == "gpu"
    assert result["ours"] == result["figures"]["edit.batch_1.steps_1.total_s"]
    assert result["reference"] == result["figures"]["edit.batch_1.steps_1.bound_s"]
    assert result["ratio"] == pytest.approx(result["reference"] / result["ours"], abs=1e-4)
    assert "lower bound" in result["reference_is"]
    assert {"unit", "device", "torch", "dtype"} <= result.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_and_the_file_hold_every_figure(whole: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    done, out = whole
    result, lines = _last_line(done), done.stdout.splitlines()[:-1]
    printed = {line.split()[2]: float(line.split()[3]) for line in lines if len(line.split()) == 4}
    assert {name: value for name, value in printed.items() if name in FIGURES} == result["figures"]
    assert json.loads(out.read_text())["figures"] == result["figures"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_budget_of_zero_lists_every_part_as_skipped(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    result = _last_line(_run("--budget-s", "0", "--out", str(out)))
    assert set(result["skipped"]) == PARTS
    assert all("0 s left" in reason for reason in result["skipped"].values())
    assert result["figures"] == result["failed"] == {}
    assert result["ours"] is result["reference"] is result["ratio"] is None
    assert set(json.loads(out.read_text())["skipped"]) == PARTS


def test_what_fails_or_has_no_memory_is_reported_and_the_rest_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    def too_large() -> Iterator[tuple[str, float]]:
        yield "first_s", 1.0
        raise torch.OutOfMemoryError("no room")

    def wrong() -> Iterator[tuple[str, float]]:
        yield "second_s", math.nan

    report = gpu.Report({}, steps=20, budget_s=60.0, skip=["load"], out=tmp_path / "out.json")
    report.run("large", too_large, needs_s=1)
    report.run("wrong", wrong, needs_s=1)
    report.run("after", lambda: iter([("third_s", 3.0)]), needs_s=1)
    report.run("depends", lambda: iter([("fourth_s", 4.0)]), needs_s=1, needs="large")
    report.run("long", lambda: iter([("fifth_s", 5.0)]), needs_s=61)
    report.run("load it", lambda: iter([("sixth_s", 6.0)]), needs_s=1)
    assert report.figures == {"first_s": 1.0, "third_s": 3.0}
    assert report.failed == {"large": "out of memory", "wrong": "ValueError: second_s is nan"}
    assert list(report.skipped) == ["depends", "long", "load it"]
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == report.failed


def test_the_bound_takes_of_each_network_the_longer_of_operations_and_weights(gpu: ModuleType, tmp_path: Path) -> None:
    figures = {"ceiling.product_tflop_per_s": 2.0, "ceiling.copy_gb_per_s": 4.0}
    bench = gpu.Bench(gpu.PLANS["tiny"], torch.device("cpu"), torch.float32, tmp_path, new_tokens=5, figures=figures)
    bench.flops = dict.fromkeys(NETWORKS, 10**12) | {"token": 10**6}
    bench.num_bytes = dict.fromkeys(NETWORKS, 10**6) | {"token": 8 * 10**9}
    # Half a second of operations per sample: look, prompt, 10 steps, encoding, decoding; four passes of 2 s for words.
    assert bench.bound_s(1, 10) == pytest.approx(0.5 * (1 + 1 + 10 + 1 + 1) + 4 * 2.0)
    assert bench.bound_s(3, 10) == pytest.approx(3 * 0.5 * (1 + 1 + 10 + 1 + 1) + 4 * 2.0)


def test_the_real_sizes_are_llava_7b_and_stable_diffusion(gpu: ModuleType) -> None:
    made = gpu.random_model(gpu.PLANS["real"].sizes, TrainingConfig(dtype="bfloat16"), torch.device("meta"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(made.model.mllm.llm) == 6_738_505_728  # LLaMA-7B's 6 738 415 616 and 11 tokens, in and out
    assert count(made.model.mllm.vision) == 303_179_776
    assert count(made.model.unet) == 859_532_484  # 859 520 964 and four more input channels
    assert count(made.model.vae.autoencoder) == 83_653_863
    assert made.model.mllm.vision.num_patches == 256


def test_the_tokenizer_has_a_piece_for_every_id_and_makes_the_same_ids_of_text(gpu: ModuleType) -> None:
    full, tiny = gpu.full_tokenizer(32011), gpu.build_tokenizer()
    assert full.vocab_size == 32011
    assert full.visual_ids == tuple(range(32003, 32011))
    assert full.decode(range(32000))
    assert full.encode_plain(gpu.INSTRUCTION) == tiny.encode_plain(gpu.INSTRUCTION)
