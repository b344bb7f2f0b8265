"""The summarize job as its users run it: a command on a cluster, killed, resumed, refused.

Each Ray test runs on a cluster of its own. Sizes are those of a quick run; `benchmarks/summarize_chaos.py` runs the
same with thousands of rows.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest

from mgie.errors import ConfigError
from mgie.ledger import count_ledger, rejection_code
from mgie.prompts import DATA_SUFFIX, QUESTION
from pipelines.lease import LEASE_FILE, hold_lease
from pipelines.stages import PRESETS, Summarizer
from pipelines.storage import Folder, open_folder, read_run
from pipelines.summarize import RowBudget, SummarizeConfig
from tests.pipelines.chaos import (
    Chaos,
    Cluster,
    Endpoint,
    Job,
    answer,
    drawn,
    ledger_rows,
    private_cluster,
    run_with_kills,
    write_manifest,
)
from tests.pipelines.fault_proxy import FaultProxy

ROWS_PER_COMMIT, MAX_ROWS_IN_FLIGHT = 8, 32
DESCRIBE, SUMMARIZE = (
    "ray::MapWorker(MapBatches(_Describe))",
    "ray::MapWorker(MapBatches(_SummarizeAndCommit))",
)


def flags(manifest: Folder, out: Folder, endpoint: Endpoint) -> list[str]:
    return [
        *("--manifest", manifest.url, "--out", out.url, "--preset", "fast"),
        *("--backend", "openai", "--base-url", endpoint.url, "--describe-model", "counting"),
        *("--summarize-model", "random-summarizer"),
        *("--rows-per-commit", str(ROWS_PER_COMMIT), "--max-rows-in-flight", str(MAX_ROWS_IN_FLIGHT)),
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with private_cluster(num_cpus=4) as started:
        yield started


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


@pytest.fixture(scope="module")
def survivor(cluster: Cluster, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    folder, num_rows = tmp_path_factory.mktemp("survivor"), 200
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
    return Survivor(manifest, out, num_rows, num_good, chaos, command)


def assert_complete_and_right(out: Folder, num_rows: int, num_good: int) -> None:
    """Nothing missing, nothing twice, and in each row what an undisturbed run of the plain stages would write."""
    rows = ledger_rows(out)
    counts = count_ledger(out.filesystem, out.path)
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
@pytest.mark.timeout(400)
def test_a_job_killed_and_resumed_by_the_same_command_misses_and_repeats_nothing(survivor: Survivor) -> None:
    assert len(survivor.chaos.killed) == 3
    assert_complete_and_right(survivor.out, survivor.num_rows, survivor.num_good)
    assert not survivor.out.exists(LEASE_FILE)
    assert survivor.out.list("_work") == []
    record = read_run(survivor.out)
    assert record is not None
    assert record.is_finished


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_kill_loses_no_more_work_than_is_promised(survivor: Survivor) -> None:
    [lost] = survivor.chaos.lost_per_driver_kill
    assert 0 <= lost <= MAX_ROWS_IN_FLIGHT
    num_lost = survivor.chaos.num_asked - survivor.num_good
    assert 0 <= num_lost <= MAX_ROWS_IN_FLIGHT * len(survivor.chaos.killed)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_command_of_a_finished_run_does_nothing(
    survivor: Survivor, cluster: Cluster, endpoint: Endpoint, tmp_path: Path
) -> None:
    asked, before = len(endpoint.asked), survivor.out.list(is_recursive=True)
    with Job(survivor.command, cluster.env, cwd=tmp_path) as job:
        status, output = job.finish()
    assert (status, output.startswith("0 rows to do")) == (0, True), output
    assert len(endpoint.asked) == asked
    assert survivor.out.list(is_recursive=True) == before


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_another_preset_into_the_same_folder_is_refused(survivor: Survivor, cluster: Cluster, tmp_path: Path) -> None:
    with Job([*survivor.command, "--preset", "mgie_paper"], cluster.env, cwd=tmp_path) as job:
        status, output = job.finish()
    assert status == 2
    assert "holds another run" in output
    assert "preset" in output


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_second_writer_is_refused(survivor: Survivor, cluster: Cluster, tmp_path: Path) -> None:
    copied = open_folder(shutil.copytree(survivor.out.path, tmp_path / "ledger"))
    command = [*survivor.command, "--out", copied.url]
    with hold_lease(copied), Job(command, cluster.env, cwd=tmp_path) as job:
        status, output = job.finish()
    assert status == 2
    assert "only one job may" in output


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_failed_rows_are_tried_again_as_their_next_attempt(
    survivor: Survivor, cluster: Cluster, tmp_path: Path
) -> None:
    images = shutil.copytree(survivor.manifest.path, tmp_path / "images")
    shutil.copy(images / "images/0.png", images / "images/missing.png")  # found again
    out = open_folder(shutil.copytree(survivor.out.path, tmp_path / "ledger"))
    before = ledger_rows(out)
    command = [*survivor.command, "--out", out.url, "--images", str(images), "--retry-failed"]
    with Job(command, cluster.env, cwd=tmp_path) as job:
        status, output = job.finish()
    assert status == 0, output
    after = ledger_rows(out)
    assert after.keys() == before.keys()
    for row_id, row in before.items():
        if row["status"] == "ok":
            assert after[row_id] == row
        else:
            is_found = rejection_code(row["reason"]) == "missing_file"
            assert (after[row_id]["attempt"], after[row_id]["status"]) == (2, "ok" if is_found else "rejected")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_cluster_is_refused_or_finishes_but_never_hangs(endpoint: Endpoint, tmp_path: Path) -> None:
    manifest, num_good = drawn(tmp_path / "manifest", 40)
    out = open_folder(tmp_path / "ledger")
    command = flags(manifest, out, endpoint)
    with private_cluster(num_cpus=1) as small:
        started = time.monotonic()
        with Job(command, small.env, cwd=tmp_path) as job:
            status, output = job.finish()
        assert status == 2
        assert "the job needs 1.25 CPUs at least, the cluster has 1; lower --describe.num-cpus" in output
        assert time.monotonic() - started < 60  # most of it Python's imports
        assert not out.exists("run.json")
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
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_faulty_object_store_and_a_kill_change_nothing(
    s3: str, s3_server: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    num_rows = 120
    num_good = write_manifest(open_folder(f"{s3}/manifest"), num_rows)
    out = open_folder(f"{s3}/ledger")
    command = flags(open_folder(f"{s3}/manifest"), out, endpoint)
    with FaultProxy(s3_server, share=0.05, seed=0) as proxy, private_cluster(num_cpus=4) as cluster:
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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_arguments_the_sample_rows_are_done_here(cluster: Cluster, tmp_path: Path) -> None:
    with Job([], cluster.env, cwd=tmp_path) as job:
        status, output = job.finish()
    assert status == 0, output
    assert f"ledger: {tmp_path}/out/ledger" in output.replace("\n", "")
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
        await asyncio.sleep(0.05)
        order.append("give back a")
        await budget.give_back("a")
        await asyncio.wait_for(waiting, 1)
        return order

    assert asyncio.run(run()) == ["take a", "take b", "give back a", "take c"]


def test_a_block_that_is_run_again_takes_nothing_more() -> None:
    async def run() -> None:
        budget = RowBudget(8)
        await budget.take("a", 8)
        await asyncio.wait_for(budget.take("a", 8), 1)
        await budget.give_back("a")
        await budget.give_back("a")
        await asyncio.wait_for(budget.take("b", 8), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(budget.take("c", 1), 0.05)

    asyncio.run(run())


def test_a_budget_too_small_for_all_describing_actors_is_refused() -> None:
    config = SummarizeConfig(max_rows_in_flight=64)
    with pytest.raises(ConfigError, match="it must be at least 128"):
        replace(config, describe=replace(config.describe, max_actors=4))
