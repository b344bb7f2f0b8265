"""One training loop for all stages: AdamW, warm-up and cosine, clipping, a moving average, resumable at any moment.

A step is a function of the weights and its number: what it sees is drawn by a generator keyed by (seed, step). So a
run that was stopped and goes on ends with the weights of one that was not.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgie.storage.atomic import atomic_file
from mgie.training.optimizer import learning_rate_factor

_SECONDS_BETWEEN_SAVES = 120
_STEPS_BETWEEN_LINES = 50
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    "samples per step"
    lr: float
    "peak learning rate"
    warmup: float = 0.03
    "share of all steps in which the learning rate rises from 0"
    weight_decay: float = 0.01
    "decoupled, of matrices only"
    beta2: float = 0.98
    "decay of the second moment"
    ema_decay: float = 0.999
    "decay of the moving average of the weights, which is the result"
    max_grad_norm: float = 1.0
    seed: int = 0
    "decides what each step sees"


def fit(
    model: nn.Module,
    loop: LoopConfig,
    loss: Callable[[Generator], Mapping[str, Tensor]],
    state_file: Path,
    *,
    log: Path | None = None,
) -> None:
    """Trains `model` in place; it ends with the moving average of its weights. Goes on from `state_file`.

    Args:
        loss: Draws a batch and gives the scalars to be recorded; what is minimised is called "loss".
        state_file: Written every two minutes and at the end.
        log: Gets a JSON line every 50 steps.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in parameters.values() if (p.ndim > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, loop.weight_decay), (False, 0.0))
    ]
    adam = torch.optim.AdamW(groups, lr=loop.lr, betas=(0.9, loop.beta2), fused=True)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    start = 0
    if state_file.is_file():
        state = load_file(state_file)
        start = int(state["step"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[f"weights.{name}"])
                average[name].copy_(state[f"average.{name}"])
                if f"{_MOMENTS[0]}.{name}" in state:
                    moments = {kind: state[f"{kind}.{name}"].clone() for kind in _MOMENTS}
                    adam.state[parameter] = {**moments, "step": torch.tensor(float(start))}
    state_file.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    saved, began = time.monotonic(), time.monotonic()
    for step in range(start, loop.steps):
        rng = np.random.default_rng([loop.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))
        scalars = loss(rng)
        scalars["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), loop.max_grad_norm)
        for group in adam.param_groups:
            group["lr"] = loop.lr * learning_rate_factor(step, loop.steps, loop.warmup)
        adam.step()
        adam.zero_grad()
        decay = min(loop.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        if log is not None and (step % _STEPS_BETWEEN_LINES == 0 or step == loop.steps - 1):
            rate = (step + 1 - start) / (time.monotonic() - began)
            line = {"step": step, "steps_per_s": rate, "norm": norm.item(), **{k: v.item() for k, v in scalars.items()}}
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES or step == loop.steps - 1:
            kept = {f"weights.{name}": p.detach() for name, p in parameters.items()}
            kept |= {f"average.{name}": value for name, value in average.items()}
            # What no loss depends on (layers above the one that is read) has no moments.
            with_moments = {name: adam.state[p] for name, p in parameters.items() if adam.state[p]}
            kept |= {f"{kind}.{name}": moments[kind] for name, moments in with_moments.items() for kind in _MOMENTS}
            _save({**kept, "step": torch.tensor(step + 1)}, state_file)
            saved = time.monotonic()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    model.eval()


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    with atomic_file(path) as draft:
        save_file({name: value.contiguous() for name, value in state.items()}, draft)
