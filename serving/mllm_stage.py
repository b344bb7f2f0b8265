"""The first stage of an edit: a photo and an instruction become guidance, in greedy batches on one thread."""

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mgie.conditioner import Conditioner, EditRequest, Guidance
from mgie.config import ImageLimits
from mgie.guidance_cache import GuidanceCache, guidance_key
from serving.batcher import BatchRun, GreedyBatcher
from serving.stage import DEFAULT_LIMITS, Stage, open_bundles, within
from serving.stage_calls import Derived, StageStats

DEFAULT_CACHE_BYTES = 64 * 2**20  # of guidance: some 250 edits of a 7B bundle

_LENGTH_TOKENS = 32  # prompts are batched by length in such steps: that much padding costs less than one more batch


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """An item of the MLLM's batcher."""

    request: EditRequest
    conditioner: Conditioner
    key: Hashable


class MLLMStage(Stage[Conditioner]):
    """Derives guidance from a photo and an instruction.

    Args:
        bundle: The default, as `mgie.bundles.open_bundle` takes it. bundles: More that edits may ask for by name.
        max_loaded: Bundles in memory at a time.
        device: As torch names it, or `auto`.
        dtype: `auto`, `float32`, `bfloat16`, ...
        max_batch_size: Largest batch.
        cache_bytes: Of guidance that is kept; 0 = none.
        num_threads: Threads of torch on the CPU.
        limits: What an input image may be.
        on_use: Told the name of the bundle before each use.

    Raises:
        BundleError: A bundle is missing or damaged, lacks a part, or two have the same name.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        bundles: Sequence[str] = (),
        *,
        max_loaded: int = 2,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int = 8,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        num_threads: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
        on_use: Callable[[str], Awaitable[object]] | None = None,
    ) -> None:
        super().__init__(
            open_bundles(bundle, bundles),
            load=lambda one: one.load_conditioner(device=device, dtype=dtype),
            close=lambda _: None,
            max_loaded=max_loaded,
            limits=limits,
            on_use=on_use,
        )
        self._num_threads = num_threads
        self._cache = GuidanceCache(cache_bytes)
        self._numbers = itertools.count()  # of edits that share no batch
        self._worker: GreedyBatcher[_Derivation, Guidance] = GreedyBatcher(
            self._derive_batch, key=lambda item: item.key, max_batch_size=max_batch_size, name="mllm"
        )

    async def derive(
        self,
        image: bytes,
        instruction: str,
        expressive: str | None = None,
        *,
        model: str | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> Derived:
        """Guidance of one edit. Cancelling the call takes it out of a running batch within a token.

        Args:
            image: Encoded photo.
            instruction: The user's words.
            expressive: The expressive instruction, if the user gives it; its guidance is not kept.
            model: Name of the bundle; None = the default.
            deterministic: In a batch of its own: others in it would show in the last bits.
            timeout_s: When to give up; None = never.

        Raises:
            ImageError: The bytes are no image that can be edited.
            PromptError: A text is blank or too long.
            ConfigError: There is no such model. ModelUnavailableError: It cannot be loaded.
            DeadlineError: The time ran out.
        """
        run: BatchRun | None = None
        name = await self._named(model)
        identity = self._bundles[name].identity

        async def derive() -> Guidance:
            nonlocal run
            request = EditRequest(image=await self._read(image), instruction=instruction, expressive=expressive)
            async with self._pool.use(name) as conditioner:
                length = await asyncio.to_thread(conditioner.num_prompt_tokens, request) // _LENGTH_TOKENS
                # One forward pass reads a given text, many write one: together, the short would wait for the long.
                kind = "generated" if expressive is None else "given"
                alone = (next(self._numbers),) if deterministic else ()
                key = (identity, kind, length, *alone)
                batched = await self._worker.submit(_Derivation(request=request, conditioner=conditioner, key=key))
            run = batched.run
            return batched.result

        async with within(timeout_s, "guidance was not derived"):
            if expressive is None:
                key = await asyncio.to_thread(
                    guidance_key,
                    image,
                    instruction,
                    expressive=None,
                    generation=None,
                    bundle=identity,
                    is_alone=deterministic,
                )
                guidance = await self._cache.get(key, derive)
            else:
                guidance = await derive()
        return Derived(guidance=guidance, replica=self._replica, run=run)

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        return StageStats(
            replica=self._replica,
            pid=os.getpid(),
            loaded=tuple(self._pool.models()),
            work=self._worker.stats(),
            cache=self._cache.stats(),
        )

    def recent_batches(self) -> list[tuple[Any, ...]]:
        """Compatibility keys of the items of each recent batch."""
        return self._worker.recent_batches()

    def check_health(self) -> None:
        """Raises RuntimeError when the model's thread is gone; Ray Serve calls it and replaces the replica."""
        if not self._worker.is_alive():
            raise RuntimeError("the worker thread of MLLMStage has ended")

    def close(self) -> None:
        """Ends the thread that runs the models."""
        self._worker.close()
        self._pool.close()

    def _derive_batch(
        self, items: Sequence[_Derivation], is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Guidance]]:
        # OpenMP counts threads per calling thread, and Ray derives OMP_NUM_THREADS from the CPUs asked for; a number
        # of our own keeps results equal from run to run.
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        conditioner = items[0].conditioner  # that of all: they are of one bundle
        yield from enumerate(conditioner.derive([item.request for item in items], is_wanted=is_wanted))
