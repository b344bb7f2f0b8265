"""The report of an evaluation: means with intervals beside the baselines, and what one sees. JSON, Markdown, HTML.

Made of score rows alone, so the same scores give the same report. All settings are compared on the same rows: those
that every setting could do. Knows nothing of Ray.
"""

import html
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mgie.data.ledger import rejection_code
from mgie.errors import DataError
from mgie.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, Interval, bootstrap_means
from mgie.evaluation.metrics import METRICS, Metric, NetworkName
from mgie.storage.folder import Folder
from pipelines.reports.sweep_plot import plot_sweep
from pipelines.reports.thumbnails import thumbnail

REPORT_JSON, REPORT_MD, REPORT_HTML = (f"_report/report.{ending}" for ending in ("json", "md", "html"))
SWEEP_SVG = "_report/sweep.svg"
_FORMAT = 1

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """What is reported."""

    about: Mapping[str, Any]
    "what decided the scores, shown as it is"
    settings: Sequence[str]
    "in the order of the table: baselines first"
    sweep: Mapping[str, float]
    "image guidance of each setting of a sweep; empty = none"
    networks: Sequence[NetworkName]
    "those that were given"
    by: Sequence[str]
    "names of facts to group by"
    rank_by: str
    "metric that chooses the pictures"
    num_pictures: int
    seed: int
    "seed of the intervals"
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    "all that may have been measured"


def write_report(out: Folder, images: Folder, results: Folder, rows: Sequence[Row], plan: ReportPlan) -> dict[str, Any]:
    """Writes the report into `_report/`; returns the content of its JSON.

    Args:
        images, results: Where URIs of sources and goals, and of edited images, lie.
        rows: Rows of `SCORES_SCHEMA`, of each id's highest attempt.

    Raises:
        DataError: No row has scores for all settings.
    """
    report = make_report(rows, plan)
    out.write(REPORT_JSON, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    out.write(REPORT_MD, markdown(report, plan.metrics).encode())
    plot = plot_sweep(report["sweep"]) if report["sweep"] else ""
    if plot:
        out.write(SWEEP_SVG, plot.encode())
    out.write(REPORT_HTML, _page(report, plot, images, results, plan.metrics).encode())
    return report


def make_report(rows: Sequence[Row], plan: ReportPlan) -> dict[str, Any]:
    """The report as JSON content. Raises as `write_report`."""
    by_id: dict[int, dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: int(row["id"])):
        by_id[row["id"]][row["setting"]] = row
    compared = [cells for cells in by_id.values() if all(cells[name]["status"] == "ok" for name in plan.settings)]
    reasons = Counter(
        next(rejection_code(row["reason"]) for row in cells.values() if row["reason"])
        for cells in by_id.values()
        if any(cells[name]["status"] != "ok" for name in plan.settings)
    )
    if not compared:
        raise DataError(f"none of {len(by_id)} rows could be scored: {dict(reasons)}")
    facts = [json.loads(cells[plan.settings[0]]["facts"]) for cells in compared]
    tables = [_table(None, {"all": compared}, plan)]
    for name in plan.by:
        groups: dict[str, list[dict[str, Row]]] = defaultdict(list)
        for one, cells in zip(facts, compared, strict=True):
            groups[str(one.get(name, "-"))].append(cells)
        tables.append(_table(name, dict(sorted(groups.items())), plan))
    means = tables[0]["groups"][0]["settings"]
    return {
        "format": _FORMAT,
        "about": dict(plan.about),
        "rows": {
            "compared": len(compared),
            "left_out": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items())),
        },
        "intervals": {"level": LEVEL, "resamples": NUM_RESAMPLES, "method": "bootstrap over rows, percentile"},
        "not_measured": _not_measured(means, plan),
        "tables": tables,
        "sweep": _sweep(means, plan),
        "pictures": _pictures(compared, plan),
    }


def _table(name: str | None, groups: Mapping[str, Sequence[Mapping[str, Row]]], plan: ReportPlan) -> dict[str, Any]:
    """Means of each group, setting and metric."""
    found = []
    for value, cells in groups.items():
        columns = [(setting, metric) for setting in plan.settings for metric in plan.metrics]
        values = np.array([[cell[setting][metric] for setting, metric in columns] for cell in cells], dtype=np.float64)
        means = zip(columns, bootstrap_means(values, seed=plan.seed), strict=True)
        settings: dict[str, dict[str, Any]] = {setting: {} for setting in plan.settings}
        for (setting, metric), interval in means:
            if interval is not None:
                settings[setting][metric] = _rounded(interval)
        found.append({"value": value, "rows": len(cells), "settings": settings})
    return {"by": name, "groups": found}


def _rounded(interval: Interval) -> dict[str, Any]:
    # Beyond these digits sums that are added in another order may differ.
    return {name: round(value, 6) for name, value in vars(interval).items()}


def _not_measured(means: Mapping[str, Mapping[str, Any]], plan: ReportPlan) -> dict[str, str]:
    """Why a metric is in no table."""
    missing = {}
    for name, metric in plan.metrics.items():
        if any(name in found for found in means.values()):
            continue
        if metric.network is not None and metric.network not in plan.networks:
            missing[name] = f"no network was given (--{metric.network.replace('_', '-')})"
        else:
            missing[name] = f"no row has {metric.needs}"
    return missing


def _sweep(means: Mapping[str, Mapping[str, Any]], plan: ReportPlan) -> list[dict[str, float]]:
    """Points of the plot; none unless both of its axes were measured."""
    return [
        {"image_guidance_scale": scale, **{axis: means[name][axis]["mean"] for axis in ("direction", "similarity")}}
        for name, scale in plan.sweep.items()
        if {"direction", "similarity"} <= means[name].keys()
    ]


