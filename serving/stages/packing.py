"""Conditions as records that travel: tensors become bytes, so that the ingress, which only passes them on, needs no torch."""

import torch
from torch import Tensor

from mgie.inference.conditioner import EditCondition
from serving.stages.batcher import BatchRun
from serving.stages.messages import Derived, PackedTensor


def pack(condition: EditCondition, *, replica: str, run: BatchRun | None) -> Derived:
    """What the MLLM stage hands on of a condition."""
    return Derived(
        expressive=condition.expressive,
        used_fallback=condition.used_fallback,
        prompt_tokens=condition.prompt_tokens,
        image_tokens=condition.image_tokens,
        output_tokens=condition.output_tokens,
        bundle=condition.bundle,
        condition=_packed(condition.condition),
        null_condition=_packed(condition.null_condition),
        replica=replica,
        run=run,
    )


def unpack(derived: Derived) -> EditCondition:
    """The condition that was packed, on the CPU, bit by bit."""
    return EditCondition(
        expressive=derived.expressive,
        used_fallback=derived.used_fallback,
        prompt_tokens=derived.prompt_tokens,
        image_tokens=derived.image_tokens,
        output_tokens=derived.output_tokens,
        bundle=derived.bundle,
        condition=_unpacked(derived.condition),
        null_condition=_unpacked(derived.null_condition),
    )


def _packed(tensor: Tensor) -> PackedTensor:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return PackedTensor(data=data, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _unpacked(packed: PackedTensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, packed.dtype)
    return torch.frombuffer(bytearray(packed.data), dtype=dtype).reshape(packed.shape)
