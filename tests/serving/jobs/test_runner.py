"""Jobs run by several replicas that die, come back, compete and fail."""

import asyncio
import base64
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mgie.errors import DeadlineError, EngineFullError, PromptError
from serving.edits.cancellation import SETTLE_S, CancelBoard
from serving.edits.in_process import InProcessBackend
from serving.edits.results import ResultStore
from serving.errors import ModelUnavailableError, NotFoundError, StageUnavailableError, StoreError
from serving.jobs.record import CLOCK_SKEW_S, Lease
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from serving.storage.blobs import LocalBlobs
from tests.serving.jobs.conftest import ENDED, LONG, Failing, Held, Replica, Replicas, looked_at_the_line
from tests.waiting import until

pytestmark = pytest.mark.slow

LEASE_S = 1.0
LONG_LEASE_S = 1000.0  # without a heartbeat while a test runs, but for news


def image_of(job: dict[str, Any]) -> bytes:
    return base64.b64decode(job["result"]["data"][0]["b64_json"])


def synchronous(replica: Replica, image: bytes, **fields: str) -> bytes:
    data = {"prompt": "p", "steps": "1", "seed": "1", "deterministic": "true"} | fields
    answer = replica.request("POST", "/v1/images/edits", files={"image": image}, data=data)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def images(replicas: Replicas) -> set[str]:
    return {path.stem for path in Path(replicas.url, "artifacts").glob("*.image")}


def settled(replicas: Replicas) -> None:
    """Waits until nobody has anything to do any more."""
    until(lambda: not replicas.jobs().line())


