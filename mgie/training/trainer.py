"""The training loop: steps over a global batch, exact resuming, validation; on one worker or as one of many.

A step is a function of its samples: their order, noise, timesteps and dropout follow from (seed, epoch, id), and
gradients are sums over the global batch, so the number of workers and of micro-batches changes no more than the
rounding. Nothing in a step makes the host wait for the device: what is measured is read one step later.

Knows nothing of files, stores or Ray: the caller gives it batches and is told what happened.

Axes: M micro-batches of a step on this worker.
"""

import dataclasses
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgie.config import ComputeDtype, TrainingConfig
from mgie.data.collate import to_device
from mgie.data.loader import MicroBatch, StepLoader, StepWork
from mgie.errors import ConfigError, TrainingError
from mgie.model.loss import Losses
from mgie.model.mgie import LatentDiffusion
from mgie.training.distributed import Parallel, Sharded, all_gather, all_reduce_sum, parallelize
from mgie.training.optimizer import Optimization

# Dense bfloat16 operations per second, by how the device's name begins (sources: the makers' data sheets).
_PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12}
_SHOWN_IDS = 8


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is known of a step, over all workers. Rates are those of this step."""

    step: int
    "steps done, from 1"
    loss: float
    instruction: float
    "L_ins: mean negative log-likelihood of the label tokens"
    edit: float
    "L_edit: mean squared error of what the UNet predicts"
    grad_norm: float
    "before clipping"
    is_finite: bool
    "false: the step was skipped"
    learning_rates: Mapping[str, float]
    samples_per_s: float
    tokens_per_s: float
    wait_share: float
    "share of the time in which this worker waited for data"
    step_s: float
    memory_bytes: int
    "most that was ever in use: of the GPU, else of this process"
    flops_utilisation: float | None
    "operations of the first step, recomputed ones included, at this step's speed: share of the device's bfloat16 peak"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """All that a run needs to go on as if nothing had happened."""

    step: int
    num_skipped: int
    "steps whose loss or gradient was not finite"
    num_skipped_in_row: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    losses: Tensor  # [5] instruction, edit, total, gradient norm, is_finite
    micro_is_finite: Tensor  # [M]
    work: StepWork
    rates: Mapping[str, float]
    num_tokens: Tensor
    event: Any


class Trainer:
    """Trains a model; one per worker.

    Args:
        model: On its device, with the right parts frozen.
        loader: This worker's share of the steps.
        on_step: Told each step, in order, soon after it.

    Raises:
        ConfigError: Sharded weights, and the workers have different numbers of micro-batches.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: TrainingConfig,
        loader: StepLoader,
        *,
        on_step: Callable[[StepRecord], None],
    ) -> None:
        model.train()
        self.model = model
        self.parallel: Parallel = parallelize(model, config.sharding)
        if isinstance(self.parallel, Sharded) and not loader.is_even:
            raise ConfigError(
                f"global_batch is {config.global_batch}; with sharded weights its micro-batches of {config.micro_batch} "
                f"must be dealt out evenly to {self.parallel.world_size} workers",
                param="global_batch",
            )
        self.optimization = Optimization(model, config.optimizer, num_steps=config.steps)
        self._config, self._loader, self._on_step = config, loader, on_step
        self._device = model.vae.autoencoder.device
        self._pending: deque[_Pending] = deque()
        self._flops_per_sample: float | None = None
        self.step = 0
        "steps done"
        self._num_skipped = self._num_skipped_in_row = 0
        self._told_at = time.perf_counter()

    def run(self, until: int) -> Iterator[int]:
        """Trains up to `until` steps done; yields after each, when it may be validated or saved.

        Raises:
            TrainingError: Too many steps in a row were not finite.
            DataError: A row cannot be read.
        """
        self._told_at = time.perf_counter()
        for work in self._loader.steps(self.step, until):
            self._train(work)
            # One step is left on a GPU, so that reading its numbers does not wait for it.
            self._tell(keep=1 if self._device.type == "cuda" else 0)
            yielded_at = time.perf_counter()
            yield self.step
            self._told_at += time.perf_counter() - yielded_at  # what the caller did meanwhile belongs to no step
        self._tell(keep=0)

    def _train(self, work: StepWork) -> None:
        counts = torch.tensor(
            [sum(m.num_label_tokens for m in work.micro_batches), sum(m.num_tokens for m in work.micro_batches)]
        )
        counts = all_reduce_sum(to_device(counts, self._device))
        with self._counting_flops(work):
            sums, micro_is_finite = accumulate_gradients(
                self.parallel,
                work.micro_batches,
                device=self._device,
                dtype=self._config.dtype,
                num_label_tokens=counts[0],
                num_samples=self._config.global_batch,
            )
        instruction, edit, total = all_reduce_sum(sums)
        # Scaled here and not in the loss, so that no rounding of the backward pass depends on the number of workers.
        result = self.optimization.update(work.step, total, gradient_scale=self.parallel.world_size)
        values = torch.stack([instruction, edit, total, *(v.to(total) for v in (result.grad_norm, result.is_finite))])
        event = None
        if self._device.type == "cuda":
            values, micro_is_finite, counts = (
                torch.empty_like(v, device="cpu", pin_memory=True).copy_(v, non_blocking=True)
                for v in (values, micro_is_finite, counts)
            )
            event = torch.cuda.Event()
            event.record()
        self._pending.append(
            _Pending(
                step=work.step,
                losses=values,
                micro_is_finite=micro_is_finite,
                work=work,
                rates=self.optimization.learning_rates(work.step),
                num_tokens=counts[1],
                event=event,
            )
        )
        self.step = work.step + 1

    def _tell(self, *, keep: int) -> None:
        """Tells of all steps but the last `keep`."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.event is not None:
                pending.event.synchronize()
            instruction, edit, total, norm, is_finite = pending.losses.tolist()
            # From one step's numbers to the next one's: on a GPU the host's own time says nothing.
            now = time.perf_counter()
            seconds, self._told_at = now - self._told_at, now
            self._on_step(
                StepRecord(
                    step=pending.step + 1,
                    loss=total,
                    instruction=instruction,
                    edit=edit,
                    grad_norm=norm,
                    is_finite=bool(is_finite),
                    learning_rates=pending.rates,
                    samples_per_s=self._config.global_batch / seconds,
                    tokens_per_s=int(pending.num_tokens) / seconds,
                    wait_share=min(1.0, pending.work.wait_s / seconds),
                    step_s=seconds,
                    memory_bytes=memory_bytes(self._device),
                    flops_utilisation=self._utilisation(seconds),
                )
            )
            self._judge(pending, is_finite=bool(is_finite))

    def _judge(self, pending: _Pending, *, is_finite: bool) -> None:
        """Counts skipped steps. All workers see the same, so all get here or none."""
        if is_finite:
            self._num_skipped_in_row = 0
            return
        self._num_skipped += 1
        self._num_skipped_in_row += 1
        if self._num_skipped_in_row < self._config.max_skipped:
            return
        micro_batches = pending.work.micro_batches
        flags = pending.micro_is_finite.tolist()
        bad = [m.ids for m, is_good in zip(micro_batches, flags, strict=True) if not is_good]
        found = [i for ids in all_gather(bad) for part in ids for i in part]
        suspects = found or [i for ids in all_gather([m.ids for m in micro_batches]) for part in ids for i in part]
        shown = ", ".join(map(str, suspects[:_SHOWN_IDS])) + ", ..." * (len(suspects) > _SHOWN_IDS)
        raise TrainingError(
            f"{self._num_skipped_in_row} steps in a row were not finite, the last is step {pending.step + 1}; "
            f"samples with such a {'loss' if found else 'gradient, among'}: {shown}. "
            "Lower the learning rates, or look at these rows"
        )

    @contextmanager
    def _counting_flops(self, work: StepWork) -> Iterator[None]:
        """Counts the first step's operations on a GPU; they are taken for those of every step."""
        if self._flops_per_sample is not None or self._peak() is None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops_per_sample = counter.get_total_flops() / sum(m.num_samples for m in work.micro_batches)

    def _peak(self) -> float | None:
        if self._device.type != "cuda" or self._config.dtype != "bfloat16":
            return None
        name = torch.cuda.get_device_name(self._device)
        return next((peak for start, peak in _PEAK_FLOPS.items() if name.startswith(start)), None)

    def _utilisation(self, seconds: float) -> float | None:
        peak = self._peak()
        if peak is None or self._flops_per_sample is None:
            return None
        own_samples = self._config.global_batch / self.parallel.world_size
        return self._flops_per_sample * own_samples / seconds / peak

    # ---- validation

    @torch.no_grad()
    def validate(self, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Mean losses over this and the other workers' micro-batches, of the averaged weights where there are any."""
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        with self.averaged_weights():
            for micro in micro_batches:
                with compute_in(self._config.dtype, self._device):
                    losses = self._forward(micro)
                counts = torch.tensor([micro.num_label_tokens, micro.num_samples], dtype=torch.float64)
                counts = to_device(counts, self._device)
                sums += torch.cat([torch.stack([losses.instruction, losses.edit]) * counts, counts])
        instruction, edit, num_label_tokens, num_samples = all_reduce_sum(sums).tolist()
        means = {"instruction": instruction / max(num_label_tokens, 1), "edit": edit / max(num_samples, 1)}
        objective = self._config.objective
        weight = objective.edit_weight if num_label_tokens else 1.0
        return {"loss": objective.instruction_weight * means["instruction"] + weight * means["edit"], **means}

    def _forward(self, micro: MicroBatch) -> Losses:
        losses: Losses = self.model(to_device(micro.batch, self._device), to_device(micro.draws, self._device))
        return losses

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights, where there are any, and does not train; afterwards all is as before."""
        self.model.eval()
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self.model.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.optimization.average.items():
            parameter = self.optimization.parameters[name]
            kept = average.clone()
            average.copy_(parameter)
            parameter.copy_(kept)
        if isinstance(self.parallel, Sharded):
            self.parallel.drop_gathered()

    # ---- state

    def state(self) -> TrainerState:
        """Where the run stands. All workers must call it; rank 0's has the weights."""
        self._tell(keep=0)
        state = TrainerState(step=self.step, num_skipped=self._num_skipped, num_skipped_in_row=self._num_skipped_in_row)
        if self.parallel.rank and not isinstance(self.parallel, Sharded):
            return state
        optimization, is_first = self.optimization, self.parallel.rank == 0
        return dataclasses.replace(
            state,
            weights=optimization.weights(keep=is_first),
            average=optimization.average_weights(keep=is_first),
            moments=optimization.moments(keep=is_first),
        )

    def restore(self, state: TrainerState) -> None:
        """Goes on from there.

        Raises:
            DataError: It is the state of another model.
        """
        self.optimization.restore(state.weights, state.average, state.moments)
        self.step, self._num_skipped = state.step, state.num_skipped
        self._num_skipped_in_row = state.num_skipped_in_row


def accumulate_gradients(
    parallel: Parallel,
    micro_batches: Sequence[MicroBatch],
    *,
    device: torch.device,
    dtype: ComputeDtype,
    num_label_tokens: Tensor | int,
    num_samples: int,
) -> tuple[Float[Tensor, "3"], Float[Tensor, " M"]]:
    """Adds a step's gradients to the parameters; with the last micro-batch they become the workers' mean.

    Args:
        num_label_tokens, num_samples: Of the global batch: what the losses are means over.

    Returns:
        This worker's parts of L_ins, L_edit and the loss; and which micro-batches had a finite loss (1 or 0).
    """
    parts = []
    for i, micro in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        with parallel.accumulating(is_last=is_last), trainable_attention(device):
            batch, draws = to_device(micro.batch, device), to_device(micro.draws, device)
            with compute_in(dtype, device):
                losses: Losses = parallel.model(
                    batch, draws, num_label_tokens=num_label_tokens, num_samples=num_samples
                )
            losses.total.backward()
        parts.append(torch.stack([losses.instruction, losses.edit, losses.total]).detach())
    stacked = torch.stack(parts)
    return stacked.sum(0), torch.isfinite(stacked[:, 2]).to(stacked.dtype)


@contextmanager
def compute_in(dtype: ComputeDtype, device: torch.device) -> Iterator[None]:
    """Autocast where that dtype is not the weights' own."""
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def trainable_attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention that trains fastest, for forward and backward pass (blocks may be recomputed in the latter)."""
    # The backward pass of the fused kernel is slow on CPUs: with the plain one an LLM's step takes 0.6 of the time.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def memory_bytes(device: torch.device) -> int:
    """Most memory that was ever in use: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
