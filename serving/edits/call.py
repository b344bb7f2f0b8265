"""One edit as the stages need it, made of its checked form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgie.config import random_seed
from mgie.images.files import OutputFormat
from serving.schema import EditForm
from serving.telemetry.tracing import NO_TRACE, Trace


@dataclass(frozen=True, kw_only=True)
class EditCall:
    """One edit as the stages need it."""

    model: str | None
    "name of the bundle; None = the default"
    image: bytes
    "encoded photo"
    instruction: str
    expressive: str | None
    overrides: Mapping[str, Any]
    "sampling settings that differ from the bundle's defaults, by field name of EditSettings"
    seed: int
    "of the first result; result i has seed + i"
    n: int
    mask: bytes | None
    deterministic: bool
    num_partials: int
    output_format: OutputFormat
    output_quality: int | None
    "0 to 100 for jpeg and webp; None for the default"
    output_wh: tuple[int, int] | None = None
    "size that the results are scaled to; None = the photo's"
    keeps_lossless: bool = False
    "make the results as PNG, too, and keep them"
    patience_s: float = 0.0
    "in each line it lets those pass that come so much later, and nobody after them"
    deadline: float
    "when to give up, by time.monotonic() of this process"
    trace: Trace = field(default_factory=dict)
    "to which the edit belongs"


def edit_call(
    form: EditForm,
    *,
    model: str | None,
    image: bytes,
    output_wh: tuple[int, int] | None = None,
    keeps_lossless: bool = False,
    patience_s: float = 0.0,
    deadline: float,
    trace: Trace = NO_TRACE,
) -> EditCall:
    """What the stages get of a form; draws the seed if none is given."""
    names = ("sampler", "steps", "guidance_scale", "image_guidance_scale", "square_crop", "detail_transfer")
    given = {name: getattr(form, name) for name in names}
    return EditCall(
        model=model,
        image=image,
        instruction=form.prompt,
        expressive=form.expressive,
        overrides={name: value for name, value in given.items() if value is not None},
        seed=random_seed() if form.seed is None else form.seed,
        n=form.n,
        mask=form.mask,
        deterministic=form.deterministic,
        num_partials=form.partial_images,
        output_format=form.output_format,
        output_quality=form.output_compression,
        output_wh=output_wh,
        keeps_lossless=keeps_lossless,
        patience_s=patience_s,
        deadline=deadline,
        trace=trace,
    )