def _pictures(compared: Sequence[Mapping[str, Row]], plan: ReportPlan) -> list[dict[str, Any]]:
    """Best, median and worst rows by the first setting that is no baseline; none is shown twice."""
    setting = next(iter(plan.sweep), plan.settings[-1])
    metric = plan.metrics[plan.rank_by]
    sign = -1 if metric.is_higher_better else 1
    ranked = sorted(
        (cells[setting] for cells in compared if cells[setting][plan.rank_by] is not None),
        key=lambda row: (sign * row[plan.rank_by], row["id"]),
    )
    count = min(plan.num_pictures, -(-len(ranked) // 3))
    middle = (len(ranked) - count) // 2
    starts = {"best": 0, "median": middle, "worst": len(ranked) - count}
    shown: set[int] = set()
    found = []
    columns = ("id", "setting", "source", "goal", "edited", "instruction", "expressive")
    for rank, start in starts.items():
        for row in ranked[start : start + count]:
            if row["id"] not in shown:
                shown.add(row["id"])
                scores = {name: round(row[name], 6) for name in plan.metrics if row[name] is not None}
                found.append({"rank": rank, **{name: row[name] for name in columns}, "scores": scores})
    return found


# ---- as text


def _header(report: Mapping[str, Any]) -> list[str]:
    rows = report["rows"]
    left_out = ", ".join(f"{count} {code}" for code, count in rows["reasons"].items())
    return [
        f"{rows['compared']} rows, the same for all settings; {rows['left_out']} left out{f' ({left_out})' if left_out else ''}.",
        f"Mean [{report['intervals']['level']:.0%} interval]: {report['intervals']['method']}. Arrows say which way is better.",
    ]


def _grid(table: Mapping[str, Any], metrics: Mapping[str, Metric]) -> tuple[list[str], list[list[str]]]:
    """Head and body of a table of text; metrics that are in no cell have no column."""
    found = {name for group in table["groups"] for cells in group["settings"].values() for name in cells}
    names = [name for name in metrics if name in found]
    by = [table["by"], "rows"] if table["by"] else []
    head = [*by, "setting", *(metrics[n].label + (" ↑" if metrics[n].is_higher_better else " ↓") for n in names)]
    body = []
    for group in table["groups"]:
        for setting, cells in group["settings"].items():
            first = [group["value"], str(group["rows"])] if table["by"] else []
            body.append([*first, setting, *(_cell(metrics[name], cells.get(name)) for name in names)])
    return head, body


def _cell(metric: Metric, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{found[name]:.{metric.decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _about_lines(report: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[tuple[str, str]]:
    networks = report["about"].get("networks", {})
    plain = {name: value for name, value in report["about"].items() if name != "networks"}
    lines = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in plain.items()]
    lines += [(f"network {name}", identity) for name, identity in networks.items()]
    return lines + [(f"not measured: {metrics[name].label}", why) for name, why in report["not_measured"].items()]


def markdown(report: Mapping[str, Any], metrics: Mapping[str, Metric] = METRICS) -> str:
    """The report without pictures."""
    parts = ["# Evaluation", *_header(report)]
    for table in report["tables"]:
        head, body = _grid(table, metrics)
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
        parts += [f"## By {table['by']}"] * bool(table["by"]) + ["\n".join(lines)]
    parts += ["## About", "\n".join(f"- {name}: {value}" for name, value in _about_lines(report, metrics))]
    return "\n\n".join(parts) + "\n"


def _page(report: Mapping[str, Any], plot: str, images: Folder, results: Folder, metrics: Mapping[str, Metric]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    tables = ""
    for table in report["tables"]:
        head, body = _grid(table, metrics)
        title = f"<h2>By {html.escape(table['by'])}</h2>" if table["by"] else ""
        rows = "".join(cells("td", row) for row in body)
        tables += f'{title}<div class="wide"><table>{cells("th", head)}{rows}</table></div>'
    sheet = "".join(_figure(picture, images, results, metrics) for picture in report["pictures"])
    header = "".join(f"<p>{html.escape(line)}</p>" for line in _header(report))
    about = "".join(cells("td", line) for line in _about_lines(report, metrics))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top }}
.wide {{ overflow-x: auto }} .wide td {{ white-space: nowrap }} td {{ overflow-wrap: anywhere }}
article {{ border-top: 1px solid #ddd; padding: .8rem 0 }} figure {{ display: inline-block; margin: 0 .6rem 0 0 }}
figcaption, .scores {{ color: #666; font-size: 13px }} svg {{ max-width: 40rem }}
</style>
<h1>Evaluation</h1>{header}{tables}{f"<h2>Image guidance</h2>{plot}" if plot else ""}
<h2>Best, median and worst</h2>{sheet}
<h2>About</h2><table>{about}</table></html>
"""


def _figure(picture: Mapping[str, Any], images: Folder, results: Folder, metrics: Mapping[str, Metric]) -> str:
    shown = [(name, images, picture[name]) for name in ("source", "goal")] + [("result", results, picture["edited"])]
    pictures = "".join(
        f'<figure><img src="{thumbnail(folder, uri)}" alt="{name}"><figcaption>{name}</figcaption></figure>'
        for name, folder, uri in shown
        if uri
    )
    scores = ", ".join(f"{metrics[n].label} {value:.{metrics[n].decimals}f}" for n, value in picture["scores"].items())
    words = f"<b>{html.escape(picture['instruction'])}</b><br>{html.escape(picture['expressive'] or '')}"
    rank = f"{picture['rank']}, {picture['setting']}"
    return f'<article><p>{html.escape(rank)}: {words}</p>{pictures}<p class="scores">{scores}</p></article>'
