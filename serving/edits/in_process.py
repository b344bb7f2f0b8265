"""Both stages of an edit in this process, as an `EditBackend`."""

import contextlib
from collections.abc import AsyncGenerator

from serving.edits.backend import EditEvent, EditOutcome, ServiceStats, same_bundles
from serving.edits.call import EditCall
from serving.stages.diffusion import DiffusionStage
from serving.stages.messages import BundleInfo, RenderedEdit
from serving.stages.mllm import MLLMStage


class InProcessBackend:
    """Both stages in this process: for tests and benchmarks."""

    def __init__(self, mllm: MLLMStage, diffusion: DiffusionStage) -> None:
        self._mllm = mllm
        self._diffusion = diffusion

    async def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        """See `EditBackend`."""
        derived = await self._mllm.derive(call.image, call.options, timeout_s=call.left_s)
        yield derived
        events = self._diffusion.render_stream(call.image, derived, call.options, mask=call.mask, timeout_s=call.left_s)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, RenderedEdit):
                    yield EditOutcome(derived=derived, rendered=event)
                elif is_watched:
                    yield event

    def check_room(self) -> None:
        """See `EditBackend`. The stages say it themselves."""

    async def models(self) -> tuple[BundleInfo, ...]:
        """See `EditBackend`."""
        return same_bundles(await self._mllm.models(), await self._diffusion.models())

    async def check_ready(self) -> None:
        """See `EditBackend`."""
        await self.models()

    async def stats(self) -> ServiceStats:
        """See `EditBackend`."""
        return ServiceStats(mllm=await self._mllm.stats(), diffusion=await self._diffusion.stats())
