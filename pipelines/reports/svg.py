"""SVG pictures of text, lines and dots on white; coordinates in px from the top left corner."""

import html
from collections.abc import Iterable, Sequence

INK, BLUE, GREY = "#333", "#1565c0", "#777"


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    """A picture of its parts."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" fill="none" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def below(y: float, parts: Iterable[str]) -> str:
    """Parts that are moved down."""
    return f'<g transform="translate(0 {y:g})">{"".join(parts)}</g>'


def text(x: float, y: float, content: str, color: str = INK, *, weight: str = "normal") -> str:
    """A line of text; `y` is that of its baseline."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-weight="{weight}">{html.escape(content)}</text>'


def dot(x: float, y: float, color: str, *, radius: float = 3) -> str:
    """A filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


def line(points: Sequence[tuple[float, float]], color: str = INK, *, width: float = 1) -> str:
    """Points joined by straight lines."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" stroke="{color}" stroke-width="{width:g}"/>'


def between(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value of low..high lies on the way from start to end; in the middle where all values are equal."""
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
