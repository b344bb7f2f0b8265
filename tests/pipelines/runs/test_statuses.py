"""How each job ends when something is wrong: exit status and message, as the table in docs/pipelines.md has them."""

import contextlib
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgie.storage import retry
from pipelines import cache, compare, edit, evaluate, export, prepare, summarize, tiny, train
from pipelines.runs import run
from pipelines.runs.progress import Bar
from tests.object_store import CREDENTIALS
from tests.pipelines import evaluation_data, raw_data
from tests.pipelines.chaos import ROOT, Cluster, Endpoint, Job
from tests.pipelines.jobs import leave_ray_out, run_here
from tests.pipelines.training.chaos import TRAIN

pytestmark = pytest.mark.slow

NUM_ROWS = 5
MAINS: dict[str, Callable[[], int]] = {
    "prepare": prepare.main,
    "summarize": summarize.main,
    "export": export.main,
    "cache": cache.main,
    "train": train.main,
    "edit": edit.main,
    "evaluate": evaluate.main,
    "tiny": tiny.main,
    "compare": compare.main,
}
OVER_ROWS = ("prepare", "summarize", "export", "cache", "edit", "evaluate")
TRAINED = ("train",)
RECIPES = ("tiny", "compare")
STOPPED, FULL = (130, "stopped; the same command goes on"), (3, "File too large")
NO_LEDGER = (2, "does not exist or is empty; give a folder that holds rows")
MANY = (4, "1 of 5 rows were rejected, more than --max-rejected 0.1 allows")

# What is wrong -> job -> status, and a part of what is said.
EXPECTED: dict[str, dict[str, tuple[int, str]]] = {
    "a flag that is not there": dict.fromkeys(MAINS, (2, "Unrecognized options: --colour, red")),
    "a value that is not allowed": {
        "prepare": (2, "rows_per_file is 0; it must be 1 to 10000000"),
        "summarize": (2, "rows_per_commit is 0; it must be 1 to 1000000"),
        "export": (2, "rows_per_file is 0; it must be 1 to 1000000"),
        "cache": (2, "rows_per_shard is 0; it must be 1 to 1000000"),
        "train": (2, "keep is 0; it must be at least 1"),
        "edit": (2, "rows_per_commit is 0; it must be 1 to 1000000"),
        "evaluate": (2, "num_pictures is 0; it must be at least 1"),
        "tiny": (2, "parallel is 0; it must be at least 1"),
        "compare": (2, "steps is 0; it must be at least 1"),
    },
    "an input that is not there": {
        "prepare": (2, "there is no such folder"),
        **dict.fromkeys(("summarize", "export", "cache", "train", "evaluate"), NO_LEDGER),
        "edit": (2, "holds neither a manifest nor images"),
    },
    "a store that does not answer": dict.fromkeys((*OVER_ROWS, *TRAINED), (3, "Could not connect to server")),
    "a full disk": dict.fromkeys((*OVER_ROWS, *TRAINED), FULL),
    "one row of five is bad": {
        **dict.fromkeys(("prepare", "summarize", "edit"), MANY),
        "evaluate": MANY,
        "export": (2, "image 'images/3-source.png' of row"),
        "cache": (2, "cannot be read"),
        "train": (2, "cannot be read"),
    },
    "Ctrl-C": dict.fromkeys((*OVER_ROWS, *TRAINED), STOPPED),
    "the same command after Ctrl-C": {
        "prepare": (0, "manifest: "),
        "summarize": (0, "rows written in"),
        "export": (0, "exported 5 rows"),
        "cache": (0, "5 rows, "),
        "train": (0, '"steps": 2'),
        "edit": (0, "5 edited, 0 rejected"),
        "evaluate": (0, "5 rows compared, 0 left out"),
    },
}
BAD_VALUES = {
    "prepare": ["--rows-per-file", "0"],
    "summarize": ["--rows-per-commit", "0"],
    "export": ["--rows-per-file", "0"],
    "cache": ["--rows-per-shard", "0"],
    "train": ["--keep", "0"],
    "edit": ["--rows-per-commit", "0"],
    "evaluate": ["--num-pictures", "0"],
    "tiny": ["--parallel", "0"],
    "compare": ["--steps", "0"],
}


def _cells(*conditions: str) -> list[tuple[str, str]]:
    return [(condition, job) for condition in conditions for job in EXPECTED[condition]]


def _inputs(folder: Path, job: str, *, has_bad: bool = False) -> None:
    """Five rows, as a raw data set, a manifest and a ledger; the fourth photo is gone, or no photo, in all three."""
    if job == "prepare":
        raw_data.write_ipr2pr(
            folder / "raw", raw_data.with_one(raw_data.edits(NUM_ROWS), 3, **({"source": b"x"} if has_bad else {}))
        )
        return
    rows = evaluation_data.drawn_rows(folder, NUM_ROWS)
    evaluation_data.write_manifest(folder, rows)
    evaluation_data.write_ledger(folder, [row | {"split": "train", "expressive": "It is dark."} for row in rows])
    (folder / "images" / "photos").mkdir()
    if has_bad and job == "export":
        (folder / rows[3]["source"]).unlink()
    elif has_bad:
        (folder / rows[3]["source"]).write_bytes(b"no photo")


