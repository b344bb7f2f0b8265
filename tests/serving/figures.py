"""What the tests of figures share: a meter that keeps what it gets."""

import threading

from serving.telemetry.metrics import METRICS, Metric


class Figures:
    """A `Meter` that keeps what it gets, under the metrics' names without "mgie_"."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []
        self._lock = threading.Lock()

    def __call__(self, metric: Metric, value: float = 1.0, **tags: str) -> None:
        assert metric in METRICS
        assert set(tags) == set(metric.tags)
        with self._lock:
            self.seen.append((metric.name.removeprefix("mgie_"), value, tags))

    def of(self, name: str) -> list[float]:
        return [value for one, value, _ in self.seen if one == name]

    def tags(self, name: str) -> list[dict[str, str]]:
        return [tags for one, _, tags in self.seen if one == name]
