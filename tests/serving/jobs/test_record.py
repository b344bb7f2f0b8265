"""Changes that a job may go through, in closed form."""

from serving.edits.call import EditCall
from serving.jobs.record import CLOCK_SKEW_S, JobOrder, JobRecord, Lease, stored_call
from serving.stages.messages import EditOptions

OPTIONS = EditOptions(
    model="m",
    instruction="make it night",
    expressive=None,
    overrides={"steps": 3, "guidance_scale": 4.0},
    seed=2**40,
    n=2,
    deterministic=True,
    num_partials=0,
    output_format="webp",
    output_quality=80,
    output_wh=(64, 48),
    keeps_lossless=True,
)


def record(**changes: object) -> JobRecord:
    order = JobOrder(
        call=stored_call(OPTIONS),
        image="i",
        mask="m",
        base_url="http://here",
        wants_urls=False,
        owner="",
        priority="batch",
        created_s=100.0,
        ends_s=200.0,
    )
    return JobRecord(order=order).model_copy(update=changes)


def test_the_edit_of_a_job_survives_the_store() -> None:
    stored = JobRecord.model_validate_json(record().model_dump_json())
    assert stored == record()
    assert stored.order.edit_call(image=b"image", mask=b"mask", deadline=5.0) == EditCall(
        image=b"image", mask=b"mask", options=OPTIONS, deadline=5.0
    )
    assert b"image" not in record().model_dump_json().encode().split(b'"call"')[1].split(b'"image":"i"')[0]


def test_a_record_names_the_fields_of_an_edit_as_version_0_1_did() -> None:
    assert list(stored_call(OPTIONS)) == [
        "model", "instruction", "expressive", "overrides", "seed", "n", "deterministic", "num_partials",
        "output_format", "output_quality", "output_wh", "keeps_lossless", "patience_s", "trace",
    ]  # fmt: skip


def test_a_job_is_due_when_its_pause_is_over_or_its_time_is_up() -> None:
    assert record().due_s() == 0
    assert record(not_before_s=150.0).due_s() == 150
    assert record(not_before_s=250.0).due_s() == 200


def test_a_lease_is_left_alone_until_it_has_run_out_by_the_slowest_clock() -> None:
    claimed = record().claimed(Lease(holder="a", until_s=110.0), now_s=104.0)
    assert (claimed.status, claimed.started_s, claimed.due_s()) == ("deriving", 104, 110 + CLOCK_SKEW_S)


def test_only_a_lease_that_ran_out_counts_as_a_failure() -> None:
    first, second = Lease(holder="a", until_s=110.0), Lease(holder="b", until_s=130.0)
    begun = record().claimed(first, now_s=104.0)
    assert (begun.attempts, begun.failures) == (1, 0)
    taken_over = begun.claimed(second, now_s=124.0)
    assert (taken_over.attempts, taken_over.failures, taken_over.lease) == (2, 1, second)
    given_back = begun.put_back()
    assert (given_back.status, given_back.lease, given_back.due_s()) == ("queued", None, 0)
    again = given_back.claimed(second, now_s=124.0)
    assert (again.attempts, again.failures) == (2, 0)


def test_an_end_frees_the_job() -> None:
    begun = record().claimed(Lease(holder="a", until_s=110.0), now_s=104.0)
    ended = begun.ended("failed", now_s=105.0, error={"message": "m"})
    assert ended.has_ended
    assert not begun.has_ended
    assert (ended.status, ended.lease, ended.ended_s, ended.error) == ("failed", None, 105, {"message": "m"})
