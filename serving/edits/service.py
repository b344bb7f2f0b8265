"""One edit from its checked form to its result: which photo, which model, what size, what is kept, who may end it.

Knows nothing of HTTP.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

from mgie.config import ImageLimits
from mgie.engine.handle import Stepped
from mgie.errors import DeadlineError, ImageTooLargeError
from mgie.images.files import read_image
from serving.access.keys import Caller
from serving.access.limits import Charge, EditLimits, pixel_steps
from serving.deadline import within
from serving.edits.backend import EditBackend, EditEvent, EditOutcome, pictures_of
from serving.edits.call import EditCall, edit_options
from serving.edits.cancellation import Board, RunningEdits, owned_id
from serving.edits.results import ResultStore
from serving.edits.safety import SafetyCheck, SafetyGate
from serving.errors import NotFoundError, RequestError, quoted
from serving.schema import MAX_SIDE_PX, MIN_SIDE_PX, EditForm, Priority
from serving.stages.messages import BundleInfo, Derived
from serving.telemetry.tracing import NO_SPANS, NO_TRACE, Spans, Trace

BATCH_PATIENCE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class AcceptedEdit:
    """An edit that can begin."""

    id: str
    call: EditCall
    bundle: BundleInfo
    base_url: str | None
    "address of this service, where results are to be addresses; None: they are to be the files themselves"
    started_s: float
    "when the request began, by time.monotonic()"
    owner: str = ""
    "name of the API key, if there are any"
    charge: Charge = field(default_factory=Charge)
    "to that key"

    @property
    def owned_id(self) -> str:
        """See `cancellation.owned_id`."""
        return owned_id(self.id, self.owner)

    def in_time(self) -> AbstractAsyncContextManager[None]:
        """Around its work: raises DeadlineError when its time is over."""
        return edit_deadline(self.call.deadline - self.started_s, self.started_s)


@dataclass(frozen=True, kw_only=True)
class DeliveredEdit:
    """An edit that is done, and its results kept if they were to be."""

    outcome: EditOutcome
    urls: Sequence[str] = ()
    "addresses of the results, if they were asked for"
    kept_until: int | None = None
    "Unix time; None: the results were not kept"


def edit_deadline(allowed_s: float, started_s: float) -> AbstractAsyncContextManager[None]:
    """Raises DeadlineError when an edit that began at `started_s`, by `time.monotonic()`, takes longer than allowed."""
    late = DeadlineError(f"the edit took longer than {allowed_s:g} s and was given up")
    return within(started_s + allowed_s - time.monotonic(), late)


class EditService:
    """Takes edits on.

    Args:
        backend: What edits.
        limits: Limits of the photo and of the result.
        kept: Where results are kept.
        board: Reaches the edits of other replicas of the ingress; None: there are none.
        edit_limits: Limits of what one edit may ask for.
        batch_patience_s: So much later an interactive edit may come and still pass a batch edit in line.
        safety_check: The operator's; None: there is none.
        spans: Spans of the edits.
    """

    def __init__(
        self,
        backend: EditBackend,
        *,
        limits: ImageLimits,
        kept: ResultStore,
        board: Board | None = None,
        edit_limits: EditLimits = EditLimits(),  # noqa: B008  frozen
        batch_patience_s: float = BATCH_PATIENCE_S,
        safety_check: SafetyCheck | None = None,
        spans: Spans = NO_SPANS,
    ) -> None:
        self._safety = SafetyGate(safety_check, limits=limits)
        self._backend, self._limits, self._kept = backend, limits, kept
        self._edit_limits, self._batch_patience_s = edit_limits, batch_patience_s
        self._models: tuple[BundleInfo, ...] = ()
        self._spans = spans
        self.running = RunningEdits(board)

    def check_room(self) -> None:
        """Raises EngineFullError if no edit would be taken on now."""
        self._backend.check_room()

    async def models(self) -> tuple[BundleInfo, ...]:
        """The served bundles, asked for once: they change by a roll-out alone, which replaces this replica, too."""
        if not self._models:
            self._models = await self._backend.models()
        return self._models

    async def accept(
        self,
        form: EditForm,
        *,
        edit_id: str,
        base_url: str,
        started_s: float,
        deadline: float,
        caller: Caller | None = None,
        priority: Priority = "interactive",
        trace: Trace = NO_TRACE,
    ) -> AcceptedEdit:
        """What is to be done for a form.

        Args:
            form: What is asked for.
            edit_id: Names the edit from now on.
            base_url: Address of this service, as the client reaches it.
            started_s, deadline: By `time.monotonic()`.
            caller: Whose key is charged; None: nobody's.
            priority: Place in the stages' lines.
            trace: To which the request belongs.

        Raises:
            NotFoundError: There is no such bundle or earlier result.
            RequestError: The size does not fit the photo, or it is more than may be asked for.
            LimitError: The key has not enough left.
            ImageError: The photo cannot be edited; found here only where its size matters.
            MGIEError: The stages or the store are in trouble.
        """
        self._edit_limits.check(form)
        bundle = named_bundle(await self.models(), form.model)
        wants_urls = form.response_format == "url"
        image = await self._source(form, caller.key.name if caller else "")
        options = edit_options(
            form,
            # Not by its name where there is no choice: a roll-out may replace the bundle by one of another name.
            model=bundle.name if len(self._models) > 1 else None,
            output_wh=await self._output_wh(form, image, bundle),
            keeps_lossless=wants_urls or (self._kept.keeps_all if form.keep is None else form.keep),
            queue_delay_s=self._batch_patience_s if priority == "batch" else 0.0,
            trace=trace,
        )
        return AcceptedEdit(
            id=edit_id,
            call=EditCall(image=image, mask=form.mask, options=options, deadline=deadline),
            bundle=bundle,
            base_url=base_url if wants_urls else None,
            started_s=started_s,
            owner=caller.key.name if caller else "",
            # Last: what is refused costs nothing.
            charge=caller.allowance.charge(pixel_steps(form, bundle)) if caller else Charge(),
        )

    async def edit(self, accepted: AcceptedEdit) -> DeliveredEdit:
        """Edits, and keeps what is to be kept. Raises MGIEError: see the table in `api/responses.py`."""
        *_, delivered = [event async for event in self.stream(accepted, is_watched=False)]
        assert isinstance(delivered, DeliveredEdit)
        return delivered

    async def stream(
        self, accepted: AcceptedEdit, *, is_watched: bool = True
    ) -> AsyncGenerator[EditEvent | DeliveredEdit, None]:
        """The same step by step; `DeliveredEdit` is last."""
        with accepted.charge.settled():
            async with contextlib.aclosing(self.events(accepted, is_watched=is_watched)) as events:
                async for event in events:
                    if isinstance(event, Stepped):
                        accepted.charge.use(event.step / event.num_steps)
                    elif not is_watched:  # it may have done all its steps as soon as they may have begun
                        accepted.charge.use()
                    yield await self._delivered(accepted, event) if isinstance(event, EditOutcome) else event

    async def events(self, accepted: AcceptedEdit, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        """The same for who keeps the results in a way of its own: `EditOutcome` is last, and nobody is charged."""
        call = accepted.call
        await self._safety.ask(call.options, [call.image], "input")
        with self._spans.span("edit", call.options.trace) as span:
            call = replace(call, options=replace(call.options, trace=span.trace))
            async with contextlib.aclosing(self._backend.stream(call, is_watched=is_watched)) as events:
                async for event in events:
                    if isinstance(event, Derived) and event.bundle not in {one.identity for one in self._models}:
                        self._models = ()  # this replica asked for them in the middle of a roll-out
                    await self._safety.ask(call.options, pictures_of(event), "output")
                    yield event

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Meanwhile what has expired is deleted, and edits are called off that other replicas are asked to."""
        chores = [asyncio.create_task(chore) for chore in (self.running.listen(), self._kept.sweep())]
        try:
            yield
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.wait(chores)

    async def _source(self, form: EditForm, owner: str) -> bytes:
        if form.image is not None:
            # Here, because the stages also get results that were kept, which are larger files than photos are.
            if len(form.image) > self._limits.max_bytes:
                allowed = f"at most {self._limits.max_bytes} are allowed"
                raise ImageTooLargeError(f"image is {len(form.image)} bytes; {allowed}", param="image")
            return form.image
        assert form.previous is not None  # the form was checked
        return await asyncio.to_thread(self._kept.previous, form.previous, owner=owner)

    async def _output_wh(self, form: EditForm, image: bytes, bundle: BundleInfo) -> tuple[int, int] | None:
        if form.size == "auto":
            return None
        limits = replace(self._limits, max_bytes=sys.maxsize)  # they were counted
        own_wh = (await asyncio.to_thread(read_image, image, limits=limits)).size
        if bundle.defaults["square_crop"] if form.square_crop is None else form.square_crop:
            own_wh = (min(own_wh), min(own_wh))
        width, height = (int(side) for side in form.size.split("x"))
        check_output_size((width, height), own_wh, max_pixels=self._limits.max_pixels, has_mask=form.mask is not None)
        return None if (width, height) == own_wh else (width, height)

    async def _delivered(self, accepted: AcceptedEdit, outcome: EditOutcome) -> DeliveredEdit:
        options = accepted.call.options
        if not options.keeps_lossless:
            return DeliveredEdit(outcome=outcome)
        kept = await asyncio.to_thread(self._kept.keep, accepted.id, options, outcome, owner=accepted.owner)
        base_url = accepted.base_url
        urls = [] if base_url is None else [self._kept.url(file, base_url) for file in kept.files]
        return DeliveredEdit(outcome=outcome, urls=urls, kept_until=kept.expires_s)


