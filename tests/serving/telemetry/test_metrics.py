"""Names and the sampler; what a running service exports is tested in test_dashboard.py."""

import re
from collections import Counter

from serving.telemetry.metrics import METRICS, SAMPLE_PERIOD_S, Metric, Sample, Sampler

NUM = Metric("num", "counter", "", tags=("kind",))
SIZE = Metric("size", "gauge", "")


def test_names_are_ours_and_unique_and_every_figure_is_explained() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"mgie_[a-z_]+", name) for name in names)
    assert all(metric.help for metric in METRICS)
    assert not any(name.endswith(("_total", "_count", "_sum", "_bucket")) for name in names)


def test_histograms_alone_have_buckets_in_order() -> None:
    for metric in METRICS:
        assert (metric.kind == "histogram") == bool(metric.boundaries)
        assert list(metric.boundaries) == sorted(set(metric.boundaries))


def test_no_tag_can_hold_what_a_user_sends() -> None:
    assert {tag for metric in METRICS for tag in metric.tags} == {"status", "code", "stage", "result"}


def test_series_are_named_as_prometheus_finds_them() -> None:
    assert NUM.series == ("ray_num_total",)
    assert SIZE.series == ("ray_size",)
    assert Metric("time", "histogram", "").series == ("ray_time_bucket", "ray_time_count", "ray_time_sum")


def test_the_sampler_tells_gauges_as_they_are_and_counters_by_their_growth() -> None:
    seen: list[tuple[str, float, str]] = []
    totals = Counter[str]()

    def look() -> list[Sample]:
        return [(SIZE, 7.0, {}), *((NUM, totals[kind], {"kind": kind}) for kind in ("a", "b"))]

    def meter(metric: Metric, value: float = 1.0, **tags: str) -> None:
        seen.append((metric.name, value, "".join(tags.values())))

    sampler = Sampler(look, meter, period_s=1000 * SAMPLE_PERIOD_S)
    totals["a"] = 3
    sampler.sample()
    sampler.sample()
    totals.update({"a": 2, "b": 1})
    sampler.close()  # looks a last time
    assert [one for one in seen if one[0] == "size"] == [("size", 7.0, "")] * 3
    assert [one for one in seen if one[0] == "num"] == [("num", 3, "a"), ("num", 2, "a"), ("num", 1, "b")]
