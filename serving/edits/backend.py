"""What edits, as the HTTP side sees it: a protocol, and what a backend of two stages needs.

`in_process.py` and `ray_backend.py` make one each. Knows neither HTTP nor Ray.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Protocol

from mgie.engine.handle import Stepped
from serving.edits.call import EditCall
from serving.errors import MixedVersionsError
from serving.stages.messages import BundleInfo, Derived, Partial, RenderedEdit, StageStats

READY_TIMEOUT_S = 5.0  # a stage that does not answer a question about itself within this is not ready


@dataclass(frozen=True, kw_only=True)
class EditOutcome:
    """What an `EditBackend` returns."""

    derived: Derived
    rendered: RenderedEdit
    retries: Mapping[str, int] = field(default_factory=dict)
    "calls repeated because a replica died, by stage"


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """Figures for operators and load tests."""

    mllm: StageStats | None
    "figures of the one replica that answered; None: none did in time"
    diffusion: StageStats | None
    replicas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    "number of replicas by state, by deployment"


EditEvent = Derived | Stepped | Partial | EditOutcome


def pictures_of(event: EditEvent) -> Sequence[bytes]:
    """The encoded pictures in an event."""
    if isinstance(event, EditOutcome):
        return event.rendered.images
    return [event.data] if isinstance(event, Partial) else ()


class EditBackend(Protocol):
    """Anything that can edit."""

    def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        """Runs both stages: `Derived` first, `EditOutcome` last. Closing it frees what it holds.

        Args:
            call: The edit.
            is_watched: Tell of steps and pictures on the way. What nobody watches can be run again unnoticed, where
                something dies under it.

        Raises:
            MGIEError: See the table in `api/responses.py`.
        """
        ...

    def check_room(self) -> None:
        """Returns if an edit would be taken on now.

        Raises:
            EngineFullError: It would be refused.
        """
        ...

    async def models(self) -> tuple[BundleInfo, ...]:
        """The served bundles, as both stages report them, the default first.

        Raises:
            StageUnavailableError: A stage does not answer, or they serve different bundles.
        """
        ...

    async def check_ready(self) -> None:
        """Returns if edits can be answered.

        Raises:
            StageUnavailableError: They cannot be now.
        """
        ...

    async def stats(self) -> ServiceStats:
        """Current figures."""
        ...


def same_bundles(mllm: Sequence[BundleInfo], diffusion: Sequence[BundleInfo]) -> tuple[BundleInfo, ...]:
    """Raises MixedVersionsError unless both stages serve the same bundles."""
    for of_mllm, of_diffusion in zip_longest(mllm, diffusion):
        if of_mllm != of_diffusion:
            first, second = (f"{info.name} {info.identity}" if info else "none" for info in (of_mllm, of_diffusion))
            raise MixedVersionsError(
                f"the MLLM stage serves bundle {first} and the diffusion stage {second}; they must match"
            )
    return tuple(diffusion)
