"""The stages and the board of a running service, through Ray Serve's handles; calls are repeated when a replica dies.

The way of an edit: the ingress puts the photo into the object store once and sends the reference to both stages; the
condition that the MLLM stage returns goes to the diffusion stage by reference too.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from mgie.errors import EngineFullError, MGIEError
from serving.deadline import within
from serving.edits.backend import READY_TIMEOUT_S, EditEvent, EditOutcome, ServiceStats, same_bundles
from serving.edits.call import EditCall
from serving.edits.cancellation import CancelBoard
from serving.errors import MixedVersionsError, StageUnavailableError
from serving.stages.messages import BundleInfo, RenderedEdit, StageStats
from serving.telemetry.metrics import RETRIES, Meter

if TYPE_CHECKING:
    from serving.stages.diffusion import DiffusionStage
    from serving.stages.mllm import MLLMStage

ROLL_OUT_POLL_S = 0.5  # between two tries while replicas of two versions run
MAX_STAGE_RETRIES = 2  # one for the replica that died, one for another that was about to

logger = logging.getLogger("serving.ray_backend")

_LOST = (RayActorError, ObjectLostError)  # the replica died or is cut off; an argument was lost with its node


class HandleBackend:
    """Edits through the handles of the two stages; the `EditBackend` of a running service.

    Args:
        mllm, diffusion: The stages.
        max_open: Edits under way; more are refused.
        may_sleep: Stages may have no replica while there is nothing to do.
        meter: Takes figures.
    """

    def __init__(
        self,
        mllm: "DeploymentHandle[MLLMStage]",
        diffusion: "DeploymentHandle[DiffusionStage]",
        *,
        max_open: int,
        may_sleep: bool,
        meter: Meter,
    ) -> None:
        self._mllm = mllm
        self._diffusion = diffusion
        self._may_sleep, self._meter = may_sleep, meter
        self._max_open, self._num_open = max_open, 0
        self._waking: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """A place for an edit, here rather than in a stage: else the MLLM would work for edits that are refused later.

        Raises:
            EngineFullError: There is none.
        """
        self.check_room()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def check_room(self) -> None:
        """See `EditBackend`."""
        if self._num_open == self._max_open:
            raise EngineFullError(f"{self._num_open} edits are under way; at most {self._max_open} may be")

    def _for(self, stage: DeploymentHandle[Any], call: EditCall) -> Any:
        """The handle for one of several bundles: with a replica first that has the edit's own in memory."""
        model = call.options.model
        return stage if model is None else stage.options(multiplexed_model_id=model)

    def _wake_diffusion(self) -> None:
        """Has a sleeping diffusion stage start now, beside the MLLM's, rather than when there is a condition."""

        async def ask() -> None:
            with contextlib.suppress(MGIEError):  # the edit itself will find out
                await _models_of(self._diffusion)

        if self._may_sleep and (self._waking is None or self._waking.done()):
            self._waking = asyncio.create_task(ask())

    async def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        """See `EditBackend`. During a roll-out it is begun again until both stages serve the same bundle."""
        with self._admitted():
            self._wake_diffusion()
            image = ray.put(call.image)
            while True:
                try:
                    mllm = await _call(
                        lambda _: self._for(self._mllm, call).derive.remote(image, call.options, timeout_s=call.left_s)
                    )
                    # Awaited, though a handle accepts unfinished arguments: the words are part of the answer, a failure
                    # belongs to its stage, and only finished derivations may count as load of the diffusion stage. (Ray
                    # 2.60 sees to the last point by itself: it queues a call when its arguments are there.)
                    yield mllm.result
                    if is_watched:
                        async with contextlib.aclosing(self._render_stream(call, image, mllm)) as events:
                            async for event in events:
                                yield event
                    else:
                        yield await self._render(call, image, mllm)
                except MixedVersionsError as error:  # comes before all events but `Derived`
                    logger.info("an edit is begun again: %s", error)
                    await asyncio.sleep(ROLL_OUT_POLL_S)
                else:
                    return

    async def _render(self, call: EditCall, image: "ray.ObjectRef[bytes]", mllm: "_Called") -> EditOutcome:
        diffusion = await _call(
            lambda retry: self._for(self._diffusion, call).render.remote(
                image,
                # By reference. After a failure by value: the node that held the object may be gone.
                mllm.result if retry else mllm.response,
                call.options,
                mask=call.mask,
                timeout_s=call.left_s,
            )
        )
        retries = {"mllm": mllm.num_retries, "diffusion": diffusion.num_retries}
        for stage, num_retries in retries.items():
            if num_retries:
                self._meter(RETRIES, num_retries, stage=stage)
        return EditOutcome(derived=mllm.result, rendered=diffusion.result, retries=retries)

    async def _render_stream(
        self, call: EditCall, image: "ray.ObjectRef[bytes]", mllm: "_Called"
    ) -> AsyncGenerator[EditEvent, None]:
        """A replica that dies ends it: half of it has been told."""
        stage: Any = self._for(self._diffusion, call).options(stream=True)
        events = stage.render_stream.remote(image, mllm.response, call.options, mask=call.mask, timeout_s=call.left_s)
        try:
            async for event in events:
                yield EditOutcome(derived=mllm.result, rendered=event) if isinstance(event, RenderedEdit) else event
        except BackPressureError as error:
            raise EngineFullError("too many edits wait for a replica; try again later") from error
        except RayTaskError as error:
            raise error.cause from None  # as in `_call`
        except _LOST as error:
            raise StageUnavailableError("the replica died under the edit") from error
        finally:
            events.cancel()

    async def models(self) -> tuple[BundleInfo, ...]:
        """See `EditBackend`. It wakes sleeping stages, and waits for the end of a roll-out."""
        while True:
            mllm, diffusion = await asyncio.gather(_models_of(self._mllm), _models_of(self._diffusion))
            with contextlib.suppress(MixedVersionsError):
                return same_bundles(mllm, diffusion)
            await asyncio.sleep(ROLL_OUT_POLL_S)

    async def check_ready(self) -> None:
        """See `EditBackend`. It wakes no stage: an edit will."""
        replicas = await _replicas() if self._may_sleep else {}
        stages = (self._mllm, self._diffusion)
        await asyncio.gather(*(_models_of(stage) for stage in stages if not _is_asleep(stage, replicas)))

    async def stats(self) -> ServiceStats:
        """See `EditBackend`. It wakes no stage."""
        replicas = await _replicas()

        async def of(stage: DeploymentHandle[Any]) -> StageStats | None:
            return None if _is_asleep(stage, replicas) else await _stats_of(stage)

        mllm, diffusion = await asyncio.gather(of(self._mllm), of(self._diffusion))
        return ServiceStats(mllm=mllm, diffusion=diffusion, replicas=replicas)