def counted_stores(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the results of an edit have been stored, by whatever replica."""
    stored, store = [], ResultStore.store

    def counted(*args: Any, **given: Any) -> Any:
        try:
            return store(*args, **given)
        finally:
            stored.append(1)

    monkeypatch.setattr(ResultStore, "store", counted)
    return lambda: len(stored)


def test_a_job_ends_as_the_synchronous_edit_does_and_leaves_only_its_result(replicas: Replicas, small: bytes) -> None:
    here = replicas.open()
    job = here.wait(here.accept(small, n="2"), *ENDED)
    assert job["status"] == "done"
    assert image_of(job) == synchronous(here, small)
    assert len(job["result"]["data"]) == 2
    settled(replicas)
    assert len(images(replicas)) == 2  # the photo is gone


def test_a_job_is_run_by_another_replica_than_the_one_that_accepted_it_and_died(
    replicas: Replicas, small: bytes
) -> None:
    here = replicas.open(is_at_work=False)
    job_id = here.accept(small)
    here.freeze()
    there = replicas.open()
    job = there.wait(job_id, *ENDED)
    assert (job["status"], job["attempts"]) == ("done", 1)
    assert image_of(job) == synchronous(there, small)


def test_a_job_whose_replica_died_under_it_is_taken_over_when_the_lease_has_run_out(
    replicas: Replicas, small: bytes
) -> None:
    here = replicas.open(backend=Held(replicas.backend), lease_s=LEASE_S)
    job_id = here.accept(small, steps="4")
    here.wait(job_id, "rendering")
    here.freeze()
    there = replicas.open(lease_s=LEASE_S)
    looked_at_the_line()
    assert there.job(job_id)["attempts"] == 1  # the lease still holds
    replicas.clock.now_s += LEASE_S + CLOCK_SKEW_S
    job = there.wait(job_id, *ENDED)
    assert (job["status"], job["attempts"]) == ("done", 2)
    assert image_of(job) == synchronous(there, small, steps="4")


def test_of_two_that_finish_the_same_job_one_commits_and_the_other_deletes_its_images(
    replicas: Replicas, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, num_stored = Held(replicas.backend), counted_stores(monkeypatch)
    here = replicas.open(backend=backend, lease_s=LONG_LEASE_S)
    job_id = here.accept(small, steps="4")
    here.wait(job_id, "rendering")
    here.freeze()
    replicas.clock.now_s += LONG_LEASE_S + CLOCK_SKEW_S
    there = replicas.open(lease_s=LONG_LEASE_S)
    first = there.wait(job_id, "done")
    settled(replicas)
    committed = images(replicas)
    assert (len(committed), num_stored()) == (1, 1)
    # It never hears of the loss: its next heartbeat is minutes away.
    store = replicas.jobs()
    here.thaw()
    backend.may_end.set()
    until(lambda: num_stored() == 2)
    until(lambda: images(replicas) == committed)
    assert there.job(job_id) == first
    until(lambda: not store.line())


def test_a_run_that_lost_its_lease_unawares_does_not_commit(
    replicas: Replicas, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with a heartbeat that comes too late to help."""
    backend, num_stored = Held(replicas.backend), counted_stores(monkeypatch)
    here = replicas.open(backend=backend, lease_s=3600.0)
    job_id = here.accept(small, steps="4")
    here.wait(job_id, "rendering")
    jobs = replicas.jobs()
    mine = Lease(holder="me", until_s=replicas.clock.now_s + 3600)
    stolen = jobs.update(jobs.get(job_id), lambda record: record.claimed(mine, now_s=replicas.clock.now_s))
    assert stolen is not None
    backend.may_end.set()
    until(lambda: num_stored() == 1)
    until(lambda: images(replicas) == {stolen.record.order.image})  # its result is deleted
    assert jobs.get(job_id).record == stolen.record


def test_a_replica_that_ends_in_order_gives_its_jobs_back_at_once(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(lease_s=3600.0)
    job_id = here.accept(small, **LONG)
    here.wait(job_id, "rendering")
    here.close()
    given_back = replicas.jobs().get(job_id).record
    assert (given_back.status, given_back.lease, given_back.failures) == ("queued", None, 0)
    there = replicas.open()
    there.wait(job_id, "deriving", "rendering")
    assert there.request("DELETE", f"/v1/edits/{job_id}").status_code == 200


def test_a_replica_runs_no_more_jobs_at_a_time_than_it_may_and_all_come_to_their_turn(
    replicas: Replicas, small: bytes
) -> None:
    backend = Failing(replicas.backend)
    accepting = replicas.open(is_at_work=False)
    ids = []
    for seed in range(5):
        replicas.clock.now_s += 0.01
        ids.append(accepting.accept(small, seed=str(seed), steps="20"))
    here = replicas.open(backend=backend, max_running=2)
    for job_id in ids:
        here.wait(job_id, "done")
    assert backend.most_open == 2
    assert backend.seeds[0] == min(backend.seeds) == 0
    assert [set(backend.seeds[:i]) <= set(range(i + 1)) for i in range(6)] == [
        True
    ] * 6  # begun in the order of the line


# ---- cancelling


def test_a_queued_job_is_cancelled_by_any_replica_and_never_run(replicas: Replicas, small: bytes) -> None:
    backend = Failing(replicas.backend)
    here, there = replicas.open(is_at_work=False), replicas.open(is_at_work=False)
    job_id = here.accept(small)
    assert there.request("DELETE", f"/v1/edits/{job_id}").json()["status"] == "cancelled"
    replicas.open(backend=backend)
    looked_at_the_line()
    assert here.job(job_id)["status"] == "cancelled"
    assert backend.num_calls == 0
    assert images(replicas) == set()


@pytest.mark.parametrize("way", ["own replica", "board", "heartbeat"])
def test_a_running_job_that_is_cancelled_leaves_the_engine(
    replicas: Replicas, mllm: MLLMStage, random_bundle: Path, small: bytes, way: str
) -> None:
    stage = DiffusionStage(str(random_bundle), device="cpu")
    now_s = [0.0]
    board = CancelBoard(clock=lambda: now_s[0]) if way == "board" else None
    here = replicas.open(
        backend=InProcessBackend(mllm, stage), board=board, lease_s=1.0 if way == "heartbeat" else 3600.0
    )
    job_id = here.accept(small, **LONG)
    here.wait(job_id, "rendering")
    there = here if way == "own replica" else replicas.open(is_at_work=False)
    if board is None:
        assert there.request("DELETE", f"/v1/edits/{job_id}").json()["status"] == "cancelled"
    else:  # on the loop that the board lives on
        now_s[0] = 2 * SETTLE_S
        replicas.jobs().cancel(job_id)
        assert here._do(board.cancel(job_id))
    until(lambda: not asyncio.run(stage.stats()).work.num_in_flight)  # type: ignore[union-attr]
    work: Any = asyncio.run(stage.stats()).work
    assert work.num_cancelled == 1
    assert work.max_steps_after_end <= 1
    until(lambda: images(replicas) == set())
    assert here.job(job_id)["status"] == "cancelled"
    stage.close()


def test_a_job_that_has_ended_cannot_be_cancelled(replicas: Replicas, small: bytes) -> None:
    here = replicas.open()
    job_id = here.accept(small)
    done = here.wait(job_id, "done")
    answer = here.request("DELETE", f"/v1/edits/{job_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_ended")
    assert "the job is done" in answer.json()["error"]["message"]
    assert here.job(job_id) == done


# ---- failures


def test_outages_are_waited_out(replicas: Replicas, small: bytes) -> None:
    outages = [
        StageUnavailableError("gone"),
        EngineFullError("full", retry_after_s=0.1),
        ModelUnavailableError("cannot be loaded now"),
        StoreError("slow"),
    ]
    backend = Failing(replicas.backend, *outages)
    here = replicas.open(backend=backend, max_failures=1, lease_s=3600.0)
    job_id = here.accept(small)
    while (job := here.job(job_id))["status"] not in ENDED:
        replicas.clock.now_s += 1.0  # the pauses
        time.sleep(0.05)
    assert (job["status"], job["attempts"], job["error"]) == ("done", 1 + len(outages), None)
    assert backend.errors == []


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        (PromptError("too long", param="instruction"), "invalid_prompt", "prompt"),
        (DeadlineError("too slow"), "deadline_exceeded", None),
    ],
)
def test_an_error_of_the_users_ends_the_job_in_the_form_of_the_api(
    replicas: Replicas, small: bytes, error: Exception, code: str, param: str | None
) -> None:
    here = replicas.open(backend=Failing(replicas.backend, error))
    job = here.wait(here.accept(small), *ENDED)
    assert (job["status"], job["attempts"], job["result"]) == ("failed", 1, None)
    assert set(job["error"]) == {"message", "type", "param", "code"}
    assert (job["error"]["code"], job["error"]["param"]) == (code, param)
    settled(replicas)
    assert images(replicas) == set()


