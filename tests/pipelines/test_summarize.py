"""The summarize job as its users run it: a command on a cluster, killed, resumed, refused.

Sizes are those of a quick run; `benchmarks/jobs/summarize_chaos.py` runs the same with thousands of rows.
"""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest

from mgie.data.ledger import count_ledger, rejection_code
from mgie.errors import ConfigError
from mgie.model.prompts import DATA_SUFFIX, QUESTION
from mgie.storage.folder import Folder, open_folder
from pipelines.runs import lease
from pipelines.runs.lease import LEASE_FILE, hold_lease
from pipelines.runs.run_record import read_run
from pipelines.stages.summarize import PRESETS
from pipelines.stages.summarizer import Summarizer
from pipelines.summarize import RowBudget, SummarizeConfig, main
from tests.pipelines.chaos import (
    Chaos,
    Cluster,
    Endpoint,
    answer,
    drawn,
    ledger_rows,
    num_described,
    private_cluster,
    run_with_kills,
    wait_for,
    write_manifest,
)
from tests.pipelines.fault_proxy import FaultProxy
from tests.pipelines.jobs import Background, cut_after, leave_ray_out, run_here

ROWS_PER_COMMIT, MAX_ROWS_IN_FLIGHT = 8, 32
DESCRIBE, SUMMARIZE = (
    "ray::MapWorker(MapBatches(_Describe))",
    "ray::MapWorker(MapBatches(_SummarizeAndCommit))",
)


# Of two CPUs this leaves 0.3, and one process that reads takes 0.25: the least on which a job must not hang.
TIGHT = ("--describe.num-cpus", "0.85", "--summarize.num-cpus", "0.85")


def flags(manifest: Folder, out: Folder, endpoint: Endpoint) -> list[str]:
    return [
        *("--manifest", manifest.url, "--out", out.url, "--preset", "fast"),
        *("--backend", "openai", "--base-url", endpoint.url, "--describe-model", "counting"),
        *("--summarize-model", "random-summarizer"),
        *("--rows-per-commit", str(ROWS_PER_COMMIT), "--max-rows-in-flight", str(MAX_ROWS_IN_FLIGHT)),
        *("--max-rejected", "0.2"),
    ]


def run(command: list[str]) -> tuple[int, str]:
    """The job in this process: its exit status, and what it said."""
    return run_here(main, command)


def copied(folder: Folder, to: Path) -> Folder:
    """The folder on the local disk."""
    copy = open_folder(to)
    for entry in folder.list(is_recursive=True):
        if not entry.is_folder:
            copy.write(entry.name, folder.read(entry.name))
    return copy


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(service_s=0.02) as started:
        yield started


@dataclass(frozen=True)
class Survivor:
    """A ledger whose job was killed again and again."""

    manifest: Folder
    out: Folder
    num_rows: int
    num_good: int
    chaos: Chaos
    command: list[str]


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.endure)])
def survivor(request: pytest.FixtureRequest, cluster: Cluster, endpoint: Endpoint) -> Iterator[Survivor]:
    make = request.getfixturevalue("tmp_path_factory").mktemp
    if request.param == "long":
        yield _killed(cluster, endpoint, make("survivor"))
    else:
        with FaultProxy(request.getfixturevalue("s3_server"), share=0.05, seed=0) as proxy:
            yield _cut_off(cluster, endpoint, request.getfixturevalue("module_s3"), proxy)


def _cut_off(cluster: Cluster, endpoint: Endpoint, s3: str, proxy: FaultProxy) -> Survivor:
    """The job is cut off, then continued until the actor that writes is killed; the store fails now and then."""
    num_rows, before = 64, len(endpoint.asked)
    manifest, out = open_folder(f"{s3}/manifest"), open_folder(f"{s3}/ledger")
    num_good = write_manifest(manifest, num_rows)
    # The workers inherit the credentials; every process is led to the proxy by the flag.
    command = [*flags(manifest, out, endpoint), "--endpoint", proxy.url, *TIGHT]
    with pytest.MonkeyPatch.context() as patch, cut_after(2):
        leave_ray_out(patch)
        run(command)
    asked = len(endpoint.asked) - before
    chaos = Chaos(killed=["driver"], lost_per_driver_kill=[asked - num_described(out)])
    assert 0 < num_described(out) < num_good

    most = len(endpoint.asked) + num_good // 3
    endpoint.answer_to(most)

    def kill() -> None:
        wait_for(lambda: len(endpoint.asked) > most and bool(cluster.workers(SUMMARIZE)), "a kill's moment")
        os.kill(cluster.workers(SUMMARIZE)[0], signal.SIGKILL)
        assert num_described(out) < num_good
        endpoint.answer_to(None)
        chaos.killed.append(SUMMARIZE)

    with Background(kill):
        status, text = run(command)
    assert status == 0, text
    assert proxy.faults[500] > 0
    assert proxy.faults[503] > 0
    chaos.num_asked = len(endpoint.asked) - before
    return Survivor(manifest, out, num_rows, num_good, chaos, command)


