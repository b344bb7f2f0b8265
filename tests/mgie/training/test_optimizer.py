"""What a step does to the weights, against torch's own optimiser used the plain way."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mgie.config import OptimizerConfig
from mgie.errors import DataError
from mgie.training.optimizer import Optimization, learning_rate_factor

CONFIG = OptimizerConfig(lr_tokens=3e-2, lr_edit_head=2e-2, lr_unet=1e-2, warmup=0.25, weight_decay=0.1, ema_decay=0.9)


def _model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"mllm": nn.Linear(4, 3), "edit_head": nn.Linear(4, 3), "unet": nn.Linear(4, 3)})


def _loss(model: nn.ModuleDict, step: int) -> torch.Tensor:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    outputs = sum(part(inputs) for part in model.values())
    assert isinstance(outputs, torch.Tensor)
    return (10 * outputs).square().mean()


def _train(model: nn.ModuleDict, optimization: Optimization, steps: range) -> None:
    for step in steps:
        loss = _loss(model, step)
        loss.backward()
        optimization.update(step, loss.detach())


def test_the_learning_rate_rises_and_falls_as_warm_up_and_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert learning_rate_factor(0, 10, 0.0) == 1.0


def test_updates_are_those_of_plain_adamw_with_clipping() -> None:
    ours, theirs = _model(), _model()
    optimization = Optimization(ours, CONFIG, num_steps=20)
    plain = torch.optim.AdamW(
        [
            {"params": [theirs[part].get_parameter(kind)], "peak": rate, "weight_decay": 0.1 if kind == "weight" else 0}
            for part, rate in (("mllm", 3e-2), ("edit_head", 2e-2), ("unet", 1e-2))
            for kind in ("weight", "bias")
        ],
        foreach=False,
    )
    average = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for step in range(12):
        loss = _loss(ours, step)
        loss.backward()
        result = optimization.update(step, loss.detach())
        plain.zero_grad()
        _loss(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        assert float(norm) > 1
        for group in plain.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, 20, 0.25)
        plain.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in theirs.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimization.average[name], average[name], rtol=1e-5, atol=1e-6)


def test_small_gradients_are_not_scaled() -> None:
    model = _model()
    optimization = Optimization(model, replace(CONFIG, max_grad_norm=1e5), num_steps=20)
    loss = _loss(model, 0)
    loss.backward()
    gradient = model["unet"].weight.grad.clone()
    optimization.update(0, loss.detach())
    assert torch.allclose(optimization.moments()["exp_avg.unet.weight"], 0.1 * gradient)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(bad: str) -> None:
    model = _model()
    optimization = Optimization(model, CONFIG, num_steps=20)
    _train(model, optimization, range(3))
    weights, moments = optimization.weights(), optimization.moments()
    loss = _loss(model, 3)
    loss.backward()
    if bad == "gradient":
        model["unet"].weight.grad[0, 0] = float("inf")
    result = optimization.update(3, torch.tensor(float("nan")) if bad == "loss" else loss.detach())
    assert float(result.is_finite) == 0
    assert all(torch.equal(value, weights[name]) for name, value in optimization.weights().items())
    assert all(torch.equal(value, moments[name]) for name, value in optimization.moments().items())
    _train(model, optimization, range(4, 5))
    assert not torch.equal(optimization.weights()["unet.weight"], weights["unet.weight"])


def test_state_that_is_put_back_goes_on_bitwise() -> None:
    model, other = _model(), _model()
    whole = Optimization(model, CONFIG, num_steps=20)
    _train(model, whole, range(5))
    state = whole.weights(), whole.average_weights(), whole.moments()
    _train(model, whole, range(5, 9))
    resumed = Optimization(other, CONFIG, num_steps=20)
    resumed.restore(*state)
    _train(other, resumed, range(5, 9))
    for ours, theirs in zip(
        (resumed.weights(), resumed.average_weights(), resumed.moments()),
        (whole.weights(), whole.average_weights(), whole.moments()),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_that_was_taken_out_does_not_change_afterwards() -> None:
    model = _model()
    optimization = Optimization(model, CONFIG, num_steps=20)
    _train(model, optimization, range(2))
    weights, moments = optimization.weights(), optimization.moments()
    copies = {name: value.clone() for name, value in {**weights, **moments}.items()}
    _train(model, optimization, range(2, 4))
    assert all(torch.equal(value, copies[name]) for name, value in {**weights, **moments}.items())


def test_the_state_of_another_model_is_refused() -> None:
    model = _model()
    optimization = Optimization(model, CONFIG, num_steps=20)
    _train(model, optimization, range(1))
    weights, average, moments = optimization.weights(), optimization.average_weights(), optimization.moments()
    missing = {name: value for name, value in weights.items() if name != "unet.bias"}
    with pytest.raises(DataError, match=r"lack \['unet.bias'\]"):
        optimization.restore(missing, average, moments)
    with pytest.raises(DataError, match=r"unet\.weight has shape"):
        optimization.restore(weights | {"unet.weight": torch.zeros(2, 2)}, average, moments)
    with pytest.raises(DataError, match="optimiser state lacks"):
        optimization.restore(weights, average, {"step.unet.bias": torch.tensor(1.0)})
