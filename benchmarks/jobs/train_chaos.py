"""Kills the training job again and again, resumes it, and compares every step with an undisturbed run, bit by bit.

    python benchmarks/jobs/train_chaos.py               SIGKILL of worker, controller and driver, 5 times each, and of a
                                                   worker while it copies a checkpoint; in random order at random steps
    python benchmarks/jobs/train_chaos.py --elastic     a node comes, and is killed, in mid-run: 1, 2, and 1 workers, float64

Each kill is asserted to have hit a running job. Exits with an error unless the runs are equal: bitwise, or, with
another number of workers, within 1e-9 of each loss.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import psutil

from mgie.storage.folder import Folder, open_folder
from tests.pipelines.chaos import Cluster, private_cluster
from tests.pipelines.training.chaos import (
    EXACT,
    Kill,
    Victim,
    differing_steps,
    numbers,
    run_undisturbed,
    run_with_kills,
    start,
    tensor_hashes,
    train_flags,
    write_ledger,
)

SPACING_STEPS, CHECKPOINT_EVERY = 12, 5  # more steps between two kills than any of them can undo
TOLERANCE = 1e-9


def draw_kills(number: int, seed: int) -> list[Kill]:
    """So many kills of each kind, and one during an upload, in random order at random steps."""
    rng = random.Random(seed)
    victims: list[Victim] = [victim for victim in get_args(Victim) if victim not in ("upload", "disk")] * number
    victims.append("upload")
    rng.shuffle(victims)
    return [Kill(victim, 1 + SPACING_STEPS * i + rng.randrange(5)) for i, victim in enumerate(victims)]


def chaos(folder: Path, ledger: Folder, cluster: Cluster, *, number: int, seed: int) -> dict[str, object]:
    """Kills; returns the line to print."""
    kills = draw_kills(number, seed)
    steps = SPACING_STEPS * len(kills) + 4
    flags = train_flags(ledger, steps=steps, checkpoint_every=CHECKPOINT_EVERY)
    flags += ["--max-failures", str(len(kills))]
    reference, out = open_folder(folder / "reference"), open_folder(folder / "killed")
    run_undisturbed(flags, cluster, reference, folder)
    started = time.monotonic()
    outputs = run_with_kills(flags, cluster, out, kills, folder)
    seconds = time.monotonic() - started
    found, expected = numbers(out), numbers(reference)
    differing = differing_steps(found, expected)
    num_repeated = sum(len(measured) - 1 for measured in found.values())
    print(f"{len(kills)} kills in {len(outputs)} commands and {seconds:.0f} s: {[(k.victim, k.step) for k in kills]}")
    print(f"{len(expected)} steps, {num_repeated} repeated, differing: {differing}; compared: {', '.join(EXACT)}")
    assert len(expected) == steps
    assert tensor_hashes(out, steps) == tensor_hashes(reference, steps), "weights or optimiser state differ"
    assert not differing
    return _result(
        f"training, {len(kills)} kills: steps bitwise equal to an undisturbed run", steps - len(differing), steps
    )


def _result(name: str, ours: int, reference: int) -> dict[str, object]:
    return {"name": name, "unit": "steps", "ours": ours, "reference": reference, "ratio": ours / reference}


@contextmanager
def another_node(cluster: Cluster) -> Iterator[psutil.Process]:
    """A second node of the cluster, with one CPU."""
    command = f"start --address {cluster.env['RAY_ADDRESS']} --num-cpus 1 --block --object-store-memory 100000000"
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *command.split()],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        kill_family(psutil.Process(process.pid))
        process.wait()


def kill_family(process: psutil.Process) -> None:
    """SIGKILL of a process and all below it."""
    for member in [*process.children(recursive=True), process]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def elastic(folder: Path, ledger: Folder, cluster: Cluster) -> dict[str, object]:
    """Grows and shrinks; returns the line to print."""
    steps = 80
    flags = train_flags(ledger, steps=steps, checkpoint_every=CHECKPOINT_EVERY)
    flags += ["--training.dtype", "float64", "--workers.num", "1", "--workers.max", "2", "--elastic-check-s", "2"]
    reference, out = open_folder(folder / "reference"), open_folder(folder / "elastic")
    run_undisturbed(flags, cluster, reference, folder)
    found: dict[int, list[tuple[float, ...]]] = {}
    sizes = []

    def at(step: int) -> bool:
        return max(numbers(out), default=0) >= step

    def num_workers() -> int:
        return len(cluster.workers("ray::RayTrainWorker"))

    with start([*flags, "--out", out.url], cluster, folder) as job:
        job.wait_until(lambda: at(6), "step 6")
        sizes.append(num_workers())
        with another_node(cluster) as node:
            job.wait_until(lambda: num_workers() == 2, "two workers")
            mark = max(numbers(out))
            job.wait_until(lambda: at(mark + 12), f"step {mark + 12} with two workers")
            sizes.append(num_workers())
            kill_family(node)
            mark = max(numbers(out))
            job.wait_until(lambda: at(mark + 6), f"step {mark + 6} after the node's end")
            sizes.append(num_workers())
        status, output = job.finish()
    assert status == 0, output
    print(output)
    assert sizes == [1, 2, 1], sizes
    found, expected = numbers(out), numbers(reference)
    largest = max(
        abs(value - right) / abs(right)
        for step, [rights] in expected.items()
        for measured in found[step]
        for value, right in zip(measured, rights, strict=True)
    )
    print(
        f"workers {sizes}; largest relative difference of {', '.join(EXACT)} over {len(expected)} steps: {largest:.1e}"
    )
    assert largest < TOLERANCE
    return _result(f"training on {sizes} workers: steps within {TOLERANCE:g} of one worker", len(found), steps)


def main() -> None:
    """Runs, prints, asserts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mgie-chaos-") as name,
        private_cluster(num_cpus=1 if args.elastic else 4) as cluster,
    ):
        folder = Path(name)
        write_ledger(ledger := open_folder(folder / "ledger"), 24)
        if args.elastic:
            result = elastic(folder, ledger, cluster)
        else:
            result = chaos(folder, ledger, cluster, number=args.kills, seed=args.seed)
    print(json.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped then, too
    main()