def _killed(cluster: Cluster, endpoint: Endpoint, folder: Path) -> Survivor:
    """The job's process is killed, then both of its actors."""
    num_rows = 200
    manifest, num_good = drawn(folder / "manifest", num_rows)
    out = open_folder(folder / "ledger")
    command = flags(manifest, out, endpoint)
    chaos = run_with_kills(
        command,
        cluster,
        out,
        num_good=num_good,
        driver_kills=1,
        worker_titles=[DESCRIBE, SUMMARIZE],
        seed=0,
        cwd=folder,
        endpoint=endpoint,
    )
    assert len(chaos.killed) == 3
    return Survivor(manifest, out, num_rows, num_good, chaos, command)


def assert_complete_and_right(out: Folder, num_rows: int, num_good: int) -> None:
    """Nothing missing, nothing twice, and in each row what an undisturbed run of the plain stages would write."""
    rows = ledger_rows(out)
    counts = count_ledger(out)
    assert (len(rows), counts.num_ids, counts.num_rows, counts.num_repeated) == (num_rows, num_rows, num_rows, 0)
    good = [row for row in rows.values() if row["status"] == "ok"]
    assert len(good) == num_good > 0
    assert all(row["attempt"] == 1 for row in rows.values())
    for row in good:
        assert row["verbose"] == answer(QUESTION.format(instruction=row["instruction"]) + DATA_SUFFIX)
    summarizer = Summarizer("random-summarizer", PRESETS["fast"])
    expected = [text for row in good for text, *_ in summarizer.summarize([row["verbose"]])]
    assert [row["expressive"] for row in good] == expected
    reasons = {rejection_code(row["reason"]) for row in rows.values() if row["status"] == "rejected"}
    assert reasons == {"missing_file", "bad_image"}


