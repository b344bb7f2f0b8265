"""InstructPix2Pix's trade-off as a picture: how far edits follow the words against how much of the image they keep."""

from collections.abc import Mapping, Sequence

from pipelines.reports.svg import BLUE, between, dot, line, svg, text

_WIDTH, _HEIGHT, _MARGIN = 480, 340, 56


def plot_sweep(points: Sequence[Mapping[str, float]]) -> str:
    """An SVG: CLIP direction to the right, CLIP image similarity upwards, a point for each image guidance scale.

    Args:
        points: Points with `image_guidance_scale`, `direction` and `similarity`, in the order in which they are joined.
    """
    xs, ys = ([point[name] for point in points] for name in ("direction", "similarity"))
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN
    places = [
        (between(x, min(xs), max(xs), _MARGIN, right), between(y, min(ys), max(ys), bottom, _MARGIN))
        for x, y in zip(xs, ys, strict=True)
    ]
    parts = [line([(_MARGIN, _MARGIN), (_MARGIN, bottom), (right, bottom)]), line(places, BLUE)]
    for point, (x, y) in zip(points, places, strict=True):
        parts += [dot(x, y, BLUE), text(x + 6, y - 6, f"{point['image_guidance_scale']:g}")]
    parts += [text(_MARGIN, bottom + 16, f"{min(xs):.3f}"), text(right - 24, bottom + 16, f"{max(xs):.3f}")]
    parts += [text(8, bottom, f"{min(ys):.3f}"), text(8, _MARGIN + 8, f"{max(ys):.3f}")]
    parts += [text(_WIDTH / 2 - 40, _HEIGHT - 12, "CLIP direction"), text(8, 24, "CLIP image similarity")]
    return svg(_WIDTH, _HEIGHT, parts)
