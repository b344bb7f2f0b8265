"""The operator's own check of what may be edited and shown: a function of theirs, named in the settings.

It sees every photo before anything is derived from it, and every picture before it leaves the service, those on their
way included. Where the check itself fails the edit fails: nothing passes unchecked. Knows nothing of HTTP.
"""

import asyncio
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, Protocol

from PIL import Image

from mgie.config import ImageLimits
from mgie.errors import ConfigError
from mgie.images.files import read_image
from serving.errors import ContentPolicyError, SafetyCheckError
from serving.stages.messages import EditOptions

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


class SafetyGate:
    """Asks the operator's check.

    Args:
        check: The operator's; None: all passes.
        limits: Limits of a photo.
    """

    def __init__(self, check: SafetyCheck | None, *, limits: ImageLimits) -> None:
        self._check = check
        self._limits = replace(limits, max_bytes=sys.maxsize)  # the ingress has counted an upload's

    async def ask(self, options: EditOptions, pictures: Sequence[bytes], where: Where) -> None:
        """Returns if the pictures of an edit may pass.

        Raises:
            ContentPolicyError: They may not. SafetyCheckError: That cannot be told.
        """
        if self._check is None:
            return
        # Words that a user puts into the model's mouth are the user's.
        words = [text for text in (options.instruction, options.expressive) if text is not None]
        for picture, text in product(pictures, words):
            reason = await asyncio.to_thread(self._reason, self._check, picture, text, where)
            if reason is not None:
                raise ContentPolicyError(f"the {where} was refused by the safety check: {reason}")

    def _reason(self, check: SafetyCheck, image: bytes, instruction: str, where: Where) -> str | None:
        picture = read_image(image, limits=self._limits)
        try:
            reason = check(picture, instruction, where=where)
        except Exception as error:  # whatever it is, it is no consent
            raise SafetyCheckError(f"the safety check failed on an {where}: {error!r}") from error
        if reason is not None and not isinstance(reason, str):
            raise SafetyCheckError(f"the safety check returned {type(reason).__name__}; it must be None or text")
        return reason
