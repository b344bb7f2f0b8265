"""The comparison of variants as JSON, Markdown and a plot. Knows nothing of where the numbers come from."""

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mgie.evaluation.bootstrap import Interval
from mgie.evaluation.metrics import METRICS

_WIDTH, _LEFT, _ROW, _TOP = 640, 190, 18, 40
_PLOTTED = ("l1", "inside_l1", "object_check")
_COLOR, _GREY = "#1565c0", "#777"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One metric over some of the rows."""

    name: str
    "which rows"
    metric: str
    rows: int
    means: Mapping[str, Interval | None]
    "by variant"
    gains: Mapping[str, Interval | None]
    'by claim "a > b": how much better a is, row by row; above 0 where it holds'


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
    body = "".join(f'<g transform="translate(0 {i * height})">{_panel(group)}</g>' for i, group in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height * len(panels) + 10}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )


def _panel(group: Group) -> str:
    found = {name: interval for name, interval in group.means.items() if interval is not None}
    low, high = min(i.low for i in found.values()), max(i.high for i in found.values())
    label = METRICS[group.metric].label

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 60) * (value - low) / ((high - low) or 1)

    parts = [f'<text x="8" y="20" fill="#333" font-weight="bold">{html.escape(label)}, {group.name}</text>']
    for number, (name, interval) in enumerate(found.items()):
        y = _TOP + _ROW * number
        color = _GREY if name == "copy" else _COLOR
        parts.append(f'<text x="8" y="{y + 4}" fill="#333">{html.escape(name)}</text>')
        parts.append(f'<path d="M{x(interval.low):.1f} {y}H{x(interval.high):.1f}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(interval.mean):.1f}" cy="{y}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{_WIDTH - 50}" y="{y + 4}" fill="#333">{interval.mean:.3f}</text>')
    return "".join(parts)
