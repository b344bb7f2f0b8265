"""Continuous batching: many edits share one denoiser, joining and leaving its batch at step borders.

    line -> (admitted: pixels) -> VAE encodes -> steps, in batches that change from step to step -> VAE decodes

One thread owns the denoiser and does nothing but steps. The VAE, and what is done to full-size pixels, has threads
of its own (`num_codec_threads`, one by default): an edit that is encoded or decoded costs the others some speed,
never a step. On CUDA each of them has its own stream; every step and every encoding ends with a synchronisation, so
what passes between threads is complete, and no memory is reused while another stream reads it.

An edit that fails fails alone: a batch that raises is run again sample by sample (`denoise_step` leaves states and
generators as they were); one that is out of memory is halved, and batches stay that small. Edits that were called
off, or are past their deadline, lose their place at once and are in no step that begins later.

Knows nothing of words, files, HTTP or event loops. Locks: everything below `Engine` is shared under `_changed`, but
for the states of the samples, which belong to the thread that encodes, steps or decodes them.
"""

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mgie.config import MAX_PREVIEWS, MAX_RESULTS, MAX_SEED, check_range
from mgie.engine.admission import Admission
from mgie.engine.fair_scheduler import FairScheduler
from mgie.engine.handle import EditHandle, EditProgress, EngineStats, Phase, Previewed, Started, StepDone, Stepped
from mgie.engine.in_flight import EditInFlight, SampleInFlight
from mgie.engine.priority_threads import PriorityThreads
from mgie.errors import ClosedError, ConfigError, DeadlineError, EngineFullError
from mgie.images.masks import check_mask
from mgie.inference.renderer import Renderer, RenderRequest
from mgie.model.guidance import needed_branches
from mgie.model.sampler import denoise_step

_NUM_RECORDED = 1000  # batches kept for whoever draws figures
_GROW_AFTER = 100  # full steps, before a batch that memory ran out for may have a row more again
_RATE_WEIGHT = 0.1  # of the newest step in the moving average of speed
# Order of the VAE's work: what lets a step be larger, what lets a caller go, what is only nice to have.
_ENCODE, _DECODE, _PREVIEW = range(3)
_URGENT = -1  # before them all


