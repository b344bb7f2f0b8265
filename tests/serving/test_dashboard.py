"""The dashboard asks for figures that the service exports; evaluated by a real Prometheus over a running service."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from serving.telemetry.metrics import METRICS
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/mgie.json").read_text())
PROMETHEUS = shutil.which("prometheus") or os.environ.get("PROMETHEUS", "")
# Panels without figures while nothing is called off, no replica dies, and no webhook is asked for.
SILENT = {"Cancels and retries", "Jobs begun again and webhooks"}
# Of Ray Serve; the test on a running service finds out whether they are still called so.
SERVE_SERIES = {
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
}
RATE_INTERVAL = "30s"
GUARD_S = 900.0  # against a hang alone

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def asked_for(query: str) -> set[str]:
    """The series that a query selects."""
    return set(re.findall(r"\bray_\w+", query))


def tags_asked_for(query: str) -> Iterator[tuple[str, str]]:
    """Series and tag of each selector."""
    for series, selector in re.findall(r"\b(ray_\w+)\{([^}]*)\}", query):
        yield from ((series, tag) for tag in re.findall(r"(\w+)\s*[!=]", selector))


def test_every_query_asks_for_figures_that_there_are() -> None:
    ours = {series for metric in METRICS for series in metric.series}
    assert len(QUERIES) > 20
    for title, query in QUERIES:
        assert asked_for(query), title
        assert asked_for(query) <= ours | SERVE_SERIES, title


def test_every_figure_of_ours_is_shown() -> None:
    shown = set().union(*(asked_for(query) for _, query in QUERIES))
    assert [metric.name for metric in METRICS if not shown & set(metric.series)] == []


def test_queries_select_by_tags_that_the_figures_have() -> None:
    tags = {series: {*metric.tags, "application", "deployment"} for metric in METRICS for series in metric.series}
    for title, query in QUERIES:
        for series, tag in tags_asked_for(query):
            assert tag in tags.get(series, {"application", "deployment"}), f"{title}: {series}"


def test_panels_do_not_overlap_and_explain_themselves() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(panel["description"] for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_scrape_config_keeps_all_that_the_dashboard_asks_for() -> None:
    [job] = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    [rule] = job["metric_relabel_configs"]
    assert (rule["source_labels"], rule["action"]) == (["__name__"], "keep")
    for title, query in QUERIES:
        assert all(re.fullmatch(rule["regex"], series) for series in asked_for(query)), title
    assert not re.fullmatch(rule["regex"], "ray_tasks")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(GUARD_S)
def test_a_real_prometheus_finds_an_answer_to_every_query(service: str, tmp_path: Path) -> None:
    if not PROMETHEUS:
        pytest.skip("no `prometheus` on the path, nor in the variable PROMETHEUS")
    import ray

    from serving.demo import draw_landscape
    from tests.ray_cluster import HEADERS

    photo = {"image": draw_landscape(96, 64)}
    expected = {query for title, query in QUERIES if title not in SILENT}
    answers: dict[str, Any] = {}

    def send(*, is_job: bool = False, files: Any = photo, **fields: str) -> httpx2.Response:
        data = {"prompt": "make it night", "steps": "2"} | fields
        return httpx2.post(
            f"{service}/v1/images/edits",
            headers=HEADERS | ({"prefer": "respond-async"} if is_job else {}),
            files=files,
            data=data,
            timeout=GUARD_S,
        )

    def ask(url: str) -> Any:
        return httpx2.get(url, headers=HEADERS, timeout=GUARD_S).json()

    with prometheus(f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}", tmp_path) as base:
        for number in itertools.count():  # rates are seen while they last
            for seed in ("0", "1"):  # the second finds its guidance in the cache
                assert send(prompt=f"make it night {number}", seed=seed).status_code == 200
            job = send(is_job=True).json()["id"]
            assert send(files=None).status_code == 415  # for the panel of refusals
            until(lambda url=f"{service}/v1/edits/{job}": ask(url)["status"] == "done", poll_s=0.1)
            for title, query in QUERIES:
                if answered := evaluate(base, query):
                    answers[query] = (title, answered)
            if expected <= set(answers):
                break
            time.sleep(2)  # Ray exports its figures every few seconds
    for title, values in answers.values():
        assert all(value >= 0 for value in values), title


class prometheus:  # noqa: N801  a context manager
    """A Prometheus that scrapes one target by the project's own rules; gives its address."""

    def __init__(self, target: str, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "2s"
        del config["scrape_configs"][0]["file_sd_configs"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._command = [
            PROMETHEUS,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        base = f"http://{self._address}"

        def is_ready() -> bool:
            assert self._process.poll() is None, "Prometheus did not start"
            with contextlib.suppress(httpx2.HTTPError):
                return httpx2.get(f"{base}/-/ready", timeout=GUARD_S).status_code == 200
            return False

        until(is_ready, poll_s=0.1)
        return base

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def evaluate(base: str, query: str) -> list[float]:
    """The values that Prometheus has for a query of the dashboard, those that are numbers."""
    filled = query.replace("$__rate_interval", RATE_INTERVAL).replace("$application", "mgie")
    answer = httpx2.get(f"{base}/api/v1/query", params={"query": filled}, timeout=GUARD_S).json()
    assert answer["status"] == "success", f"{filled}: {answer}"
    values = [float(series["value"][1]) for series in answer["data"]["result"]]
    return [value for value in values if value == value]  # noqa: PLR0124  NaN: there was nothing to divide by
