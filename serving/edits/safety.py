"""The operator's own check of what may be edited and shown: a function of theirs, named in the settings.

It sees every photo before anything is derived from it, and every picture before it leaves the service, those on their
way included. Where the check itself fails the edit fails: nothing passes unchecked. Knows nothing of HTTP.
"""

import asyncio
import contextlib
import importlib
import re
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Literal, Protocol

from PIL import Image

from mgie.config import ImageLimits
from mgie.errors import ConfigError
from mgie.images.files import read_image
from serving.edits.backend import EditBackend, EditEvent, EditOutcome, ServiceStats
from serving.edits.call import EditCall
from serving.errors import ContentPolicyError, SafetyCheckError
from serving.stages.messages import BundleInfo, Partial

Where = Literal["input", "output"]


class SafetyCheck(Protocol):
    """What an operator provides. Called on threads, several at a time."""

    def __call__(self, picture: Image.Image, instruction: str, *, where: Where) -> str | None:
        """None if the picture may be edited by the instruction, or shown as its result; else why not, for the user."""
        ...


def load_check(name: str) -> SafetyCheck:
    """The function of `module:function`.

    Raises:
        ConfigError: It cannot be imported, or is none.
    """
    allowed = "it must be module:function, importable wherever the service runs"
    if re.fullmatch(r"[\w.]+:\w+", name) is None:
        raise ConfigError(f"safety_check is {name!r}; {allowed}", param="safety_check")
    module, _, function = name.partition(":")
    try:
        check: SafetyCheck = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"safety_check is {name!r}: {error}; {allowed}", param="safety_check") from error
    if not callable(check):
        raise ConfigError(f"safety_check is {name!r}, which cannot be called; {allowed}", param="safety_check")
    return check


class CheckedBackend:
    """An `EditBackend` that asks the operator's check before and after another.

    Args:
        backend: What edits.
        check: The operator's.
        limits: Of the photo.
    """

    def __init__(self, backend: EditBackend, check: SafetyCheck, *, limits: ImageLimits) -> None:
        self._backend, self._check = backend, check
        self._limits = replace(limits, max_bytes=sys.maxsize)  # the ingress has counted an upload's

    async def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        """See `EditBackend`. Raises ContentPolicyError and SafetyCheckError, too."""
        await self._ask(call, call.image, "input")
        async with contextlib.aclosing(self._backend.stream(call, is_watched=is_watched)) as events:
            async for event in events:
                shown = event.rendered.images if isinstance(event, EditOutcome) else ()
                for picture in [event.data] if isinstance(event, Partial) else shown:
                    await self._ask(call, picture, "output")
                yield event

    def check_room(self) -> None:
        """See `EditBackend`."""
        self._backend.check_room()

    async def models(self) -> tuple[BundleInfo, ...]:
        """See `EditBackend`."""
        return await self._backend.models()

    async def check_ready(self) -> None:
        """See `EditBackend`."""
        await self._backend.check_ready()

    async def stats(self) -> ServiceStats:
        """See `EditBackend`."""
        return await self._backend.stats()

    async def _ask(self, call: EditCall, image: bytes, where: Where) -> None:
        # Words that a user puts into the model's mouth are the user's.
        for instruction in (call.options.instruction, call.options.expressive):
            if instruction is not None:
                reason = await asyncio.to_thread(self._reason, image, instruction, where)
                if reason is not None:
                    raise ContentPolicyError(f"the {where} was refused by the safety check: {reason}")

    def _reason(self, image: bytes, instruction: str, where: Where) -> str | None:
        picture = read_image(image, limits=self._limits)
        try:
            reason = self._check(picture, instruction, where=where)
        except Exception as error:  # whatever it is, it is no consent
            raise SafetyCheckError(f"the safety check failed on an {where}: {error!r}") from error
        if reason is not None and not isinstance(reason, str):
            raise SafetyCheckError(f"the safety check returned {type(reason).__name__}; it must be None or text")
        return reason
