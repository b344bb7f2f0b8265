"""An edit on its way through the engine, and its samples: what is known of them, nothing that happens to them."""

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from mgie.engine.handle import EditRun, EventQueue, Phase, last_event
from mgie.images.geometry import Framing
from mgie.inference.renderer import PreparedEdit, RenderRequest
from mgie.model.sampler import SampleState


@dataclass(kw_only=True, eq=False)
class EditInFlight:
    """One edit. Times are the engine's clock's."""

    request: RenderRequest
    framing: Framing
    num_images: int
    num_steps: int
    rows: int
    "rows of the denoiser's batch that an image takes"
    deadline: float | None
    is_deterministic: bool
    is_probe: bool
    "see `Engine.submit`"
    num_previews: int
    submitted_at: float
    result: "Future[list[Image.Image]]" = field(default_factory=Future)
    events: EventQueue = field(default_factory=EventQueue)
    phase: Phase = "waiting"
    prepared: PreparedEdit | None = None
    samples: "list[SampleInFlight]" = field(default_factory=list)
    "its samples, once the source is encoded"
    images: dict[int, Image.Image] = field(default_factory=dict)
    "images decoded so far, by their number"
    batch_sizes: list[int] = field(default_factory=list)
    "batch sizes of the steps that it took part in"
    steps_after_end: int = 0
    ready_at_step: int = 0
    "steps that the engine had begun when it was encoded"
    join_steps: int = 0
    admitted_at: float = 0.0
    ready_at: float = 0.0
    first_step_at: float | None = None
    denoised_at: float = 0.0
    ended_at: float = 0.0

    @property
    def image_cost(self) -> int:
        """Work pixels times rows of one image."""
        width, height = self.framing.work_wh
        return width * height * self.rows

    @property
    def pixels(self) -> int:
        """The same of all its images."""
        return self.image_cost * self.num_images

    @property
    def preview_steps(self) -> list[int]:
        """After which a preview is due: evenly spaced, neither at the start nor at the end."""
        due = {self.num_steps * (i + 1) // (self.num_previews + 1) for i in range(self.num_previews)}
        return sorted(due - {0})

    @property
    def has_ended(self) -> bool:
        """Whether its caller has been told."""
        return self.phase in ("done", "failed", "cancelled")

    @property
    def step(self) -> int:
        """Steps that each image has done."""
        if self.phase in ("decoding", "done"):
            return self.num_steps
        return min((sample.state.step for sample in self.samples), default=0)

    @property
    def run(self) -> EditRun:
        """Figures of an edit that is done."""
        assert self.phase == "done"
        assert self.first_step_at is not None
        return EditRun(
            waiting_s=self.admitted_at - self.submitted_at,
            encode_s=self.ready_at - self.admitted_at,
            join_s=self.first_step_at - self.submitted_at,
            join_steps=self.join_steps,
            denoise_s=self.denoised_at - self.first_step_at,
            decode_s=self.ended_at - self.denoised_at,
            mean_batch_size=sum(self.batch_sizes) / len(self.batch_sizes),
        )

    def tell(self, images: list[Image.Image], error: BaseException | None) -> None:
        """Gives the caller what came of it."""
        if self.result.set_running_or_notify_cancel():  # False: the caller was quicker to cancel
            if error is None:
                self.result.set_result(images)
            else:
                self.result.set_exception(error)
        self.events.put(last_event(self.result))


@dataclass(kw_only=True, eq=False)
class SampleInFlight:
    """One image of an edit."""

    edit: EditInFlight
    index: int
    "among the edit's images"
    state: SampleState

    @property
    def key(self) -> Hashable:
        """Samples with equal keys can share a batch."""
        state = self.state
        shapes = (tuple(state.latents.shape), tuple(state.condition.shape), tuple(state.null_condition.shape))
        return (*shapes, state.condition.dtype, id(self) if self.edit.is_deterministic else None)