def test_a_job_that_fails_again_and_again_without_a_reason_is_given_up(replicas: Replicas, small: bytes) -> None:
    backend = Failing(replicas.backend, *(RuntimeError("canary") for _ in range(9)))
    here = replicas.open(backend=backend, max_failures=3, lease_s=3600.0)
    job_id = here.accept(small)
    while (job := here.job(job_id))["status"] not in ENDED:
        replicas.clock.now_s += 1.0
        time.sleep(0.02)
    assert (job["status"], job["error"]["code"], backend.num_calls) == ("failed", "job_failed", 3)
    assert "canary" not in str(job)


def test_a_job_that_brings_down_every_replica_is_given_up(replicas: Replicas, small: bytes) -> None:
    job_id = replicas.open(is_at_work=False).accept(small)
    jobs = replicas.jobs()
    for number in range(3):
        lease = Lease(holder=str(number), until_s=replicas.clock.now_s)
        assert jobs.update(jobs.get(job_id), lambda record, lease=lease: record.claimed(lease, now_s=0.0))
    replicas.clock.now_s += CLOCK_SKEW_S
    backend = Failing(replicas.backend)
    job = replicas.open(backend=backend, max_failures=3).wait(job_id, *ENDED)
    assert (job["status"], job["error"]["code"], backend.num_calls) == ("failed", "job_failed", 0)


def test_a_job_that_is_not_done_in_its_time_is_given_up_queued_or_running(replicas: Replicas, small: bytes) -> None:
    accepting = replicas.open(is_at_work=False)
    running, queued = accepting.accept(small, timeout_s="60", n="10", **LONG), accepting.accept(small, timeout_s="2")
    replicas.clock.now_s += 59.0  # what is left to the first is too little on any machine
    here = replicas.open(max_running=1)
    overdue = here.wait(queued, *ENDED)
    assert (overdue["error"]["code"], overdue["attempts"]) == ("deadline_exceeded", 0)
    job = here.wait(running, *ENDED)
    assert (job["status"], job["error"]["code"], job["attempts"]) == ("failed", "deadline_exceeded", 1)
    assert job["error"]["message"] == "the job was not done within 60 s and was given up"


def test_what_a_replica_left_undone_after_the_end_of_a_job_is_done_by_another(replicas: Replicas, small: bytes) -> None:
    job_id = replicas.open(is_at_work=False).accept(small)
    jobs = replicas.jobs()
    ended = jobs.update(jobs.get(job_id), lambda record: record.ended("done", now_s=0.0))
    assert ended is not None
    assert len(jobs.line()) == len(images(replicas)) == 1  # the photo
    replicas.open()
    settled(replicas)
    assert images(replicas) == set()