def _flags(job: str, root: str, out: Path, endpoint: Endpoint) -> list[str]:
    """A small run that reads what lies below `root`, a folder or a URL."""
    on_cpu = ["--device", "cpu"]
    of_job = {
        "prepare": ["--input", f"{root}/raw", "--keeps-near-duplicates"],
        "summarize": [
            *("--manifest", f"{root}/manifest", "--preset", "fast", "--backend", "openai", "--describe-model", "x"),
            *("--base-url", endpoint.url, "--summarize-model", "random-summarizer", "--rows-per-commit", "2", *on_cpu),
        ],
        "export": ["--ledger", f"{root}/ledger"],
        "cache": ["--ledger", f"{root}/ledger", "--bundle", "random", "--rows-per-shard", "2", *on_cpu],
        "train": [
            *(
                "--ledger",
                f"{root}/ledger",
                "--init",
                "random",
                "--training.steps",
                "2",
                "--training.global-batch",
                "4",
            ),
            *("--training.micro-batch", "2", "--training.image-side-px", "64", "--sample-every", "0"),
            *("--validate-every", "0", "--log-every-s", "0"),
        ],
        "edit": [f"{root}/manifest", "--bundle", "random", "--steps", "1", "--rows-per-commit", "2", *on_cpu],
        "evaluate": [
            *("--ledger", f"{root}/manifest", "--bundle", "random", "--steps", "1", "--rows-per-commit", "2", *on_cpu),
        ],
    }
    return [*of_job[job], "--out", str(out)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(0.0) as opened:
        yield opened


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _assert_so(condition: str, job: str, found: tuple[int, str]) -> None:
    status, said = EXPECTED[condition][job]
    assert found[0] == status, found[1]
    assert said in found[1]
    assert "Traceback" not in found[1]


@pytest.mark.parametrize(("condition", "job"), _cells("a flag that is not there", "a value that is not allowed"))
def test_arguments(
    condition: str, job: str, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [] if job in RECIPES else _flags(job, "none", tmp_path / "out", endpoint)
    wrong = ["--colour", "red"] if condition == "a flag that is not there" else BAD_VALUES[job]
    _assert_so(condition, job, run_here(MAINS[job], [*flags, *wrong]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("condition", "job"),
    _cells("an input that is not there", "a store that does not answer", "a full disk"),
)
def test_inputs_stores_and_disks(
    condition: str, job: str, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_ray_out(monkeypatch)
    monkeypatch.setattr(retry, "_PAUSES_S", ())
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    root, disk = str(tmp_path / "none"), contextlib.nullcontext()
    if condition == "a store that does not answer":
        root = "s3://bucket/none"
    elif condition == "a full disk":
        _inputs(tmp_path, job)
        root, disk = str(tmp_path), _full_disk()
    with disk:
        found = run_here(MAINS[job], _flags(job, root, tmp_path / "out", endpoint))
    _assert_so(condition, job, found)


@pytest.mark.parametrize("job", OVER_ROWS)
def test_a_fifth_of_the_rows_is_bad(
    job: str, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_ray_out(monkeypatch)
    _inputs(tmp_path, job, has_bad=True)
    flags = _flags(job, str(tmp_path), tmp_path / "out", endpoint)
    _assert_so("one row of five is bad", job, run_here(MAINS[job], flags))
    if EXPECTED["one row of five is bad"][job] == MANY:
        status, said = run_here(MAINS[job], [*flags, "--max-rejected", "0.2"])
        assert status == 0, said


@pytest.mark.parametrize("job", OVER_ROWS)
def test_ctrl_c_and_the_same_command_again(
    job: str, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_ray_out(monkeypatch)
    _inputs(tmp_path, job)
    flags = _flags(job, str(tmp_path), tmp_path / "out", endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "show", lambda *_: signal.raise_signal(signal.SIGINT))
        _assert_so("Ctrl-C", job, run_here(MAINS[job], flags))
    _assert_so("the same command after Ctrl-C", job, run_here(MAINS[job], flags))
    assert run_here(MAINS[job], [*flags, *_as_written(tmp_path / "out")])[0] == 0


def _as_written(out: Path) -> list[str]:
    """The settings that lie beside an output decide nothing new."""
    return ["--config", str(out / "config.yaml")]


@pytest.mark.ray
@pytest.mark.endure
@pytest.mark.timeout(1800)
def test_training_is_stopped_goes_on_and_tells_of_a_photo_that_is_none(
    cluster: Cluster, tmp_path: Path, endpoint: Endpoint
) -> None:
    _inputs(tmp_path, "train")
    flags = _flags("train", str(tmp_path), tmp_path / "out", endpoint)
    with Job(flags, cluster.env, cwd=tmp_path, script=TRAIN) as job:
        job.wait_until(lambda: "steps: 0 of 2" in job.output(), "the bar")
        job.process.send_signal(signal.SIGINT)
        _assert_so("Ctrl-C", "train", job.finish())
    cluster.settle()
    _assert_so("the same command after Ctrl-C", "train", run_here(train.main, flags))
    _inputs(tmp_path / "bad", "train", has_bad=True)
    bad = _flags("train", str(tmp_path / "bad"), tmp_path / "bad-out", endpoint)
    _assert_so("one row of five is bad", "train", run_here(train.main, bad))


def test_a_bug_is_a_traceback(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_ray_out(monkeypatch)
    _inputs(tmp_path, "edit")
    monkeypatch.setattr(run, "hold_lease", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(edit.main, _flags("edit", str(tmp_path), tmp_path / "out", endpoint))


def table() -> str:
    """The table of the documentation."""
    lines = [f"| | {' | '.join(MAINS)} | what `edit` says, among other things |", "|---" * (len(MAINS) + 2) + "|"]
    for condition, found in EXPECTED.items():
        cells = (str(found[job][0]) if job in found else "" for job in MAINS)
        lines.append(f"| {condition} | {' | '.join(cells)} | {found['edit'][1]} |")
    return "\n".join(lines)


def test_the_documentation_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")


def test_help_tells_the_statuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, main in MAINS.items():
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            main()
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        for status in ("2 refused", "3 a fault", "4 done, but", "130 stopped", "--config FILE.yaml"):
            assert status in said, name
