"""One model on several workers: replicated (DDP) or with its trained weights sharded (fully_shard).

Both average gradients over the workers; callers whose losses are *parts of* a global mean multiply the gradients by
`world_size`. Without a process group there is one worker, and nothing is wrapped. Knows nothing of batches.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mgie.config import Sharding

Value = TypeVar("Value")


@runtime_checkable
class Parallel(Protocol):
    """The workers of a run, seen from one of them."""

    rank: int
    world_size: int
    model: nn.Module
    "call this one, so that gradients are exchanged"

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one of several micro-batches: only the last exchanges gradients."""
        ...


class Alone:
    """One worker."""

    rank, world_size = 0, 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002  # the Protocol's
        """See `Parallel`: nothing to do."""
        return contextlib.nullcontext()


class Replicated:
    """DDP: every worker holds all weights."""

    def __init__(self, model: nn.Module) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        device = next(model.parameters()).device
        with warnings.catch_warnings():
            # `broadcast_buffers` gets another name, which older versions of torch do not know.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                # The frozen weights come from the same bundle everywhere: sending them round would cost minutes at 7B.
                init_sync=False,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Only to keep DDP from regrouping gradients after the first step: gloo's sums depend on the groups, so a
                # resumed run would round its first step otherwise than the undisturbed one. On GPUs speed comes first.
                find_unused_parameters=device.type == "cpu",
            )
        self.model: nn.Module = self._ddp

    @contextlib.contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """See `Parallel`."""
        with contextlib.nullcontext() if is_last else self._ddp.no_sync():
            yield


class Sharded:
    """fully_shard on what trains; what is frozen stays whole on every worker.

    Sharding the frozen LLM too would gather it again for every micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.model = model
        self._shards: list[FSDPModule] = []
        for part in _trained_parts(model):
            fully_shard(part)
            self._shards.append(cast(FSDPModule, part))
        whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        assert not whole, f"{whole[:3]} train, and no part that is sharded holds them"

    @contextlib.contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """See `Parallel`."""
        for shard in self._shards:
            shard.set_requires_gradient_sync(is_last)
        yield

    def drop_gathered(self) -> None:
        """Drops gathered copies; to be called when weights were changed: a forward pass without a backward one leaves gathered copies."""
        for shard in self._shards:
            shard.reshard()


def parallelize(model: nn.Module, sharding: Sharding) -> Parallel:
    """The model on all workers of the process group, if there is one of more than one worker and something trains."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    if not trains or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone(model)
    return Replicated(model) if sharding == "ddp" else Sharded(model)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over the workers, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Value) -> list[Value]:
    """Every worker's value, by rank. The host waits."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """The value of rank 0, on all. The host waits."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _trained_parts(model: nn.Module) -> Sequence[nn.Module]:
    """Modules to shard, inner ones first: blocks of the UNet and of what else trains, then what trains outside of blocks.

    A module's weights are whole only inside its own forward, so a part is something that is called: a block, or a
    layer that holds weights itself.
    """
    unet = cast(Any, model).unet
    parts = [layer for name, layers in model.named_modules() if name.endswith(".layers") for layer in layers.children()]
    parts += [*unet.down_blocks, *unet.up_blocks, *([unet.mid_block] if unet.mid_block is not None else []), unet]
    parts += [model.edit_head] if hasattr(model, "edit_head") else []
    parts = [part for part in parts if any(p.requires_grad for p in part.parameters())]
    in_parts = {p for part in parts for p in part.parameters()}
    rest = (m for m in model.modules() if any(p.requires_grad for p in {*m.parameters(recurse=False)} - in_parts))
    return [*parts, *rest]
