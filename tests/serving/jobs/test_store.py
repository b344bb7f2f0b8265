"""Jobs in a store that several use at once: a folder, and S3."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgie.config import ImageLimits
from mgie.errors import ImageError, ImageTooLargeError, MaskError
from serving.edits.call import EditCall, edit_options
from serving.errors import JobEndedError, KeyReusedError, NotFoundError
from serving.jobs.record import JobRecord, Lease
from serving.jobs.store import HEAD_START_S, Job, JobRequest, JobStore, QueueEntry, form_digest
from serving.schema import EditForm
from serving.storage.artifacts import ArtifactStore, open_blobs
from serving.storage.blobs import LocalBlobs
from tests.serving.s3_store import S3Store

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
TTL_S = 1000.0


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Shop:
    """Any number of job stores over one place."""

    def __init__(self, url: str) -> None:
        self.url, self.clock = url, Clock()

    def open(self) -> JobStore:
        artifacts = ArtifactStore(open_blobs(self.url), ttl_s=TTL_S, clock=self.clock)
        return JobStore(artifacts, limits=ImageLimits())


@pytest.fixture(params=["folder", "s3"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    if request.param == "folder":
        yield Shop(str(tmp_path / "store"))
        return
    with S3Store(monkeypatch) as s3:
        yield Shop(f"s3://{s3.bucket}/jobs")


@pytest.fixture
def folder(tmp_path: Path) -> Shop:
    return Shop(str(tmp_path / "store"))


@pytest.fixture
def ask(small: bytes) -> Callable[..., JobRequest]:
    def make(*, image: bytes = small, mask: bytes | None = None, prompt: str = "p", **changes: Any) -> JobRequest:
        form = EditForm(image=image, mask=mask, prompt=prompt, seed=1, steps=1)
        request = JobRequest(
            call=EditCall(image=image, mask=mask, options=edit_options(form, model="random"), deadline=0.0),
            square_crop=False,
            base_url="http://here",
            wants_urls=False,
            owner="",
            priority="batch",
            timeout_s=500.0,
            webhook_url=None,
            key=None,
            digest=form_digest(form),
        )
        return replace(request, **changes)

    return make


Ask = Callable[..., JobRequest]


def test_what_was_accepted_is_found_by_others_with_all_that_it_needs(
    shop: Shop, ask: Ask, photo: Photo, mask: Photo
) -> None:
    request = ask(image=photo(96, 64), mask=mask((0, 0, 50, 64)), owner="alice", priority="interactive")
    job = shop.open().accept(request)
    there = shop.open()
    (place,) = there.line()
    assert place.job_id == job.id
    found = there.get(job.id)
    assert found.record == job.record
    pictures = there.pictures(found)
    assert pictures == (request.call.image, request.call.mask)
    assert found.record.order.edit_call(image=pictures[0], mask=pictures[1], deadline=0.0) == request.call
    assert (found.record.order.owner, found.record.order.priority) == ("alice", "interactive")


def test_pictures_that_cannot_be_used_are_refused_before_anything_is_stored(
    folder: Shop, ask: Ask, photo: Photo, mask: Photo, png_header: Photo
) -> None:
    jobs = folder.open()
    for request, error in (
        (ask(image=b"no picture", key="k"), ImageError),
        (ask(image=photo()[:-100], key="k"), ImageError),
        (ask(image=png_header(60000, 60000), key="k"), ImageTooLargeError),
        (ask(image=photo(96, 64), mask=mask((0, 0, 9, 9), size=(64, 96)), key="k"), MaskError),
        (ask(image=photo(96, 64), mask=mask((0, 0, 0, 0)), key="k"), MaskError),
        (ask(image=photo(96, 64), mask=photo(96, 64), key="k"), MaskError),
    ):
        with pytest.raises(error):
            jobs.accept(request)
    assert not [path for path in Path(folder.url).rglob("*") if path.is_file() and path.name != "lock"]


def test_the_line_goes_by_age_and_interactive_jobs_have_a_head_start(folder: Shop, ask: Ask) -> None:
    jobs = folder.open()
    arrivals = [
        (0.0, "batch", 2),
        (HEAD_START_S - 1, "interactive", 0),
        (HEAD_START_S, "batch", 4),
        (HEAD_START_S - 0.5, "interactive", 1),
        (HEAD_START_S + 0.5, "interactive", 3),  # came too late to pass the first
    ]
    expected = {}
    start_s = folder.clock.now_s
    for after_s, priority, rank in arrivals:
        folder.clock.now_s = start_s + after_s
        expected[rank] = jobs.accept(ask(priority=priority)).id
    assert [place.job_id for place in jobs.line()] == [expected[rank] for rank in range(5)]


def test_the_line_holds_nothing_but_places(folder: Shop, ask: Ask) -> None:
    jobs = folder.open()
    job = jobs.accept(ask())
    jobs.artifacts.create("queue", "something-else", {})
    assert jobs.line() == [QueueEntry.of(job)]


def test_of_many_who_claim_a_job_one_gets_it(shop: Shop, ask: Ask) -> None:
    job = shop.open().accept(ask())
    stores = [shop.open() for _ in range(6)]
    barrier = threading.Barrier(len(stores))

    def claim(number: int) -> Job | None:
        lease = Lease(holder=str(number), until_s=shop.clock.now_s + 10)
        barrier.wait()
        return stores[number].update(
            job, lambda record: None if record.lease else record.claimed(lease, now_s=shop.clock.now_s)
        )

    with ThreadPoolExecutor(len(stores)) as pool:
        claimed = [won for won in pool.map(claim, range(len(stores))) if won is not None]
    assert len(claimed) == 1
    assert shop.open().get(job.id).record == claimed[0].record


def test_changes_made_at_once_are_all_made(folder: Shop, ask: Ask) -> None:
    job = folder.open().accept(ask())

    def count(_: int) -> None:
        folder.open().update(job, lambda record: record.model_copy(update={"attempts": record.attempts + 1}))

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(count, range(20)))
    assert folder.open().get(job.id).record.attempts == 20


def test_equal_requests_with_one_key_make_one_job_however_they_race(shop: Shop, ask: Ask) -> None:
    stores = [shop.open() for _ in range(6)]
    barrier = threading.Barrier(len(stores))

    def accept(store: JobStore) -> str:
        barrier.wait()
        return store.accept(ask(key="k")).id

    with ThreadPoolExecutor(len(stores)) as pool:
        ids = set(pool.map(accept, stores))
    assert len(ids) == 1
    assert [place.job_id for place in shop.open().line()] == list(ids)
    artifacts = shop.open().artifacts
    assert artifacts.read(shop.open().get(ids.pop()).record.order.image)


def test_losers_of_the_race_leave_no_photo(folder: Shop, ask: Ask) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: folder.open().accept(ask(key="k")), range(6)))
    assert len(list(Path(folder.url, "artifacts").glob("*.image"))) == 1


def test_a_key_belongs_to_its_owner_and_to_one_request(folder: Shop, ask: Ask, photo: Photo) -> None:
    jobs = folder.open()
    first = jobs.accept(ask(key="k", owner="alice"))
    assert jobs.accept(ask(key="k", owner="alice")).id == first.id
    assert jobs.accept(ask(key="k", owner="bob")).id != first.id
    assert jobs.accept(ask(key="l", owner="alice")).id != first.id
    for other in (ask(key="k", owner="alice", prompt="q"), ask(key="k", owner="alice", image=photo(48, 32, seed=1))):
        with pytest.raises(KeyReusedError, match="another request"):
            jobs.accept(other)


def test_a_key_whose_first_request_died_half_way_makes_the_job_that_was_begun(folder: Shop, ask: Ask) -> None:
    jobs = folder.open()
    request = ask(key="k")
    begun = jobs.artifacts.new_id()
    jobs._claim_key(request.owner, "k", request.digest, begun)
    assert folder.open().accept(request).id == begun
    jobs.remove(jobs.line()[0])  # died before the place was written
    assert folder.open().accept(request).id == begun
    assert [place.job_id for place in jobs.line()] == [begun]


def test_a_key_is_free_again_when_its_job_has_expired(folder: Shop, ask: Ask) -> None:
    first = folder.open().accept(ask(key="k"))
    folder.clock.now_s += TTL_S + 1
    assert folder.open().find(first.id) is None
    second = folder.open().accept(ask(key="k", prompt="q"))
    assert second.id != first.id
    assert folder.open().accept(ask(key="k", prompt="q")).id == second.id


def test_a_job_and_its_result_expire_together_though_it_was_written_later(folder: Shop, ask: Ask) -> None:
    jobs = folder.open()
    job = jobs.accept(ask())
    folder.clock.now_s += TTL_S - 10
    assert jobs.update(job, lambda record: record.put_back()) is not None
    folder.clock.now_s += 11
    with pytest.raises(NotFoundError):
        jobs.get(job.id)


def test_a_cancelled_job_stays_so_and_leaves_neither_photo_nor_place(shop: Shop, ask: Ask) -> None:
    jobs = shop.open()
    job = jobs.accept(ask())
    assert shop.open().cancel(job.id).record.status == "cancelled"
    with pytest.raises(JobEndedError, match="the job is cancelled"):
        jobs.cancel(job.id)
    assert jobs.line() == []
    with pytest.raises(NotFoundError):
        jobs.pictures(job)
    ended = jobs.update(job, lambda record: None if record.has_ended else record.ended("done", now_s=0.0))
    assert ended is None
    assert jobs.get(job.id).record.status == "cancelled"


@pytest.mark.parametrize("job_id", ["", "no", "../../etc/passwd", "0" * 40, "f" * 40, "F" * 40])
def test_there_is_no_job_of_a_made_up_id(folder: Shop, job_id: str) -> None:
    with pytest.raises(NotFoundError):
        folder.open().get(job_id)


def test_the_webhook_of_an_ended_job_takes_the_place_of_the_job(folder: Shop, ask: Ask) -> None:
    jobs = folder.open()
    first, second = jobs.accept(ask(webhook_url="http://here/")), jobs.accept(ask())
    jobs.cancel(first.id)
    assert [(place.job_id, place.is_delivery) for place in jobs.line()] == [(second.id, False), (first.id, True)]


def test_a_write_whose_answer_was_lost_counts_once(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Store(monkeypatch) as s3:
        jobs = Shop(f"s3://{s3.bucket}/jobs").open()
        job = jobs.accept(ask())
        s3.faults.append(("PUT", "lost"))

        def more(record: JobRecord) -> JobRecord:
            return record.model_copy(update={"attempts": record.attempts + 1})

        written = jobs.update(job, more)
        assert not s3.faults
        assert written is not None
        assert jobs.get(job.id).record.attempts == written.record.attempts == 1


def test_digests_differ_with_anything_asked_for(small: bytes, photo: Photo) -> None:
    form = {"image": small, "prompt": "p"}
    others: list[dict[str, Any]] = [
        {"prompt": "q"},
        {"seed": 0},
        {"image": photo(48, 32, seed=1)},
        {"mask": small},
        {"webhook_url": "http://here/"},
        {"keep": True},
    ]
    digests = {form_digest(EditForm(**form | changes)) for changes in ({}, *others)}
    assert len(digests) == 1 + len(others)
    assert form_digest(EditForm(**form)) in digests


def test_a_folder_is_what_the_line_is_read_from_at_each_look(folder: Shop, ask: Ask, monkeypatch: Any) -> None:
    """One listing, and no document."""
    jobs = folder.open()
    for _ in range(3):
        jobs.accept(ask())
    reads: list[str] = []
    original = LocalBlobs.read
    monkeypatch.setattr(LocalBlobs, "read", lambda blobs, key: reads.append(key) or original(blobs, key))
    assert len(jobs.line()) == 3
    assert reads == []