class Engine:
    """Edits images, many at a time.

        engine = Engine(renderer)
        handle = engine.submit(request, n=2, deadline=time.monotonic() + 60)
        images = handle.result.result()

    Args:
        renderer: The diffusion stage; nobody else may use it meanwhile.
        max_batch_rows: Largest batch of the denoiser, in rows: an image takes one row per branch of guidance, three
            at most. Memory for activations is in proportion.
        max_pixels_in_flight: Limit for edits between admission and result: work pixels times rows, times images; an edit
            with more than that goes in alone. None = two full batches, so that one is denoised while another is encoded or decoded.
        max_waiting: Edits in line; more are refused.
        num_codec_threads: Threads for the VAE and for full-size pixels; each may hold one decoding's memory.
        num_threads: Threads of torch, for each of the engine's threads; None = torch's own number.
        on_step: Told of each step, on the thread that takes them: it must be quick and not raise.
        clock: Seconds, for deadlines and figures.

    Raises:
        ConfigError: A number is below 1 (`max_waiting`: below 0).
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        max_batch_rows: int = 24,
        max_pixels_in_flight: int | None = None,
        max_waiting: int = 64,
        num_codec_threads: int = 1,
        num_threads: int | None = None,
        on_step: Callable[[StepDone], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_pixels_in_flight is None:
            max_pixels_in_flight = 2 * max_batch_rows * renderer.work_area_px
        for name, value, least in (
            ("max_batch_rows", max_batch_rows, 1),
            ("max_pixels_in_flight", max_pixels_in_flight, 1),
            ("max_waiting", max_waiting, 0),
            ("num_codec_threads", num_codec_threads, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}", param=name)
        self._renderer, self._num_threads, self._on_step, self._clock = renderer, num_threads, on_step, clock
        self._changed = threading.Condition()
        self._admission: Admission[EditInFlight] = Admission(max_pixels=max_pixels_in_flight, max_waiting=max_waiting)
        self._max_waiting = max_waiting
        self._turns: FairScheduler[SampleInFlight] = FairScheduler(max_batch_rows)
        self._most_rows = max_batch_rows
        self._num_full_steps = self._num_out_of_memory = 0
        self._edits: set[EditInFlight] = set()  # that have not ended
        self._is_closed = False
        self._ended = {"done": 0, "failed": 0, "cancelled": 0, "overdue": 0, "refused": 0}
        self._num_begun = self._num_steps = self._num_stepped = self._max_steps_after_end = self._work_done = 0
        self._seconds_per_pixel: float | None = None  # of one row and step
        self._batches: deque[tuple[Hashable, ...]] = deque(maxlen=_NUM_RECORDED)
        self._codec = PriorityThreads(num_codec_threads, name="codec", inside=lambda: self._as_worker(has_stream=True))
        self._stepper = threading.Thread(target=self._step_for_ever, name="engine", daemon=True)
        self._stepper.start()

    # ---- for callers, from any thread

    def submit(
        self,
        request: RenderRequest,
        *,
        n: int = 1,
        deadline: float | None = None,
        num_previews: int = 0,
        deterministic: bool = False,
        queue_delay_s: float = 0.0,
        is_probe: bool = False,
    ) -> EditHandle:
        """Takes an edit in, or puts it in line; returns at once.

        Args:
            request: The edit.
            n: Images of it; image i has the request's seed + i. They share all but the noise.
            deadline: When to give up, by the engine's clock.
            num_previews: How often to show the first image on its way, at evenly spaced steps: up to half way
                cheaply, then by the VAE. A preview that is late is left out.
            deterministic: Each image is denoised in a batch of its own: the same bits on this machine as
                `Renderer.render` gives it alone. Otherwise who shares its batches may change a pixel by 2 of 255.
            queue_delay_s: Seconds by which it lets later edits pass in line, and no more.
            is_probe: A small edit that only shows that the engine works: it waits for nobody's pixels, goes to the VAE
                first, and is in no figures of edits. It costs the others a step.

        Raises:
            ConfigError: A value is out of range.
            ImageError: The mask does not fit the image.
            EngineFullError: The line is full.
            ClosedError: The engine is closed.
        """
        check_range("n", n, 1, MAX_RESULTS)
        check_range("num_previews", num_previews, 0, MAX_PREVIEWS)
        check_range("seed", request.seed, 0, MAX_SEED - n + 1)
        settings = request.settings
        framing = self._renderer.framing(request.image.size, settings)
        if request.mask is not None:
            check_mask(request.mask, framing)
        num_steps = self._renderer.schedule(settings).num_steps
        rows = len(needed_branches(settings.guidance_scale, settings.image_guidance_scale))
        edit = EditInFlight(
            request=request,
            framing=framing,
            num_images=n,
            num_steps=num_steps,
            rows=rows,
            deadline=deadline,
            is_deterministic=deterministic,
            is_probe=is_probe,
            num_previews=num_previews,
            submitted_at=self._clock(),
        )
        with self._changed:
            if self._is_closed:
                raise ClosedError("the engine is closed")
            if not is_probe and not self._admission.enter(edit, edit.pixels, order=edit.submitted_at + queue_delay_s):
                self._ended["refused"] += 1
                raise EngineFullError(
                    f"{self._admission.num_waiting} edits are waiting; at most {self._max_waiting} may",
                    retry_after_s=self._seconds_left(),
                )
            self._edits.add(edit)
            if is_probe:
                self._start(edit)
            self._admit()
            self._changed.notify_all()  # there may be a nearer deadline
        edit.result.add_done_callback(lambda result: self._end(edit, "cancelled") if result.cancelled() else None)
        return EditHandle(
            result=edit.result,
            events=edit.events,
            progress=lambda: self._progress(edit),
            run=lambda: edit.run,
        )

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        with self._changed:
            return EngineStats(
                **{f"num_{how}": count for how, count in self._ended.items()},
                num_waiting=self._admission.num_waiting,
                num_in_flight=self._admission.num_inside,
                pixels_in_flight=self._admission.pixels,
                work_done=self._work_done,
                work_left=self._work_left(),
                num_denoising=len(self._turns),
                num_steps=self._num_steps,
                mean_batch_size=self._num_stepped / self._num_steps if self._num_steps else 0.0,
                max_batch_rows=self._turns.max_rows,
                num_out_of_memory=self._num_out_of_memory,
                max_steps_after_end=self._max_steps_after_end,
            )

    def recent_batches(self) -> list[tuple[Hashable, ...]]:
        """What shared each of the last 1000 steps: one key per sample, oldest step first."""
        with self._changed:
            return list(self._batches)

    def is_alive(self) -> bool:
        """Whether edits submitted now will be worked on."""
        return not self._is_closed and self._stepper.is_alive() and self._codec.is_alive()

    def close(self) -> None:
        """Lets the running step and the VAE's running work end, fails every edit that is not done, ends the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._fail_all(ClosedError("the engine was closed before the edit was done"))
        self._stepper.join()
        self._codec.close()

    # ---- bookkeeping; callers of those marked (locked) hold the lock

    def _progress(self, edit: EditInFlight) -> EditProgress:
        with self._changed:
            return EditProgress(
                phase=edit.phase,
                position=self._admission.position(edit),
                step=edit.step,
                num_steps=edit.num_steps,
            )

    def _seconds_left(self) -> float:
        """Until all that was accepted is done, going by recent steps; 1 before the first (locked)."""
        if self._seconds_per_pixel is None:
            return 1.0
        return self._seconds_per_pixel * self._work_left()

    def _work_left(self) -> int:
        """(locked)."""
        return sum(edit.pixels * (edit.num_steps - edit.step) for edit in self._edits if not edit.is_probe)

    def _admit(self) -> None:
        """Sends those whom there is room for to the VAE (locked)."""
        for edit in self._admission.admit():
            self._start(edit)

    def _start(self, edit: EditInFlight) -> None:
        """(locked)."""
        edit.phase, edit.admitted_at = "encoding", self._clock()
        edit.events.put(Started())
        self._code(_ENCODE, edit, self._encode, edit)

    def _end(self, edit: EditInFlight, phase: Phase, error: BaseException | None = None) -> None:
        """Frees all that the edit holds, then tells its caller; nothing where it has ended already."""
        with self._changed:
            if edit not in self._edits:
                return
            self._edits.remove(edit)
            self._admission.leave(edit)
            for sample in edit.samples:
                self._turns.leave(sample)
            images = [edit.images[i] for i in sorted(edit.images)]
            edit.phase, edit.ended_at = phase, self._clock()
            edit.prepared, edit.samples, edit.images = None, [], {}
            if not edit.is_probe:
                self._ended["overdue" if isinstance(error, DeadlineError) else phase] += 1
            if not self._is_closed:
                self._admit()
            self._changed.notify_all()
        edit.tell(images, error)  # outside the lock: callbacks of the future are not ours

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            edits = list(self._edits)
        for edit in edits:
            self._end(edit, "failed", error)

    # ---- the thread that owns the denoiser

    def _step_for_ever(self) -> None:
        try:
            with self._as_worker(has_stream=False):
                while (batch := self._next_batch()) is not None:
                    self._step(batch)
                    del batch  # or it would keep its samples while there are no others
        finally:  # also when a bug or a lost device ends it: nobody may wait for ever
            self._is_closed = True
            self._fail_all(ClosedError("the engine's thread has ended"))

    def _next_batch(self) -> list[SampleInFlight] | None:
        """Waits for samples to advance; None once the engine is closed."""
        while True:
            with self._changed:
                now = self._clock()
                overdue = [edit for edit in self._edits if edit.deadline is not None and edit.deadline <= now]
                if not overdue:
                    if self._is_closed:
                        return None
                    batch = self._turns.next()
                    if batch:
                        self._begin(batch)
                        return batch
                    nearest = min((edit.deadline for edit in self._edits if edit.deadline is not None), default=None)
                    self._changed.wait(None if nearest is None else min(nearest - now, threading.TIMEOUT_MAX))
            for edit in overdue:
                late_s = now - edit.submitted_at
                self._end(
                    edit, "failed", DeadlineError(f"the edit was not done within {late_s:.1f} s; it was given up")
                )

    def _begin(self, batch: Sequence[SampleInFlight]) -> None:
        """Notes who takes the first step now (locked)."""
        for edit in {sample.edit for sample in batch if sample.edit.first_step_at is None}:
            edit.first_step_at = self._clock()
            edit.join_steps = self._num_begun - edit.ready_at_step
        self._num_begun += 1

    def _step(self, batch: list[SampleInFlight]) -> None:
        """Advances the samples, in smaller batches where they fail together."""
        batch = [sample for sample in batch if not sample.edit.has_ended]
        if not batch:
            return
        started_at = self._clock()
        failure: Exception | None = None
        try:
            denoise_step(self._renderer.denoiser, [sample.state for sample in batch])
        except Exception as error:  # noqa: BLE001  whatever a model raises; the caller of the guilty edit gets it
            failure = error
        if failure is None:
            self._synchronize()  # an error that comes up only here has lost the device: it ends the engine
            step = StepDone(seconds=self._clock() - started_at, rows=sum(sample.edit.rows for sample in batch))
            self._stepped(batch, step.seconds)
            if self._on_step is not None:
                self._on_step(step)
            return
        has_no_room = self._free_memory(failure)
        if len(batch) == 1:
            self._end(batch[0].edit, "failed", failure)
            return
        parts = [[sample] for sample in batch]
        if has_no_room:
            half = (len(batch) + 1) // 2
            parts = [batch[:half], batch[half:]]
            with self._changed:
                rows = sum(sample.edit.rows for sample in batch)
                self._turns.max_rows = max(1, min(self._turns.max_rows, rows // 2))
                self._num_full_steps = 0
        failure = None
        for part in parts:
            self._step(part)

    def _free_memory(self, failure: Exception) -> bool:
        """Lets go of what a failed call holds and the device keeps, if it failed for want of memory; says whether so."""
        if not isinstance(failure, torch.OutOfMemoryError | MemoryError):
            return False
        traceback.clear_frames(failure.__traceback__)  # they hold the tensors that there was no room for
        with self._changed:
            self._num_out_of_memory += 1
        if self._renderer.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _stepped(self, batch: Sequence[SampleInFlight], seconds: float) -> None:
        """Notes a step that was done; whoever has done its last goes on to the VAE."""
        with self._changed:
            self._num_steps += 1
            self._num_stepped += len(batch)
            self._batches.append(tuple(sample.key for sample in batch))
            self._grow_back(batch)
            work = sum(sample.edit.image_cost for sample in batch)
            self._work_done += sum(sample.edit.image_cost for sample in batch if not sample.edit.is_probe)
            rate = seconds / work
            old = self._seconds_per_pixel
            self._seconds_per_pixel = rate if old is None else old + _RATE_WEIGHT * (rate - old)
            edits = dict.fromkeys(sample.edit for sample in batch)
            for edit in edits:
                edit.batch_sizes.append(len(batch))
                if edit.has_ended:
                    edit.steps_after_end += 1
                    self._max_steps_after_end = max(self._max_steps_after_end, edit.steps_after_end)
                else:
                    edit.events.put(Stepped(step=edit.step, num_steps=edit.num_steps))
            for sample in batch:
                if sample.edit.has_ended:
                    continue
                if sample.state.is_done:
                    self._leave_steps(sample)
                elif sample.index == 0 and sample.state.step in sample.edit.preview_steps:
                    self._want_preview(sample)

    def _grow_back(self, batch: Sequence[SampleInFlight]) -> None:
        """Lets batches that had to shrink grow by a row when many as large as allowed went well (locked)."""
        allowed = self._turns.max_rows
        is_full = sum(sample.edit.rows for sample in batch) + batch[0].edit.rows > allowed
        if is_full and allowed < self._most_rows:
            self._num_full_steps += 1
            if self._num_full_steps >= _GROW_AFTER:
                self._turns.max_rows, self._num_full_steps = allowed + 1, 0

    def _leave_steps(self, sample: SampleInFlight) -> None:
        """(locked)."""
        edit = sample.edit
        self._turns.leave(sample)
        if all(other.state.is_done for other in edit.samples):
            edit.phase, edit.denoised_at = "decoding", self._clock()
        self._code(_DECODE, edit, self._decode, sample)

    def _want_preview(self, sample: SampleInFlight) -> None:
        """(locked)."""
        step, clean = sample.state.step, sample.state.predicted_x0  # replaced by later steps, never written into
        assert clean is not None
        self._code(_PREVIEW, sample.edit, self._preview, sample.edit, step, clean)

    # ---- the threads of the VAE

    def _code(self, priority: int, edit: EditInFlight, work: Callable[..., None], *args: Any) -> None:
        """Has work done for an edit unless it ends before; an exception fails that edit."""

        def run() -> None:
            if edit.has_ended:
                return
            failure = self._try(work, *args)
            if failure is not None and self._free_memory(failure):  # an edit that has done its steps is not given up
                failure = self._try(work, *args)
            if failure is not None:
                self._end(edit, "failed", failure)

        self._codec.put(_URGENT if edit.is_probe else priority, run)

    @staticmethod
    def _try(work: Callable[..., None], *args: Any) -> Exception | None:
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001  as for a step
            return error
        return None

    def _encode(self, edit: EditInFlight) -> None:
        prepared = self._renderer.prepare(edit.request, edit.framing)
        samples = [
            SampleInFlight(edit=edit, index=i, state=self._renderer.start(prepared, edit.request.seed + i))
            for i in range(edit.num_images)
        ]
        self._synchronize()
        with self._changed:
            if edit.has_ended:
                return
            edit.prepared, edit.samples = prepared, samples
            edit.phase, edit.ready_at, edit.ready_at_step = "denoising", self._clock(), self._num_begun
            for sample in samples:
                self._turns.join(sample, key=sample.key, rows=edit.rows, cost=edit.image_cost)
            self._changed.notify_all()

    def _decode(self, sample: SampleInFlight) -> None:
        edit, prepared = sample.edit, sample.edit.prepared
        if prepared is None:  # it has ended just now
            return
        image = self._renderer.finish(prepared, sample.state.latents)
        with self._changed:
            edit.images[sample.index] = image
            is_last = len(edit.images) == edit.num_images
        if is_last:
            self._end(edit, "done")

    def _preview(self, edit: EditInFlight, step: int, clean: Tensor) -> None:
        prepared = edit.prepared
        if edit.phase != "denoising" or prepared is None:  # the result itself comes next
            return
        image = self._renderer.preview(prepared, clean, is_cheap=2 * step < edit.num_steps)
        number = edit.preview_steps.index(step)
        edit.events.put(Previewed(image=image, number=number, step=step))

    # ---- device

    @contextlib.contextmanager
    def _as_worker(self, *, has_stream: bool) -> Iterator[None]:
        """What a thread that runs the model needs: these settings of torch are per thread."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        device = self._renderer.device
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
                if has_stream:
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            yield

    def _synchronize(self) -> None:
        """Waits for what this thread has put on the device."""
        if self._renderer.device.type == "cuda":
            torch.cuda.current_stream(self._renderer.device).synchronize()
