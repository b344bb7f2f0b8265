"""How much of the service one key may use, and how large one edit may be.

The cost of an edit is counted in pixel-steps: work pixels of its bundle x denoising steps x results. Knows neither HTTP
nor Ray. Not thread-safe: the event loop of one ingress replica owns it.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mgie.config import MAX_INSTRUCTION_CHARS, MAX_RESULTS, MAX_STEPS
from mgie.errors import DeadlineError
from serving.errors import CancelledEditError, ContentPolicyError, LimitError, RequestError
from serving.schema import EditForm
from serving.stages.messages import BundleInfo

MINUTE_S = 60.0
RETRY_AFTER_S = 1.0  # when an edit of the key's will have ended cannot be told

# After these an edit has used what it had been seen to do. After any other error it gets all back: it failed before its
# first step, or through a fault of ours.
_PAID_ERRORS = (asyncio.CancelledError, GeneratorExit, CancelledEditError, DeadlineError, ContentPolicyError)


Limit = Annotated[int, Field(strict=True, ge=1)] | None


class KeyLimits(BaseModel):
    """What one key may use; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Limit = None
    max_concurrent: Limit = None
    "edits under way whose answer has not ended"
    pixel_steps_per_minute: Limit = None


@dataclass(frozen=True, kw_only=True)
class EditLimits:
    """What anybody may ask of one edit."""

    max_steps: int = MAX_STEPS
    max_n: int = MAX_RESULTS
    max_prompt_chars: int = MAX_INSTRUCTION_CHARS

    def check(self, form: EditForm) -> None:
        """Raises RequestError: the form asks for more."""
        for name, unit, value, most in (
            ("steps", "", form.steps or 0, self.max_steps),
            ("n", "", form.n, self.max_n),
            ("prompt", " characters", len(form.prompt), self.max_prompt_chars),
            ("expressive", " characters", len(form.expressive or ""), self.max_prompt_chars),
        ):
            if value > most:
                raise RequestError(f"{name} is {value}{unit}; this service allows at most {most}", param=name)


def pixel_steps(form: EditForm, bundle: BundleInfo) -> int:
    """Cost of an edit. The sizes that a bundle works at differ by a tenth from its `work_area_px`, which counts."""
    steps: int = bundle.defaults["steps"] if form.steps is None else form.steps
    return bundle.work_area_px * steps * form.n


class TokenBucket:
    """Lets through so much per minute, and a minute's worth at once after a rest.

    What is larger than the bucket passes when it is full, and leaves a debt: so a part of a rate, as each of several
    replicas has it, stops nothing that the whole rate allows.

    Args:
        per_minute: The rate; above 0.
        clock: Seconds.

    Source: the token bucket of RFC 2697, as deficit: the long-run rate is never passed.
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._seen_s = per_minute, clock()

    @property
    def level(self) -> float:
        """What is left; below 0: a debt."""
        now_s = self._clock()
        self._level = min(self.per_minute, self._level + (now_s - self._seen_s) * self.per_minute / MINUTE_S)
        self._seen_s = now_s
        return self._level

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.level) * MINUTE_S / self.per_minute

    def take(self, amount: float) -> float:
        """Takes the amount if there is enough; returns the seconds to wait where not, else 0."""
        missing = min(amount, self.per_minute) - self.level
        if missing > 0:
            return missing * MINUTE_S / self.per_minute
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Returns what was taken and not used."""
        self._level = min(self.per_minute, self.level + amount)


class Charge:
    """What an edit was charged, and how much of it it has used; without a bucket nothing."""

    def __init__(self, bucket: TokenBucket | None = None, cost: int = 0) -> None:
        self._bucket, self.cost = bucket, cost
        self._used = 0.0

    def use(self, share: float = 1.0) -> None:
        """The edit has done this share of its steps, or may have."""
        self._used = share

    def give_back(self) -> None:
        """All of it; more than once changes nothing."""
        self._return(self.cost)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Around the edit: what it was charged and has not used when it fails is given back."""
        try:
            yield
        except _PAID_ERRORS:
            self._return(self.cost * (1 - self._used))
            raise
        except BaseException:
            self.give_back()
            raise

    def _return(self, amount: float) -> None:
        if self._bucket is not None:
            self._bucket.give_back(amount)
            self._bucket = None


class Allowance:
    """What one key has left in this replica.

    Args:
        limits: Limits of the key.
        num_sharing: Ingress replicas: each allows its part of a rate, for they do not talk to each other.
        clock: Seconds.
    """

    def __init__(self, limits: KeyLimits, *, num_sharing: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_sharing, self._clock = num_sharing, clock
        self._limits = KeyLimits()
        self._num_edits = 0
        self.requests: TokenBucket | None = None
        self._cost: TokenBucket | None = None
        self.limit(limits)

    def limit(self, limits: KeyLimits) -> None:
        """Sets the limits; a rate that is another now begins with a full bucket."""
        if limits.requests_per_minute != self._limits.requests_per_minute:
            self.requests = self._bucket(limits.requests_per_minute)
        if limits.pixel_steps_per_minute != self._limits.pixel_steps_per_minute:
            self._cost = self._bucket(limits.pixel_steps_per_minute)
        self._limits = limits

    def request(self) -> None:
        """Counts a request. Raises LimitError: there were too many."""
        wait_s = self.requests.take(1) if self.requests is not None else 0.0
        if wait_s:
            raise LimitError(
                f"this key may send {self._limits.requests_per_minute} requests a minute; try again in {wait_s:.1f} s",
                code="rate_limited",
                retry_after_s=wait_s,
            )

    @contextlib.contextmanager
    def edit(self) -> Iterator[None]:
        """Holds a place for an edit. Raises LimitError: too many of the key's are under way."""
        most = self._limits.max_concurrent
        # Rounded up: a key may have one edit under way wherever it asks.
        if most is not None and self._num_edits >= math.ceil(most / self._num_sharing):
            raise LimitError(
                f"this key may have {most} edits under way at a time; wait until one has ended",
                code="too_many_concurrent",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_edits += 1
        try:
            yield
        finally:
            self._num_edits -= 1

    def charge(self, cost: int) -> Charge:
        """Charges an edit its cost.

        Raises:
            RequestError: The key may never use so much. LimitError: not now.
        """
        most = self._limits.pixel_steps_per_minute
        if most is not None and cost > most:
            raise RequestError(
                f"the edit costs {cost} pixel-steps (pixels worked at x steps x n); this key may use at most {most} a "
                "minute: ask for fewer steps or a smaller n",
                code="cost_too_high",
            )
        wait_s = self._cost.take(cost) if self._cost is not None else 0.0
        if wait_s:
            raise LimitError(
                f"the edit costs {cost} pixel-steps, and this key may use {most} a minute; try again in {wait_s:.1f} s",
                code="cost_limited",
                retry_after_s=wait_s,
            )
        return Charge(self._cost, cost)

    def _bucket(self, per_minute: int | None) -> TokenBucket | None:
        return None if per_minute is None else TokenBucket(per_minute / self._num_sharing, clock=self._clock)
