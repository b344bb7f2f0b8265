"""Recipes: stages that are commands, each with a folder named by all that decides what is in it.

That is its command, the files of code that it runs, and the stages that it reads. So the same call goes on where it was
stopped, and after a change makes again what the change concerns. Knows nothing of what the stages do.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mgie.errors import MGIEError
from pipelines.runs.command import FAULT, FaultError
from pipelines.runs.progress import Bar

ROOT = Path(__file__).resolve().parents[2]
_DONE = "done.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the recipe."""

    arguments: tuple[str, ...]
    "arguments of python; {out} is the stage's folder, {NAME} that of an earlier stage, {NUMBER*share} a scaled number"
    needs: tuple[str, ...] = ()
    "stages that must be done before"
    code: tuple[str, ...] = ()
    "files and folders of code whose change makes the result another"


def folders(stages: Mapping[str, Stage], work: Path, *, share: float) -> dict[str, Path]:
    """Each stage's folder below `work`."""
    found: dict[str, Path] = {}
    for name, stage in stages.items():
        # Relative to `work`, so that a folder that has moved is known again.
        relative = {need: Path(place.name) for need, place in found.items()}
        parts = [_command(stage, {**relative, "out": Path()}, share), *(_content(path) for path in stage.code)]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
        found[name] = work / f"{name}-{digest}"
    return found


def make(
    stages: Mapping[str, Stage],
    work: Path,
    *,
    share: float,
    parallel: int,
    console: Console,
    until: Sequence[str] = (),
) -> dict[str, Path]:
    """Runs all stages that are not done; returns the folders.

    Args:
        stages: Stages by name, each after those that it needs.
        share: What numbers of the form {NUMBER*share} are multiplied by.
        parallel: Stages at a time.
        until: Only these and all that they need; none = all.

    Raises:
        FaultError: A stage met a fault of store, disk or cluster.
        MGIEError: A stage failed for another reason; those that were running at the same time have been ended.
    """
    places = folders(stages, work, share=share)
    wanted = set().union(*(_needed(stages, name) for name in until)) if until else set(stages)
    waiting = [name for name in stages if name in wanted and not (places[name] / _DONE).is_file()]
    running: dict[Future[None], str] = {}
    processes: list[subprocess.Popen[bytes]] = []
    with (
        ThreadPoolExecutor(parallel) as pool,
        Bar(console, "stages", len(wanted), done=len(wanted) - len(waiting)) as bar,
    ):
        try:
            while waiting or running:
                for name in list(waiting):
                    is_ready = all((places[need] / _DONE).is_file() for need in stages[name].needs)
                    if is_ready and len(running) < parallel:
                        waiting.remove(name)
                        command = [sys.executable, *_command(stages[name], {**places, "out": places[name]}, share)]
                        future = pool.submit(_run, name, command, places[name], console, processes)
                        running[future] = name
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    bar.show(bar.done + 1, f"{running.pop(future)} done")
        except BaseException:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.terminate()
            raise
    return places


def _needed(stages: Mapping[str, Stage], name: str) -> set[str]:
    return {name}.union(*(_needed(stages, need) for need in stages[name].needs))


def _run(
    name: str, command: list[str], out: Path, console: Console, processes: list["subprocess.Popen[bytes]"]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{name}[/]: {shlex.join(['python', *command[1:]])}", soft_wrap=True)
    began = time.monotonic()
    with (out / "output.txt").open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(  # noqa: S603  # our own commands
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        processes.append(process)
        status = process.wait()
        processes.remove(process)
    if status:
        kind = FaultError if status == FAULT else MGIEError
        raise kind(f"stage {name} failed with status {status}; its output is in {out / 'output.txt'}")
    seconds = time.monotonic() - began
    (out / _DONE).write_text(json.dumps({"seconds": round(seconds, 1), "command": command[1:]}, indent=1) + "\n")
    console.print(f"[bold]{name}[/]: done in {seconds / 60:.1f} min")


def _command(stage: Stage, places: Mapping[str, Path], share: float) -> list[str]:
    """The arguments with folders and numbers filled in."""

    def fill(argument: str) -> str:
        if argument.endswith("*share}"):
            return str(max(1, round(int(argument[1 : argument.index("*")]) * share)))
        filled = argument.replace("{share}", str(share))
        for name, place in places.items():
            filled = filled.replace(f"{{{name}}}", str(place))
        return filled

    return [fill(argument) for argument in stage.arguments]


def _content(path: str) -> str:
    """Hash of a file, or of all files of a folder."""
    found = sorted((ROOT / path).rglob("*")) if (ROOT / path).is_dir() else [ROOT / path]
    files = [file for file in found if file.suffix in (".py", ".txt")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
