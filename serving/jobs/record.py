"""What a job is, as it lies in the store, and the changes that it may go through.

Pure: a change gives the record as it is afterwards. Whether others have changed it meanwhile is the store's business.
Times are Unix seconds.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter

from serving.edits.call import EditCall
from serving.schema import Priority
from serving.stages.messages import EditOptions

CLOCK_SKEW_S = 2.0  # by which clocks of replicas may differ: a lease that ran out is left alone so much longer

Status = Literal["queued", "deriving", "rendering", "done", "failed", "cancelled"]
Ending = Literal["done", "failed", "cancelled"]

_OPTIONS: TypeAdapter[EditOptions] = TypeAdapter(EditOptions)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Lease(_Record):
    """Who runs a job."""

    holder: str
    "random, of this lease alone"
    until_s: float


class Webhook(_Record):
    """Whom to tell of the end."""

    url: str
    status: Literal["pending", "delivered", "given_up"] = "pending"
    tries: int = 0
    next_s: float = 0.0
    "when the next try is due, unless another has begun"


class JobOrder(_Record):
    """What is to be done; never changes."""

    call: dict[str, JsonValue]
    "fields of EditOptions; the seed is among them, so that every run gives the same"
    image: str
    "id of the artifact with the photo"
    mask: str | None
    base_url: str
    "address of the service, as the client reached it"
    wants_urls: bool
    "in the result, instead of the files themselves"
    owner: str
    "name of the API key; empty: none"
    priority: Priority
    created_s: float
    ends_s: float
    "when it is given up"

    def edit_call(self, *, image: bytes, mask: bytes | None, deadline: float) -> EditCall:
        """The edit; `deadline` is by `time.monotonic()`."""
        return EditCall(image=image, mask=mask, options=_OPTIONS.validate_python(self.call), deadline=deadline)


def stored_call(options: EditOptions) -> dict[str, Any]:
    """`JobOrder.call` of an edit."""
    stored: dict[str, Any] = _OPTIONS.dump_python(options, mode="json", by_alias=True)
    return stored


class JobRecord(_Record):
    """A job at one moment."""

    order: JobOrder
    status: Status = "queued"
    step: int = 0
    num_steps: int | None = None
    "None: not known yet"
    lease: Lease | None = None
    "None: nobody runs it"
    attempts: int = 0
    "times that it was begun"
    failures: int = 0
    "leases that ran out, and failures without a known reason"
    not_before_s: float = 0.0
    "when it may be tried again"
    started_s: float | None = None
    "when it was begun last"
    ended_s: float | None = None
    result: dict[str, JsonValue] | None = None
    "the answer, with ids of artifacts in place of addresses or files"
    results: list[str] = []
    "ids of the lossless results, if they are kept for `previous`; its name is known to ResultStore"
    error: dict[str, JsonValue] | None = None
    "in the form of the API"
    webhook: Webhook | None = None

    @property
    def has_ended(self) -> bool:
        """Nothing but the delivery of its webhook can change any more."""
        return self.ended_s is not None

    def due_s(self) -> float:
        """When somebody may claim it, or end it as overdue, at the earliest."""
        if self.lease is not None:
            return self.lease.until_s + CLOCK_SKEW_S
        return min(self.not_before_s, self.order.ends_s)

    def claimed(self, lease: Lease, *, now_s: float) -> Self:
        """Begun by the holder of a lease."""
        return self.model_copy(
            update={
                "status": "deriving",
                "step": 0,
                "num_steps": None,
                "lease": lease,
                "attempts": self.attempts + 1,
                "failures": self.failures + (self.lease is not None),  # one that ran out
                "started_s": now_s,
            }
        )

    def put_back(self, *, not_before_s: float = 0.0, failures: int = 0) -> Self:
        """The job as one to be begun again, by anybody."""
        return self.model_copy(
            update={
                "status": "queued",
                "step": 0,
                "num_steps": None,
                "lease": None,
                "not_before_s": not_before_s,
                "failures": self.failures + failures,
            }
        )

    def ended(self, status: Ending, *, now_s: float, **outcome: Any) -> Self:
        """The job as it will stay; `outcome` is `result` and `results`, or `error`."""
        return self.model_copy(update={"status": status, "lease": None, "ended_s": now_s, **outcome})
