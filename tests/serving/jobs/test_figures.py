"""What is told of jobs: figures, and spans in the trace of the request that ordered them."""

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.jobs.record import CLOCK_SKEW_S
from serving.telemetry.tracing import Spans
from tests.serving.figures import Figures
from tests.serving.jobs.conftest import Failing, Replicas
from tests.waiting import until

pytestmark = pytest.mark.slow

LEASE_S = 1.0


def test_jobs_are_counted_by_how_they_end_each_once(replicas: Replicas, small: bytes) -> None:
    figures = Figures()
    here = replicas.open(meter=figures, backend=Failing(replicas.backend, ValueError("bad")), max_failures=1)
    assert here.wait(here.accept(small), "failed")["attempts"] == 1
    here.wait(here.accept(small), "done")
    cancelled = here.accept(small, steps="1000")
    here.wait(cancelled, "rendering")
    assert here.request("DELETE", f"/v1/edits/{cancelled}").status_code == 200
    here.close()
    assert sorted(tags["status"] for tags in figures.tags("jobs")) == ["cancelled", "done", "failed"]
    assert len(figures.of("job_seconds")) == 1
    assert max(figures.of("jobs_lined_up")) == 1


def test_a_job_taken_over_counts_as_begun_again(replicas: Replicas, small: bytes) -> None:
    first, second = Figures(), Figures()
    here = replicas.open(meter=first, lease_s=LEASE_S)
    job_id = here.accept(small, steps="60")
    here.wait(job_id, "rendering")
    here.freeze()
    replicas.clock.now_s += LEASE_S + CLOCK_SKEW_S
    there = replicas.open(meter=second, lease_s=LEASE_S)
    there.wait(job_id, "done")
    until(lambda: second.of("job_seconds"))  # a moment after the end can be read
    there.close()
    assert (first.of("job_retries"), second.of("job_retries")) == ([], [1])
    assert (first.tags("jobs"), second.tags("jobs")) == ([], [{"status": "done"}])
    # By the store's clock, which went on while nobody worked at it.
    assert second.of("job_seconds")[0] >= LEASE_S + CLOCK_SKEW_S


def test_the_edit_of_a_job_belongs_to_the_trace_of_its_request(replicas: Replicas, small: bytes) -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter, service="test")
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    accepting = replicas.open(is_at_work=False)
    job_id = accepting.accept(small, {"traceparent": f"00-{trace_id}-{parent_id}-01"})
    replicas.open(spans=spans).wait(job_id, "done")  # another replica than the one that heard of the trace
    spans.flush()
    [edit] = exporter.get_finished_spans()
    assert edit.name == "edit"
    assert format(edit.parent.span_id, "016x") == parent_id
    assert format(edit.context.trace_id, "032x") == trace_id
