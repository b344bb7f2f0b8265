"""The summary of a training run as a picture: losses, validation and learning rates over the steps, as SVG."""

from collections.abc import Mapping

from pipelines.reports.svg import below, between, dot, line, svg, text

_WIDTH, _HEIGHT, _MARGIN = 640, 220, 48
_COLORS = ("#1565c0", "#c62828", "#2e7d32", "#6a1b9a", "#ef6c00")
_MAX_POINTS, _MAX_DOTS = 600, 40
_PANELS = (
    ("losses", ("loss", "instruction", "edit", "validation/loss")),
    ("learning rates", ("learning_rate/",)),
    ("gradient norm", ("grad_norm",)),
)

Line = list[tuple[int, float]]


def plot_run(steps: Mapping[int, Mapping[str, float | bool | None]]) -> str:
    """An SVG of three panels. Steps without a finite number leave a gap in no line: they are skipped."""
    panels = []
    for title, names in _PANELS:
        found = {name: None for scalars in steps.values() for name in scalars}
        chosen = [n for n in found if any(n == name or (name.endswith("/") and n.startswith(name)) for name in names)]
        lines = {name: _line(steps, name) for name in chosen}
        panels.append((title, {name: line for name, line in lines.items() if line}))
    moved = [below(number * _HEIGHT, _panel(title, lines)) for number, (title, lines) in enumerate(panels)]
    return svg(_WIDTH, _HEIGHT * len(panels), moved)


def _line(steps: Mapping[int, Mapping[str, float | bool | None]], name: str) -> Line:
    """Points, thinned out to means of neighbours."""
    points = [(step, float(value)) for step, scalars in steps.items() if (value := scalars.get(name)) is not None]
    size = -(-len(points) // _MAX_POINTS) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _panel(title: str, lines: Mapping[str, Line]) -> list[str]:
    points = [point for line in lines.values() for point in line]
    if not points:
        return [text(_MARGIN, _MARGIN, f"{title}: nothing to show")]
    last, low, high = (max(step for step, _ in points), min(v for _, v in points), max(v for _, v in points))
    low = min(low, 0.0)

    def at(step: float, value: float) -> tuple[float, float]:
        x = between(step, 0, last, _MARGIN, _WIDTH - _MARGIN)
        return x, between(value, low, high, _HEIGHT - 30, 30)

    parts = [line([at(0, high), at(0, low), at(last, low)])]
    for color, found in zip(_COLORS, lines.values(), strict=False):
        places = [at(*point) for point in found]
        parts.append(line(places, color))
        if len(places) <= _MAX_DOTS:  # a single point is no line
            parts += [dot(*place, color, radius=2) for place in places]
    x = float(_MARGIN)
    for color, name in zip(_COLORS, lines, strict=False):
        parts.append(text(x, 16, name, color))
        x += 12 + 6.5 * len(name)
    parts += [text(x, _HEIGHT - 14, f"{step:g}") for x, step in ((_MARGIN, 0), (_WIDTH - _MARGIN, last))]
    return parts + [text(4, at(0, value)[1] + 4, f"{value:.3g}") for value in (low, high)]
