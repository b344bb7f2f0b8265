"""The first stage of an edit: a photo and an instruction become a condition, in greedy batches on one thread."""

import asyncio
import itertools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Unpack

import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.errors import DeadlineError
from mgie.inference.condition_cache import DEFAULT_CACHE_BYTES, ConditionCache, condition_key
from mgie.inference.conditioner import Conditioner, EditCondition, EditRequest
from serving.deadline import within
from serving.stages.autoscaling import Work
from serving.stages.base import Stage, StageSettings
from serving.stages.batcher import BatchRun, GreedyBatcher
from serving.stages.messages import Derived, EditOptions, StageStats
from serving.stages.packing import pack
from serving.telemetry.metrics import CACHE_REQUESTS, CANCELS, DERIVE_SECONDS, QUEUE_SECONDS, RUNNING, WAITING, Sample

PROBE_SIDE_PX = 32
PROBE_WORDS = "make it brighter"

_OUTPUT_AVERAGED = 20  # edits, over which the length of what the MLLM writes is averaged
_LENGTH_TOKENS = 32  # prompts are batched by length in such steps: that much padding costs less than one more batch


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """An item of the MLLM's batcher."""

    request: EditRequest
    conditioner: Conditioner
    key: Hashable


class MLLMStage(Stage[Conditioner]):
    """Derives a condition from a photo and an instruction.

    Args:
        max_batch_size: Largest batch.
        cache_bytes: Memory for conditions that are kept; 0: none.
        bundle, bundles, settings: See `Stage`; errors, too.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        bundles: Sequence[str] = (),
        *,
        max_batch_size: int = 8,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        **settings: Unpack[StageSettings],
    ) -> None:
        self._cache: ConditionCache[EditCondition] = ConditionCache(cache_bytes)
        self._numbers = itertools.count()  # of edits that share no batch
        self._tokens_left = self._tokens_done = self._output_tokens = 0.0
        self._is_warm = False
        self._worker: GreedyBatcher[_Derivation, EditCondition] = GreedyBatcher(
            self._derive_batch, key=lambda item: item.key, max_batch_size=max_batch_size, name="mllm"
        )
        super().__init__(bundle, bundles, **settings)
        self._health = self._monitoring.health(self._probe)

    async def derive(self, image: bytes, options: EditOptions, *, timeout_s: float | None = None) -> Derived:
        """The condition of one edit. Cancelling the call takes it out of a running batch within a token.

        Args:
            image: Encoded photo.
            options: The edit. The condition of a given expressive instruction is not kept; what is deterministic has a
                batch of its own, for others in it would show in the last bits.
            timeout_s: When to give up; None: never.

        Raises:
            ImageError: The bytes are no image that can be edited.
            PromptError: A text is blank or too long.
            ConfigError: There is no such model. ModelUnavailableError: It cannot be loaded.
            DeadlineError: The time ran out.
        """
        run: BatchRun | None = None
        name, is_written = await self._named(options.model), options.expressive is None
        identity = self._bundles[name].identity

        async def derive() -> EditCondition:
            nonlocal run
            request = EditRequest(
                image=await self._read(image), instruction=options.instruction, expressive=options.expressive
            )
            async with self._pool.use(name) as conditioner:
                num_tokens = await asyncio.to_thread(conditioner.num_prompt_tokens, request)
                # One forward pass reads a given text, many write one: together, the short would wait for the long.
                kind = "generated" if is_written else "given"
                alone = (next(self._numbers),) if options.deterministic else ()
                key = (identity, kind, num_tokens // _LENGTH_TOKENS, *alone)
                with self._counted(num_tokens + (self._output_tokens if is_written else 0.0)):
                    batched = await self._worker.submit(
                        _Derivation(request=request, conditioner=conditioner, key=key),
                        queue_delay_s=options.queue_delay_s,
                    )
            run = batched.run
            self._note(batched.result, run, is_written=is_written)
            return batched.result

        with self._spans.span("derive", options.trace) as span:
            late = DeadlineError(f"the condition was not derived within {timeout_s} s; the edit was given up")
            async with within(timeout_s, late):
                if is_written:
                    key = await asyncio.to_thread(
                        condition_key,
                        image,
                        options.instruction,
                        expressive=None,
                        generation=None,
                        bundle=identity,
                        is_alone=options.deterministic,
                    )
                    edit_condition = await self._cache.get(key, derive)
                else:
                    edit_condition = await derive()
            span.record(is_cached=run is None, num_output_tokens=edit_condition.output_tokens)
            if run is not None:
                span.record(queue_s=run.queue_s, batch_size=run.batch_size)
        return pack(edit_condition, replica=self._replica, run=run)

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        return StageStats(
            replica=self._replica,
            pid=os.getpid(),
            loaded=tuple(self._pool.models()),
            work=self._worker.stats(),
            cache=self._cache.stats(),
        )

    async def check_health(self) -> None:
        """Raises RuntimeError when the model does not work; Ray Serve then replaces the replica.

        Serve takes a new replica into service after its first check: the probe warms it up.
        """
        if not self._worker.is_alive():
            raise RuntimeError("the worker thread of MLLMStage has ended")
        await self._health.check()

    def close(self) -> None:
        """Ends the thread that runs the models."""
        self._worker.close()
        super().close()

    def _load(self, bundle: Bundle) -> Conditioner:
        return bundle.load_conditioner(**self._placed)

    def _derive_batch(
        self, items: Sequence[_Derivation], is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, EditCondition]]:
        # OpenMP counts threads per calling thread, and Ray derives OMP_NUM_THREADS from the CPUs asked for; a number
        # of our own keeps results equal from run to run.
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        conditioner = items[0].conditioner  # that of all: they are of one bundle

        def is_still_wanted(index: int) -> bool:  # asked before each token
            self._health.note_work()
            return is_wanted(index)

        yield from enumerate(conditioner.derive([item.request for item in items], is_wanted=is_still_wanted))

    async def _probe(self) -> None:
        """Derives a condition for a given text: one pass, before all that waits. The first time the MLLM writes, too."""
        models = self._pool.models()
        if not models:  # the only one is being replaced
            return
        request = EditRequest(
            image=Image.new("RGB", (PROBE_SIDE_PX, PROBE_SIDE_PX)),
            instruction=PROBE_WORDS,
            expressive=PROBE_WORDS if self._is_warm else None,
        )
        *_, conditioner = models.values()
        await self._worker.submit(
            _Derivation(request=request, conditioner=conditioner, key=("probe", next(self._numbers))), is_urgent=True
        )
        self._is_warm = True

    @contextmanager
    def _counted(self, num_tokens: float) -> Iterator[None]:
        self._tokens_left += num_tokens
        try:
            with self._work_meter.edit():
                yield
        finally:
            self._tokens_left -= num_tokens

    def _note(self, edit_condition: EditCondition, run: BatchRun, *, is_written: bool) -> None:
        """Figures of a derivation that is done."""
        self._tokens_done += edit_condition.prompt_tokens + edit_condition.image_tokens + edit_condition.output_tokens
        if is_written:
            change = edit_condition.output_tokens - self._output_tokens
            self._output_tokens += change / _OUTPUT_AVERAGED if self._output_tokens else change
        self._meter(QUEUE_SECONDS, run.queue_s)
        self._meter(DERIVE_SECONDS, run.run_s)

    def _look_at_work(self) -> Work:
        has_line = self._worker.stats().num_waiting > 0
        return self._work_meter.measure(done=self._tokens_done, left=self._tokens_left, has_line=has_line)

    def _samples(self) -> Iterator[Sample]:
        work, cache = self._worker.stats(), self._cache.stats()
        yield WAITING, work.num_waiting, {}
        yield RUNNING, work.num_running, {}
        yield CANCELS, work.num_dropped + work.num_cancelled, {}
        for result, count in (("hit", cache.num_hits), ("joined", cache.num_joined), ("miss", cache.num_misses)):
            yield CACHE_REQUESTS, count, {"result": result}
