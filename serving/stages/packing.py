"""Conditions as records that travel: tensors become bytes, so that the ingress, which only passes them on, needs no torch."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mgie.inference.conditioner import EditCondition
from mgie.inference.words import DerivedWords
from serving.stages.batcher import BatchRun
from serving.stages.messages import Derived, PackedTensor


def pack(condition: EditCondition, *, replica: str, run: BatchRun | None) -> Derived:
    """What the MLLM stage hands on of a condition."""
    return Derived(
        **_words(condition),
        condition=_packed(condition.condition),
        null_condition=_packed(condition.null_condition),
        replica=replica,
        run=run,
    )


def unpack(derived: Derived) -> EditCondition:
    """The condition that was packed, on the CPU, bit by bit."""
    return EditCondition(
        **_words(derived),
        condition=_unpacked(derived.condition),
        null_condition=_unpacked(derived.null_condition),
    )


def _words(one: DerivedWords) -> dict[str, Any]:
    return {each.name: getattr(one, each.name) for each in fields(DerivedWords)}


def _packed(tensor: Tensor) -> PackedTensor:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return PackedTensor(data=data, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _unpacked(packed: PackedTensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, packed.dtype)
    return torch.frombuffer(bytearray(packed.data), dtype=dtype).reshape(packed.shape)
