"""The comparison of variants as JSON, Markdown and a plot. Knows nothing of where the numbers come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mgie.evaluation import metrics
from mgie.evaluation.bootstrap import Interval
from mgie.tiny.world import scorer
from pipelines.reports.svg import BLUE, GREY, below, between, dot, line, svg, text

_WIDTH, _LEFT, _ROW, _TOP = 640, 190, 18, 40
METRICS = {**metrics.METRICS, **scorer.METRICS}
_PLOTTED = ("l1", "inside_l1", "object_check")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One metric over some of the rows."""

    name: str
    "which rows"
    metric: str
    rows: int
    means: Mapping[str, Interval | None]
    "means by variant"
    gains: Mapping[str, Interval | None]
    'how much better a is than b, row by row, by claim "a > b"; above 0 where it holds'


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of it."""

    settings: Mapping[str, Any]
    rows: int
    groups: tuple[Group, ...]

    def as_json(self) -> dict[str, Any]:
        """Content of `comparison.json`."""
        return asdict(self)


def markdown(comparison: Comparison) -> str:
    """Tables: means by variant, then whether each of the paper's orderings came out."""
    level = comparison.settings["level"]
    about = comparison.settings
    begin = "VAE, LLaVA and Flan-T5 as shipped" if about["shipped"] else "everything trained from nothing"
    lines = [
        "# The paper's comparison in miniature",
        "",
        f"{comparison.rows} held-out edits of the tiny world, {about['steps']} training steps, {about['seeds']} seed(s);",
        f"before, {about['share']:g} of the samples and steps of `make tiny`, {begin}.",
        f"Mean [{level:.0%} interval of a bootstrap over rows]. Made by `make compare`.",
    ]
    for name in dict.fromkeys(group.name for group in comparison.groups):
        groups = [group for group in comparison.groups if group.name == name]
        variants = list(groups[0].means)
        shown = [group for group in groups if any(group.means.values())]
        arrows = ("\u2191" if METRICS[g.metric].is_higher_better else "\u2193" for g in shown)
        heads = (f"{METRICS[g.metric].label} {arrow}" for g, arrow in zip(shown, arrows, strict=True))
        lines += ["", f"## {name} ({groups[0].rows} rows)", "", f"| variant | {' | '.join(heads)} |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        lines += [f"| {v} | {' | '.join(_cell(g.means[v]) for g in shown)} |" for v in variants]
        lines += ["", f"| ordering | {' | '.join(METRICS[g.metric].label for g in shown)} |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        lines += [f"| {c} | {' | '.join(_verdict(g.gains[c]) for g in shown)} |" for c in groups[0].gains]
    return "\n".join(lines) + "\n"


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _verdict(gain: Interval | None) -> str:
    if gain is None:
        return "-"
    word = "yes" if gain.low > 0 else "no, the reverse" if gain.high < 0 else "undecided"
    return f"{word} ({gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}])"


def plot(comparison: Comparison) -> str:
    """An SVG: some metrics by variant, over all rows and over the ambiguous ones, with intervals."""
    panels = [
        group
        for metric in _PLOTTED
        for group in comparison.groups
        if group.metric == metric and group.name in ("all", "ambiguous") and any(group.means.values())
    ]
    height = _TOP + _ROW * max((len(group.means) for group in panels), default=0)
    moved = [below(i * height, _panel(group)) for i, group in enumerate(panels)]
    return svg(_WIDTH, height * len(panels) + 10, moved)


def _panel(group: Group) -> list[str]:
    found = {name: interval for name, interval in group.means.items() if interval is not None}
    low, high = min(i.low for i in found.values()), max(i.high for i in found.values())
    label = METRICS[group.metric].label

    def x(value: float) -> float:
        return between(value, low, high, _LEFT, _WIDTH - 60)

    parts = [text(8, 20, f"{label}, {group.name}", weight="bold")]
    for number, (name, interval) in enumerate(found.items()):
        y = _TOP + _ROW * number
        color = GREY if name == "copy" else BLUE
        parts.append(text(8, y + 4, name))
        parts.append(line([(x(interval.low), y), (x(interval.high), y)], color, width=2))
        parts.append(dot(x(interval.mean), y, color, radius=4))
        parts.append(text(_WIDTH - 50, y + 4, f"{interval.mean:.3f}"))
    return parts
