"""Edits as the stages are asked for them."""

from typing import Any

from serving.stages.messages import EditOptions


def ask(instruction: str = "p", expressive: str | None = None, **more: Any) -> EditOptions:
    return EditOptions(instruction=instruction, expressive=expressive, **{"seed": 1} | more)
