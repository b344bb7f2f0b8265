"""One edit as a backend gets it, made of its checked form."""

import time
from dataclasses import dataclass, fields
from typing import Any

from mgie.config import EditSettings, random_seed
from serving.schema import EditForm
from serving.stages.messages import EditOptions


@dataclass(frozen=True, kw_only=True)
class EditCall:
    """One edit that can begin."""

    image: bytes
    "encoded photo"
    mask: bytes | None = None
    "PNG of the photo's size, transparent where it may be edited; None: everywhere"
    options: EditOptions
    deadline: float
    "when to give up, by time.monotonic() of this process"

    @property
    def left_s(self) -> float:
        """Seconds until its deadline. Clocks of machines differ: stages are told how long they have, not until when."""
        return self.deadline - time.monotonic()


def edit_options(form: EditForm, **more: Any) -> EditOptions:
    """What the stages are asked for by a form; draws the seed if none is given.

    Args:
        form: What the client asks for.
        more: Fields of `EditOptions` that are the service's to say.
    """
    given = {one.name: getattr(form, one.name) for one in fields(EditSettings)}
    return EditOptions(
        instruction=form.prompt,
        expressive=form.expressive,
        overrides={name: value for name, value in given.items() if value is not None},
        seed=random_seed() if form.seed is None else form.seed,
        n=form.n,
        deterministic=form.deterministic,
        num_partials=form.partial_images,
        output_format=form.output_format,
        output_quality=form.output_compression,
        **more,
    )
