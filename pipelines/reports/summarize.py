"""The report of a summarize run: counts, speeds, costs and a sheet of samples, as JSON and as one HTML file.

Read off the ledger and the commits of the run. Knows nothing of Ray.
"""

import html
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgie.data.ledger import read_ledger, rejection_code
from mgie.storage.folder import Folder
from pipelines.reports.thumbnails import thumbnail

REPORT_JSON, REPORT_HTML = "_report/report.json", "_report/report.html"
_NUM_SAMPLES = 12
_SECONDS_PER_HOUR = 3600


@dataclass(kw_only=True)
class StageTimes:
    """What one actor of a stage did, summed over its blocks."""

    rows: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    "between the end of one block and the start of the next"


@dataclass(kw_only=True)
class RunTotals:
    """What a run wrote, summed up block by block."""

    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    actors: dict[str, dict[str, StageTimes]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, block: Mapping[str, Any]) -> None:
        """Adds the figures of one commit (see `summarize`)."""
        self.rows += block["rows"]
        self.by_status.update(block["status"])
        self.by_reason.update(block["reasons"])
        self.tokens.update(block["tokens"])
        for stage, times in block["stages"].items():
            actor = self.actors[stage].setdefault(times["actor"], StageTimes())
            actor.rows += block["rows"]
            actor.busy_s += times["busy_s"]
            actor.waiting_s += times["waiting_s"]


def summarize_run(
    totals: RunTotals, *, seconds: float, num_gpus: float, gpu_hour_price: float | None, ledger: Mapping[str, Any]
) -> dict[str, Any]:
    """The report as JSON content.

    Args:
        seconds: Seconds of the run, from its first block to its last.
        num_gpus: GPUs that the run held.
        gpu_hour_price: Price of one GPU hour; None = no cost given.
        ledger: Counts of the whole ledger.
    """
    rate = totals.rows / seconds if seconds else 0.0
    hours_per_1000 = seconds / _SECONDS_PER_HOUR / totals.rows * 1000 if totals.rows else 0.0
    stages = {
        stage: {
            "actors": len(actors),
            "busy_s": round(sum(times.busy_s for times in actors.values()), 3),
            "waiting_share": _share(actors.values()),
            "per_actor": {name: vars(times) for name, times in sorted(actors.items())},
        }
        for stage, actors in totals.actors.items()
    }
    return {
        "rows": totals.rows,
        "seconds": round(seconds, 3),
        "rows_per_s": round(rate, 4),
        "tokens_per_s": {name: round(count / seconds, 2) if seconds else 0.0 for name, count in totals.tokens.items()},
        "tokens": dict(totals.tokens),
        "status": dict(totals.by_status),
        "reasons": dict(totals.by_reason),
        "stages": stages,
        "cost_per_1000_rows": None if gpu_hour_price is None else round(hours_per_1000 * num_gpus * gpu_hour_price, 4),
        "ledger": dict(ledger),
    }


def _share(actors: Any) -> float:
    busy, waiting = (sum(getattr(times, name) for times in actors) for name in ("busy_s", "waiting_s"))
    return round(waiting / (busy + waiting), 4) if busy + waiting else 0.0


def write_report(out: Folder, images: Folder, report: Mapping[str, Any], *, seed: int = 0) -> None:
    """Writes `_report/report.json` and `_report/report.html` into the ledger's folder."""
    out.write(REPORT_JSON, (json.dumps(report, indent=1) + "\n").encode())
    out.write(REPORT_HTML, _page(report, _samples(out, images, seed)).encode())


def _samples(out: Folder, images: Folder, seed: int) -> list[dict[str, Any]]:
    """A few rows chosen at random (reservoir sampling: one pass, bounded memory)."""
    chooser, seen = random.Random(seed), 0  # noqa: S311  # a choice of pictures
    chosen: list[dict[str, Any]] = []
    columns = ["source", "goal", "instruction", "verbose", "expressive", "status", "reason"]
    for batch in read_ledger(out, status=None, columns=columns):
        for row in batch.to_pylist():
            seen += 1
            if len(chosen) < _NUM_SAMPLES:
                chosen.append(row)
            elif (place := chooser.randrange(seen)) < _NUM_SAMPLES:
                chosen[place] = row
    for row in chosen:
        row |= {name: thumbnail(images, row[name]) for name in ("source", "goal")}
    return chosen


def _page(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    figures = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in report.items()
        if name != "stages"
    )
    stages = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{stage['actors']}</td><td>{stage['busy_s']:.1f}</td>"
        f"<td>{100 * stage['waiting_share']:.0f} %</td></tr>"
        for name, stage in report["stages"].items()
    )
    sheet = "".join(_figure(row) for row in samples)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Expressive instructions: run report</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ text-align: left; padding: .25rem .8rem; border-bottom: 1px solid #ddd }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.2rem }}
article {{ border: 1px solid #ddd; border-radius: 8px; padding: .8rem }} img {{ max-width: 48%; border-radius: 4px }}
.bad {{ color: #a33 }} dt {{ color: #666; font-size: 13px }} dd {{ margin: 0 0 .4rem; overflow-wrap: anywhere }}
</style>
<h1>Expressive instructions: run report</h1>
<table>{figures}</table>
<h2>Stages</h2><table><tr><th>stage</th><th>actors</th><th>busy s</th><th>waiting</th></tr>{stages}</table>
<h2>Samples</h2><p>Chosen at random: source, goal, and what was said.</p><div class="sheet">{sheet}</div></html>
"""


def _figure(row: Mapping[str, Any]) -> str:
    pictures = "".join(f'<img src="{row[name]}" alt="{name}"> ' for name in ("source", "goal") if row[name])
    texts = "".join(
        f"<dt>{name}</dt><dd>{html.escape(row[name] or '')}</dd>" for name in ("instruction", "verbose", "expressive")
    )
    reason = "" if row["status"] == "ok" else f'<p class="bad">{html.escape(rejection_code(row["reason"] or ""))}</p>'
    return f"<article>{pictures}{reason}<dl>{texts}</dl></article>"
