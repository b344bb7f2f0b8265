"""Detail transfer: the change that was made at the model's work size, carried onto the full-size source.

The diffusion model sees a small picture and its VAE loses fine detail, so the decoded result scaled up is blurred all
over. What the model *changed* is known better than what it drew: the difference between its result ("edited") and
what the VAE alone makes of the source ("guide"), in which the VAE's own losses cancel out. Three steps, at work size:

1. **Fit.** The change is explained as an affine function of the guide's colour, first one for the whole picture, then,
   for what that leaves, one per window (the guided filter of He et al. with colour in and colour out). The whole
   picture's fit keeps, say, a black-and-white from a tint where a window holds too few colours to tell.
2. **Gate.** Where hardly anything changed, nothing changes; unless the whole picture did, for then what changed
   little is part of it (the pale colours of a photo made black-and-white). It did if most of it changed, or if the
   whole picture's fit explains most of the change. Of a local edit, how much is hardly anything tells the tenth of
   the picture that changed least: it shows nothing but the model's own noise.
3. **Explained or shown.** Something added, removed or replaced is no function of the colours before. Where the fit
   leaves a part of the change unexplained, the edited picture itself is shown, lest what was there shines through.
   When most of the picture changed, as much as the VAE loses of the source may stay unexplained: sharpness first.

The result of all three is one field of affine maps, zero where the source stays as it is; scaled up to the source's
size, it is applied to the source's own pixels.

Knows neither models nor files.

Axes: h w work sides, H W source sides, 3 colour channels; of a map: output, then input channel.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.images.geometry import resize
from mgie.images.pixels import to_signed

# Chosen with a VAE of 20 dB on photos, on exact operations and drawn scenes. Colours are 0 to 1.
_RADIUS_PX = 8  # of the fit's windows; one latent pixel of the usual VAE
_RIDGE = 0.0005  # pulls a fit to "no change": the variance of colours at which a map is halved
_RESIDUAL_RADIUS_PX = 2  # over which the unexplained is averaged
_UNEXPLAINED = (0.02, 0.05)  # root mean square: up to the first the fit is used, from the second the edited picture
_GATE_RADIUS_PX = 1  # over which the change is averaged for the gate
_GATE = (0.03, 0.08)  # up to the first nothing changes, from the second the whole change counts; at the least
_NOISE_TIMES = (22, 55)  # the same two, of a local edit, as multiples of the noise
_NOISE_QUANTILE = 0.1  # the share of the picture that a local edit leaves alone
# Up to the first an edit is local, from the second the whole picture changed:
_CHANGED = (0.5, 0.8)  # share of the picture that changed at all
_EXPLAINED = (0.5, 0.7)  # share of the change that the whole picture's fit explains
_STRIP_PX = 2**17  # pixels worked on at a time: bounds memory at any size of source


_Maps = tuple[Tensor, Tensor]
"affine maps of a colour, one per work pixel: [3, 3, h, w] and offsets [3, h, w]"


def transfer_detail(
    source: Image.Image, *, guide: Float[Tensor, "3 h w"], edited: Float[Tensor, "3 h w"]
) -> Image.Image:
    """The source with the change from `guide` to `edited` made to its own pixels.

    Args:
        source: RGB, any size, of the framing that the model saw.
        guide: What the VAE makes of the source, [-1, 1] (clipped).
        edited: The model's result, [-1, 1] (clipped).

    Returns:
        RGB, of the source's size; the source itself, bit by bit, where the two are equal.
    """
    height, width = guide.shape[1:]
    seen = to_signed(resize(source, (width, height))) / 2 + 0.5
    field = _change_field(seen, *(picture.clamp(-1, 1) / 2 + 0.5 for picture in (guide, edited)))
    return _apply(field, source)


def _change_field(seen: Tensor, guide: Tensor, edited: Tensor) -> Tensor:
    """What to add to a colour, as an affine map of it, from three pictures [3, h, w]: [12, h, w]."""
    change = edited - guide
    whole = _fit(change, guide, _mean_of_all)
    rest = change - _mapped(whole, guide)
    local = _fit(rest, guide, _mean_of_window)
    maps = whole[0] + local[0], whole[1] + local[1]

    size = _box_mean(change, _GATE_RADIUS_PX).abs().amax(0, keepdim=True)  # [1, h, w]
    explained = 1 - rest.square().mean() / change.square().mean().clamp(min=torch.finfo(change.dtype).tiny)
    most = torch.maximum(
        _smooth_step(_smooth_step(size, *_GATE).mean(), *_CHANGED), _smooth_step(explained, *_EXPLAINED)
    )
    noise = size.quantile(_NOISE_QUANTILE).item()
    low, high = (max(least, times * noise) for least, times in zip(_GATE, _NOISE_TIMES, strict=True))
    gate = _smooth_step(size, low, high)
    gate = gate + (1 - gate) * most
    unexplained = _mean_square(change - _mapped(maps, guide)) - most * _mean_square(seen - guide)
    shown = _smooth_step(unexplained.clamp(min=0).sqrt(), *_UNEXPLAINED)  # [1, h, w]
    # Where the edited picture is shown, the source's own colour is taken away and the edited one put in its place.
    matrix = gate * ((1 - shown) * maps[0] - shown * torch.eye(3)[..., None, None])
    offset = gate * ((1 - shown) * maps[1] + shown * edited)
    return torch.cat([matrix.flatten(0, 1), offset])


def _fit(values: Tensor, colors: Tensor, mean: Callable[[Tensor], Tensor]) -> _Maps:
    """`values` as affine functions of `colors` (both [3, h, w]): least squares within the windows of `mean`.

    Source: He, Sun and Tang 2010, "Guided image filtering", eqs. 14 to 16, with three output channels.
    """
    value, color = mean(values), mean(colors)
    shape = (3, 3, *colors.shape[1:])
    covariance = mean((values[:, None] * colors).flatten(0, 1)).view(shape) - value[:, None] * color
    variance = mean((colors[:, None] * colors).flatten(0, 1)).view(shape) - color[:, None] * color
    ridged = variance.permute(2, 3, 0, 1) + _RIDGE * torch.eye(3)
    matrix = torch.linalg.solve(ridged, covariance.permute(2, 3, 0, 1), left=False).permute(2, 3, 0, 1)
    offset = value - _dot(matrix, color)
    return mean(matrix.flatten(0, 1)).view(shape), mean(offset)


def _mapped(maps: _Maps, colors: Tensor) -> Tensor:
    return _dot(maps[0], colors) + maps[1]


def _dot(matrix: Tensor, colors: Tensor) -> Tensor:
    """Matrix times colour at each pixel."""
    return (matrix * colors).sum(1)


def _mean_of_all(pictures: Tensor) -> Tensor:
    return pictures.mean((1, 2), keepdim=True).expand_as(pictures)


def _mean_of_window(pictures: Tensor) -> Tensor:
    return _box_mean(pictures, _RADIUS_PX)


def _mean_square(difference: Tensor) -> Tensor:
    return _box_mean(difference.square().mean(0, keepdim=True), _RESIDUAL_RADIUS_PX)


def _box_mean(pictures: Tensor, radius_px: int) -> Tensor:
    """Mean over the square around each pixel; at the border over the part of it that exists."""
    side = 2 * radius_px + 1
    rows = F.avg_pool2d(pictures, (side, 1), 1, (radius_px, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), 1, (0, radius_px), count_include_pad=False)


def _smooth_step(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to `low`, 1 from `high`, without a kink between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _apply(field: Tensor, source: Image.Image) -> Image.Image:
    """Adds the field, scaled up bilinearly, to the source: strip by strip."""
    pixels = np.asarray(source)
    height, width, _ = pixels.shape
    out = np.empty_like(pixels)
    rows, columns = _neighbours(field.shape[1], height), _neighbours(field.shape[2], width)
    step = max(1, _STRIP_PX // width)
    for top in range(0, height, step):
        part = slice(top, top + step)
        colors = torch.from_numpy(pixels[part].transpose(2, 0, 1) / np.float32(255))
        above, below, weight = (axis[part] for axis in rows)
        strip = torch.lerp(field[:, above], field[:, below], weight[:, None])
        left, right, weight = columns
        strip = torch.lerp(strip[..., left], strip[..., right], weight)
        changed = colors + _dot(strip[:9].unflatten(0, (3, 3)), colors) + strip[9:]
        out[part] = (changed.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(out)


def _neighbours(num: int, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `num_out` pixels along an axis: the two of `num` between whose centres it lies, the second's weight."""
    position = ((torch.arange(num_out) + 0.5) * (num / num_out) - 0.5).clamp(0, num - 1)
    first = position.long()
    return first, (first + 1).clamp(max=num - 1), position - first