def named_bundle(bundles: Sequence[BundleInfo], name: str | None) -> BundleInfo:
    """The one that an edit asks for; without a name the default, which is the first.

    Raises:
        NotFoundError: None has that name.
    """
    for bundle in bundles:
        if name in {None, bundle.name}:
            return bundle
    known = ", ".join(repr(bundle.name) for bundle in bundles)
    raise NotFoundError(f"model is {quoted(name)}; this service has {known}", param="model", code="model_not_found")


def check_output_size(wh: tuple[int, int], own_wh: tuple[int, int], *, max_pixels: int, has_mask: bool) -> None:
    """Whether a result of size `own_wh` may be scaled to `wh`.

    Its aspect ratio must stay: one side must follow from the other within a pixel of rounding. With a mask nothing is
    scaled, since no pixel outside would stay as it is.

    Raises:
        RequestError: It may not; the message has an example that may.
    """
    (width, height), (own_width, own_height) = wh, own_wh
    own = f"{own_width}x{own_height}"
    if width * height > max_pixels:
        raise RequestError(
            f"size is {width}x{height} = {width * height} pixels; at most {max_pixels} are allowed", param="size"
        )
    if has_mask and wh != own_wh:
        message = f"size is {width}x{height}, but with a mask it must be the photo's own, {own}, or auto"
        raise RequestError(message, param="size")
    # |width - height x own_width / own_height| <= 1, or the same with the sides swapped.
    if abs(width * own_height - height * own_width) > max(own_wh):
        fitting = [
            f"{w}x{h}"
            for w, h in (
                (width, round(width * own_height / own_width)),
                (round(height * own_width / own_height), height),
            )
            if min(w, h) >= MIN_SIDE_PX and max(w, h) <= MAX_SIDE_PX and w * h <= max_pixels
        ]
        raise RequestError(
            f"size is {width}x{height}, but the photo is {own} and keeps its aspect ratio: "
            + (f"auto, or e.g. {fitting[0]}" if fitting else "auto"),
            param="size",
        )