# ---- killed and resumed


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_job_killed_and_resumed_by_the_same_command_misses_and_repeats_nothing(survivor: Survivor) -> None:
    assert len(survivor.chaos.killed) >= 2
    assert_complete_and_right(survivor.out, survivor.num_rows, survivor.num_good)
    assert not survivor.out.exists(LEASE_FILE)
    assert survivor.out.list("_work") == []
    record = read_run(survivor.out)
    assert record is not None
    assert record.is_finished


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_kill_loses_no_more_work_than_is_promised(survivor: Survivor) -> None:
    [lost] = survivor.chaos.lost_per_driver_kill
    assert 0 <= lost <= MAX_ROWS_IN_FLIGHT
    num_lost = survivor.chaos.num_asked - survivor.num_good
    assert 0 <= num_lost <= MAX_ROWS_IN_FLIGHT * len(survivor.chaos.killed)


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_command_of_a_finished_run_does_nothing(survivor: Survivor, endpoint: Endpoint) -> None:
    asked, before = len(endpoint.asked), survivor.out.list(is_recursive=True)
    status, text = run(survivor.command)
    assert (status, "0 rows to do" in text) == (0, True), text
    assert len(endpoint.asked) == asked
    assert survivor.out.list(is_recursive=True) == before


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_another_preset_into_the_same_folder_is_refused(survivor: Survivor) -> None:
    status, text = run([*survivor.command, "--preset", "mgie_paper"])
    assert status == 2
    assert "holds another run" in text
    assert "preset" in text


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_second_writer_is_refused(survivor: Survivor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    copy = copied(survivor.out, tmp_path / "ledger")
    with hold_lease(copy):
        status, text = run([*survivor.command, "--out", copy.url])
    assert status == 2
    assert "only one job may" in text


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_or_not")
def test_failed_rows_are_tried_again_as_their_next_attempt(survivor: Survivor, tmp_path: Path) -> None:
    images = Path(copied(survivor.manifest, tmp_path / "images").path)
    shutil.copy(images / "images/0.png", images / "images/missing.png")  # found again
    out = copied(survivor.out, tmp_path / "ledger")
    before = ledger_rows(out)
    status, text = run([*survivor.command, "--out", out.url, "--images", str(images), "--retry-failed"])
    assert status == 0, text
    after = ledger_rows(out)
    assert after.keys() == before.keys()
    for row_id, row in before.items():
        if row["status"] == "ok":
            assert after[row_id] == row
        else:
            is_found = rejection_code(row["reason"]) == "missing_file"
            assert (after[row_id]["attempt"], after[row_id]["status"]) == (2, "ok" if is_found else "rejected")


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_cluster_that_is_too_small_is_refused(cluster: Cluster, endpoint: Endpoint, tmp_path: Path) -> None:
    manifest, _ = drawn(tmp_path / "manifest", 8)
    out = open_folder(tmp_path / "ledger")
    status, text = run([*flags(manifest, out, endpoint), "--describe.num-cpus", "2"])
    assert status == 2
    assert "the job needs 2.75 CPUs at least, the cluster has 2; lower --describe.num-cpus" in text


@pytest.mark.ray
@pytest.mark.endure
@pytest.mark.timeout(1800)
def test_a_job_that_is_killed_on_a_small_cluster_never_hangs(endpoint: Endpoint, tmp_path: Path) -> None:
    manifest, num_good = drawn(tmp_path / "manifest", 40)
    out = open_folder(tmp_path / "ledger")
    command = flags(manifest, out, endpoint)
    with private_cluster(num_cpus=1) as small:
        chaos = run_with_kills(
            [*command, "--describe.num-cpus", "0.3", "--summarize.num-cpus", "0.3"],
            small,
            out,
            num_good=num_good,
            driver_kills=1,
            worker_titles=[],
            seed=0,
            cwd=tmp_path,
            endpoint=endpoint,
        )
    assert len(chaos.killed) == 1
    assert_complete_and_right(out, 40, num_good)


@pytest.mark.ray
@pytest.mark.endure
@pytest.mark.timeout(1800)
def test_a_faulty_object_store_and_a_kill_change_nothing(
    cluster: Cluster, s3: str, s3_server: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    num_rows = 120
    num_good = write_manifest(open_folder(f"{s3}/manifest"), num_rows)
    out = open_folder(f"{s3}/ledger")
    command = flags(open_folder(f"{s3}/manifest"), out, endpoint)
    with FaultProxy(s3_server, share=0.05, seed=0) as proxy:
        # The workers inherit the credentials; every process is led to the proxy by the flag.
        chaos = run_with_kills(
            [*command, "--endpoint", proxy.url],
            cluster,
            out,
            num_good=num_good,
            driver_kills=1,
            worker_titles=[DESCRIBE],
            seed=0,
            cwd=tmp_path,
            endpoint=endpoint,
        )
    assert len(chaos.killed) == 2
    assert proxy.faults[500] > 0
    assert proxy.faults[503] > 0
    assert sum(proxy.faults.values()) / proxy.num_requests == pytest.approx(0.05, abs=0.025)
    assert max(chaos.lost_per_driver_kill) <= MAX_ROWS_IN_FLIGHT
    assert_complete_and_right(out, num_rows, num_good)
    keys = boto3.client("s3", endpoint_url=s3_server).list_objects_v2(Bucket=s3.removeprefix("s3://"))["Contents"]
    assert not [entry["Key"] for entry in keys if "/_work/" in entry["Key"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_or_not")
def test_without_arguments_the_sample_rows_are_done_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = run([])
    assert status == 0, text
    assert f"ledger: {tmp_path}/out/ledger" in text
    rows = ledger_rows(open_folder(tmp_path / "out" / "ledger"))
    assert len(rows) > 10
    assert {row["status"] for row in rows.values()} == {"ok"}
    report = json.loads((tmp_path / "out" / "ledger" / "_report" / "report.json").read_text())
    assert report["rows"] == len(rows)
    assert (tmp_path / "out" / "ledger" / "_report" / "report.html").is_file()


# ---- parts


def test_the_budget_makes_a_block_wait_until_rows_come_back() -> None:
    async def run() -> list[str]:
        budget, order = RowBudget(16), []

        async def take(block: str) -> None:
            await budget.take(block, 8)
            order.append(f"take {block}")

        await take("a")
        await take("b")
        waiting = asyncio.create_task(take("c"))
        await asyncio.sleep(0)  # the task runs until it waits
        assert not waiting.done()
        order.append("give back a")
        await budget.give_back("a")
        await waiting
        return order

    assert asyncio.run(run()) == ["take a", "take b", "give back a", "take c"]


def test_a_block_that_is_run_again_takes_nothing_more() -> None:
    async def run() -> None:
        budget = RowBudget(8)
        await budget.take("a", 8)
        await budget.take("a", 8)
        await budget.give_back("a")
        await budget.give_back("a")
        await budget.take("b", 8)
        waiting = asyncio.create_task(budget.take("c", 1))
        await asyncio.sleep(0)  # the task runs until it waits
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(run())


def test_a_budget_too_small_for_all_describing_actors_is_refused() -> None:
    config = SummarizeConfig(max_rows_in_flight=64)
    with pytest.raises(ConfigError, match="it must be at least 128"):
        replace(config, describe=replace(config.describe, max_actors=4))
