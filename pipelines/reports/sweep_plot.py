"""InstructPix2Pix's trade-off as a picture: how far edits follow the words against how much of the image they keep."""

from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _MARGIN = 480, 340, 56
_COLOR = "#1565c0"


def plot_sweep(points: Sequence[Mapping[str, float]]) -> str:
    """An SVG: CLIP direction to the right, CLIP image similarity upwards, a point for each image guidance scale.

    Args:
        points: With `image_guidance_scale`, `direction` and `similarity`, in the order in which they are joined.
    """
    xs, ys = ([point[name] for point in points] for name in ("direction", "similarity"))
    places = [
        (_place(x, xs, _MARGIN, _WIDTH - _MARGIN), _place(y, ys, _HEIGHT - _MARGIN, _MARGIN))
        for x, y in zip(xs, ys, strict=True)
    ]
    corner = f"{_MARGIN},{_MARGIN} {_MARGIN},{_HEIGHT - _MARGIN} {_WIDTH - _MARGIN},{_HEIGHT - _MARGIN}"
    parts = [
        f'<polyline points="{corner}" stroke="#333"/>',
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" stroke="{_COLOR}"/>',
    ]
    for point, (x, y) in zip(points, places, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOR}"/>')
        parts.append(_text(x + 6, y - 6, f"{point['image_guidance_scale']:g}"))
    bottom = _HEIGHT - _MARGIN + 16
    parts += [_text(_MARGIN, bottom, f"{min(xs):.3f}"), _text(_WIDTH - _MARGIN - 24, bottom, f"{max(xs):.3f}")]
    parts += [_text(8, _HEIGHT - _MARGIN, f"{min(ys):.3f}"), _text(8, _MARGIN + 8, f"{max(ys):.3f}")]
    parts += [_text(_WIDTH / 2 - 40, _HEIGHT - 12, "CLIP direction"), _text(8, 24, "CLIP image similarity")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" fill="none" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _place(value: float, values: Sequence[float], start: float, end: float) -> float:
    spread = max(values) - min(values)
    return start + (end - start) * (value - min(values)) / spread if spread else (start + end) / 2


def _text(x: float, y: float, content: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#333">{content}</text>'