def test_one_damaged_job_holds_up_no_other(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(is_at_work=False)
    damaged, whole = here.accept(small), here.accept(small)
    path = Path(replicas.url, "documents", f"job.{damaged}")
    path.write_bytes(path.read_bytes()[:-20])
    assert replicas.open().wait(whole, *ENDED)["status"] == "done"
    assert here.request("GET", f"/v1/edits/{damaged}").status_code == 503


def test_a_store_that_fails_for_a_while_ends_no_runner(
    replicas: Replicas, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replicas.open()
    original, num_failed = LocalBlobs.list, 0

    def broken(blobs: LocalBlobs, prefix: str, *, after: str = "") -> Any:
        nonlocal num_failed
        num_failed += 1
        raise StoreError("gone") if num_failed % 2 else RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "list", broken)
        job_id = here.accept(small)
        until(lambda: num_failed >= 4)
    assert LocalBlobs.list is original
    assert here.wait(job_id, *ENDED)["status"] == "done"


def test_an_end_that_cannot_be_written_at_first_is_written_later(
    replicas: Replicas, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first write did succeed, and only its answer was lost."""
    monkeypatch.setattr("serving.jobs.runner.COMMIT_PAUSES_S", (0.01, 0.01))
    original, faults = LocalBlobs.write_if, ["before", "after"]

    def broken(blobs: LocalBlobs, key: str, data: bytes, *, version: str | None) -> str | None:
        is_end = key.startswith("documents/job.") and b'"status":"done"' in data
        fault = faults.pop(0) if is_end and faults else None
        written = original(blobs, key, data, version=version) if fault != "before" else None
        if fault is not None:
            raise StoreError("gone")
        return written

    monkeypatch.setattr(LocalBlobs, "write_if", broken)
    here = replicas.open()
    job = here.wait(here.accept(small), *ENDED)
    settled(replicas)
    assert faults == []
    assert (job["status"], job["attempts"]) == ("done", 1)
    assert image_of(here.job(job["id"])) == synchronous(here, small)
    assert len(images(replicas)) == 1


# ---- cost and expectation


def test_a_runner_with_nothing_to_do_reads_no_document_again_and_again(
    replicas: Replicas, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replicas.open(lease_s=3600.0)
    job_id = here.accept(small, **LONG)
    here.wait(job_id, "rendering")
    here.freeze()
    reads: list[str] = []
    lists: list[str] = []
    read, names = LocalBlobs.read, LocalBlobs.list
    monkeypatch.setattr(LocalBlobs, "read", lambda blobs, key: reads.append(key) or read(blobs, key))
    monkeypatch.setattr(
        LocalBlobs, "list", lambda blobs, prefix, after="": lists.append(prefix) or names(blobs, prefix, after=after)
    )
    there = replicas.open()
    until(lambda: len(lists) >= 10)
    assert set(lists) == {"documents/queue."}
    assert reads == [f"documents/job.{job_id}"] * len(reads)
    assert 1 <= len(reads) <= 3  # looked at once: found, and found to be another's
    there.close()


def test_positions_count_the_jobs_before_and_ends_are_estimated_from_those_that_were_run(
    replicas: Replicas, small: bytes
) -> None:
    here = replicas.open(max_running=1)
    assert here.job(here.accept(small))["estimated_end"] is None  # nothing is known yet
    settled(replicas)
    running = here.accept(small, **LONG)
    here.wait(running, "rendering")
    queued = []
    for _ in range(3):
        replicas.clock.now_s += 0.01
        queued.append(here.accept(small))
    until(lambda: [here.job(job_id)["position"] for job_id in queued] == [1, 2, 3])  # after a look at the line
    views = [here.job(job_id) for job_id in queued]
    ends = [view["estimated_end"] for view in views]
    assert ends == sorted(ends)
    assert ends[0] >= int(replicas.clock.now_s)
    view = here.job(running)
    assert view["position"] is None
    assert view["num_steps"] == 1000
    assert here.request("DELETE", f"/v1/edits/{running}").status_code == 200
    for job_id in queued:
        here.wait(job_id, "done")


def test_more_jobs_than_may_wait_are_refused(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(max_running=1, max_queued=2)
    ids = [here.accept(small, **LONG) for _ in range(2)]
    looked_at_the_line()
    refused = here.post(small)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "engine_full")
    assert "at most 2 may be" in refused.json()["error"]["message"]
    for job_id in reversed(ids):
        here.request("DELETE", f"/v1/edits/{job_id}")
    with pytest.raises(NotFoundError):
        replicas.jobs().pictures(replicas.jobs().get(ids[0]))


def test_the_photo_of_a_cancelled_job_is_gone(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(is_at_work=False)
    job_id = here.accept(small)
    read: Callable[[], object] = partial(replicas.jobs().pictures, replicas.jobs().get(job_id))
    read()
    here.request("DELETE", f"/v1/edits/{job_id}")
    with pytest.raises(NotFoundError):
        read()
