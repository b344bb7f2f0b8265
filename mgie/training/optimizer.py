"""What a training step does to the weights: AdamW by groups, learning rates, clipping, moving average, skipping.

Nothing here makes the host wait for the device: whether a step is skipped is decided where the gradients are. Knows
nothing of losses, data or files. All state can be taken out and put back by parameter name.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mgie.config import OptimizerConfig
from mgie.errors import DataError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_LLM_PARTS = ("mllm.llm.model.layers.", "mllm.llm.model.norm.")


@dataclass(frozen=True)
class UpdateResult:
    """Scalars on the device."""

    grad_norm: Float[Tensor, ""]
    "norm of all gradients together, before clipping"
    is_finite: Float[Tensor, ""]
    "1 where the weights were changed, 0 where the step was skipped"


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then cosine to 0."""
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(num_steps - num_warmup, 1)))


class Optimization:
    """Optimiser, schedule and moving average over the trained parameters of a model.

    Args:
        model: Its parameters that require gradients are trained, in the dtype they have (float32 at least).
        num_steps: Steps of the whole run: the schedule ends there.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups: dict[tuple[str, bool], list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault((_part(name), parameter.ndim > 1), []).append(parameter)
        self._adam = torch.optim.AdamW(
            [
                {"params": members, "part": part, "weight_decay": config.weight_decay if is_matrix else 0.0}
                for (part, is_matrix), members in groups.items()
            ]
            or [{"params": []}],  # of a model that is only validated
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self._peaks = {
            "tokens": config.lr_tokens,
            "llm": config.lr_llm,
            "edit_head": config.lr_edit_head,
            "unet": config.lr_unet,
            "text_encoder": config.lr_text_encoder,
        }
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()} if config.ema_decay else {}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._parameters

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rate of each part that trains, at a step (from 0)."""
        factor = learning_rate_factor(step, self._num_steps, self._config.warmup)
        return {part: self._peaks[part] * factor for part in sorted({g["part"] for g in self._adam.param_groups})}

    def update(self, step: int, loss: Float[Tensor, ""], *, gradient_scale: int = 1) -> UpdateResult:
        """One step with the gradients that have been accumulated; they are gone afterwards.

        Changes no weight and no moment where `loss` or the gradients are not finite.

        Args:
            step: From 0. loss: Of the whole global batch.
            gradient_scale: What the gradients are to be multiplied by: the number of workers, over which they were
                averaged though their losses are parts of a sum.
        """
        parameters = list(self._parameters.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = _full(torch.nn.utils.get_total_norm(gradients)) * gradient_scale
        is_finite = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        factor = torch.full_like(norm, gradient_scale)
        if self._config.max_grad_norm:
            factor = factor * (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)  # as torch's own clipping does
        rates = self.learning_rates(step)
        for group in self._adam.param_groups:
            group["lr"] = rates[group["part"]]
        # How gradient scalers tell a fused optimiser to leave everything as it is, without asking the device.
        self._adam.found_inf = 1 - is_finite  # type: ignore[attr-defined]
        self._adam.step()
        # On a GPU they are kept, as views of DDP's buckets, which would otherwise be there twice. But DDP multiplies new
        # gradients by 1/n and divides kept ones by n: a resumed run, which begins with new ones, would round otherwise.
        self._adam.zero_grad(set_to_none=loss.device.type != "cuda")
        if self.average:
            # Rises to the full decay, so that the average does not remember the beginning for long.
            decay = min(self._config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in parameters], 1 - decay)
        return UpdateResult(norm, is_finite)

    # ---- state by name, as whole tensors on the CPU

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The trained weights.

        Args:
            keep: False on workers that only help to put sharded tensors together: they get nothing.
        """
        return _taken(self._parameters, keep=keep)

    def average_weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Their moving average; empty where none is kept. `keep` as in `weights`."""
        return _taken(self.average, keep=keep)

    def moments(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The optimiser's state: `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`. `keep` as in `weights`."""
        state = {
            f"{kind}.{name}": self._adam.state[p][kind]
            for name, p in self._parameters.items()
            for kind in _MOMENTS
            if self._adam.state[p]
        }
        return _taken(state, keep=keep)

    @torch.no_grad()
    def restore(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> None:
        """Puts back what was taken out.

        Raises:
            DataError: Names or shapes are not those of this model.
        """
        _check_names("trained weights", weights, self._parameters)
        _check_names("averaged weights", average, self.average)
        for name, parameter in self._parameters.items():
            if weights[name].shape != parameter.shape:
                shapes = f"{tuple(weights[name].shape)}; this model's is {tuple(parameter.shape)}"
                raise DataError(f"checkpoint's weight {name} has shape {shapes}")
            parameter.copy_(_like(weights[name], parameter))
            if moments:
                try:
                    found = {kind: moments[f"{kind}.{name}"] for kind in _MOMENTS}
                except KeyError as error:
                    raise DataError(f"checkpoint's optimiser state lacks {error}") from error
                state = {kind: _like(found[kind], parameter) for kind in _MOMENTS[:2]}
                step = found["step"].to(torch.float32).to(parameter.device)
                self._adam.state[parameter] = {**state, "step": step}
        for name, shadow in self.average.items():
            shadow.copy_(_like(average[name], shadow))


def _part(name: str) -> str:
    """What a parameter belongs to, for its learning rate."""
    part = name.split(".", 1)[0]
    if part != "mllm":
        return part
    return "llm" if name.startswith(_LLM_PARTS) else "tokens"


def _check_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise DataError(f"checkpoint's {what} lack {missing[:3]} and hold unexpected {unexpected[:3]} for this model")


def _full(value: Tensor) -> Tensor:
    """The whole tensor where this is one shard of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _taken(values: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU, one after the other."""
    whole = ((name, _full(value.detach())) for name, value in values.items())
    return {name: value.to("cpu", copy=True) for name, value in whole if keep}


def _like(value: Tensor, model: Tensor) -> Tensor:
    """`value` with device, dtype, sharding and memory layout of `model`: fused kernels pair elements by memory."""
    if isinstance(model, DTensor):
        return distribute_tensor(value.to(model.device, model.dtype), model.device_mesh, model.placements)
    return torch.empty_like(model).copy_(value)