class HandleBoard:
    """The board of cancels through its handle; the `Board` of a running service."""

    def __init__(self, board: DeploymentHandle[CancelBoard]) -> None:
        self._board = board

    async def listen(self, replica: str, answers: Mapping[int, bool]) -> Sequence[tuple[int, str]]:
        """See `Board`."""
        requests: list[tuple[int, str]] = (await _call(lambda _: self._board.listen.remote(replica, answers))).result
        return requests

    async def cancel(self, edit_id: str) -> bool | None:
        """See `Board`."""
        is_cancelled: bool | None = (await _call(lambda _: self._board.cancel.remote(edit_id))).result
        return is_cancelled


@dataclass(frozen=True)
class _Called:
    result: Any
    response: DeploymentResponse[Any]
    "stands for the result as an argument, by reference"
    num_retries: int


async def _call(send: Callable[[int], Any]) -> _Called:
    """Awaits a stage call and repeats it when the replica dies under it; calls are seeded, so nothing changes.

    Args:
        send: Sends the call and returns Serve's response; gets the number of the try, from 0.

    Raises:
        StageUnavailableError: Replicas died on every try.
        EngineFullError: Too many calls wait for a replica.
        Exception: What the stage itself raised, as it raised it.
    """
    for retry in range(MAX_STAGE_RETRIES + 1):
        response: DeploymentResponse[Any] = send(retry)
        try:
            return _Called(await response, response, retry)
        except asyncio.CancelledError:
            response.cancel()  # else the stage would go on for nobody
            raise
        except BackPressureError as error:
            raise EngineFullError("too many edits wait for a replica; try again later") from error
        except RayTaskError as error:
            if not isinstance(error.cause, _LOST):
                raise error.cause from None  # Ray's wrapper would hide the class that the error table looks for
            logger.warning("a stage call lost its input and is repeated: %s", error.cause)
        except _LOST as error:
            logger.warning("a stage replica died under a call, which is repeated: %s", error)
    raise StageUnavailableError(f"replicas died under each of {MAX_STAGE_RETRIES + 1} tries")


async def _models_of(stage: DeploymentHandle[Any]) -> tuple[BundleInfo, ...]:
    models: tuple[BundleInfo, ...] = (await _call(lambda _: stage.models.remote())).result
    return models


async def _replicas() -> dict[str, dict[str, int]]:
    """Number of replicas by deployment and state."""
    status = await asyncio.to_thread(serve.status)
    deployments = status.applications[serve.get_replica_context().app_name].deployments
    # Plain strings, though Serve's types promise its enumeration.
    return {
        name: {str(getattr(state, "value", state)): number for state, number in details.replica_states.items()}
        for name, details in deployments.items()
    }


def _is_asleep(stage: DeploymentHandle[Any], replicas: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether the stage has no replica that works or is coming: a question would wake it."""
    states = replicas.get(stage.deployment_name)
    return states is not None and not any(states.get(state) for state in ("STARTING", "UPDATING", "RUNNING"))


async def _stats_of(stage: DeploymentHandle[Any]) -> StageStats | None:
    with contextlib.suppress(StageUnavailableError):
        async with within(READY_TIMEOUT_S, StageUnavailableError("no answer")):
            stats: StageStats = (await _call(lambda _: stage.stats.remote())).result
            return stats
    return None
