"""Sampling: one denoising step over a list of sample states, and the loop.

Three samplers, one form. Whatever the sampler, a step is linear in four tensors, so its numbers are
worked out once per schedule (in double precision) and a batch that mixes samplers, schedules, positions
and scales is advanced by one fused update:

    input = input_scale * latents                        (what the denoiser sees)
    x0    = x0_from_latents * latents + x0_from_output * output
    next  = keep * latents + to_x0 * x0 + to_previous_x0 * previous x0 + noise_scale * noise

Timesteps and noise levels are those of diffusers' schedulers built from the bundle's scheduler
configuration; the steps are ours. Latents stay float32 whatever dtype the denoiser computes in, and noise
is drawn per sample on the CPU in float32, so a seed means the same noise on every device and in every batch.

Knows nothing of images, text, the VAE, or who calls: the caller owns the list of states and may change it
between any two steps.

Axes: B samples, S steps, c latent channels, h w latent height and width, Q condition tokens, C condition width.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from jaxtyping import Bool, Float
from torch import Tensor

from mgie.config import MAX_SEED, Sampler
from mgie.errors import ConfigError
from mgie.model.guidance import Denoiser, GuidanceInput, guided_prediction

PredictionType = Literal["epsilon", "v_prediction", "sample"]

_SCHEDULERS: Mapping[Sampler, Any] = {  # diffusers' classes are untyped
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
# Options of those classes that change the step itself, with the values that our steps implement. Options
# that only change timesteps and sigmas (spacing, Karras, zero terminal SNR, ...) need no entry.
_IMPLEMENTED: Mapping[Sampler, Mapping[str, tuple[object, ...]]] = {
    "euler_ancestral": {"prediction_type": get_args(PredictionType)},
    "ddim": {"prediction_type": get_args(PredictionType), "clip_sample": (False,), "thresholding": (False,)},
    "dpmpp_2m": {
        "prediction_type": get_args(PredictionType),
        "thresholding": (False,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "solver_order": (1, 2),
        "variance_type": (None,),
        "use_flow_sigmas": (False,),
    },
}


class _Step(NamedTuple):
    """The numbers of one step; see the module's equations. The order is that of `Schedule.coefficients`."""

    input_scale: float
    x0_from_latents: float
    x0_from_output: float
    keep: float
    to_x0: float
    to_previous_x0: float = 0.0
    noise_scale: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The noise levels of one run and the numbers of its steps. Immutable; shared by many samples."""

    sampler: Sampler
    "the algorithm that the coefficients belong to"
    prediction_type: PredictionType
    "what the denoiser's output means"
    timesteps: tuple[float, ...]
    "S training timesteps, decreasing; Euler's may lie between two whole ones"
    sigmas: tuple[float, ...]
    "S + 1 noise levels sqrt((1 - abar) / abar), decreasing; the last is the result's; inf at zero SNR (DDIM only)"
    init_noise_sigma: float
    "standard deviation of the initial latents"
    coefficients: Float[Tensor, "S 7"]
    "float32 on the CPU; columns as in the module's equations"

    @property
    def num_steps(self) -> int:
        """S: calls of the denoiser per sample."""
        return len(self.timesteps)

    @property
    def draws_noise(self) -> bool:
        """Whether each step takes a draw from the sample's generator (the last one too, scaled by zero)."""
        return self.sampler == "euler_ancestral"

    def noised(self, clean: Float[Tensor, "c h w"], noise: Float[Tensor, "c h w"], step: int) -> Float[Tensor, "c h w"]:
        """Latents that are `clean` but for the noise that is left after `step` steps, in the sampler's own scaling.

        After the last step none is left, whatever level the schedule ends at.

        Args:
            clean: Scaled latents.
            noise: Standard normal.
            step: 0 to S.
        """
        sigma = self.sigmas[step] if step < self.num_steps else 0.0
        if self.sampler == "euler_ancestral":
            return clean + sigma * noise
        alpha = 1 / math.sqrt(1 + sigma**2)
        return alpha * clean + math.sqrt(1 - alpha**2) * noise


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenRegion:
    """The part of a sample that stays as its source: after each step it is the source at that step's noise level.

    Source: Avrahami et al., Blended Latent Diffusion (arXiv 2206.02779), section 3.1; the noise is the sample's
    initial one throughout, so keeping takes no draw and changes none.
    """

    where: Bool[Tensor, "1 h w"]
    "True where it stays"
    clean: Float[Tensor, "c h w"]
    "source image, scaled latents"
    noise: Float[Tensor, "c h w"]
    "standard normal"


@dataclass(kw_only=True, eq=False)
class SampleState:
    """One sample on its way from noise to edited latents: all that is needed to go on with it.

    Holds references and small tensors only, all of them on the denoiser's device but for the generator.
    Nothing in it refers to other samples, so states join and leave a batch between any two steps.
    Tensors are replaced, never written into: one that a caller took from here stays as it was.
    """

    latents: Float[Tensor, "c h w"]
    "current noisy latents, float32, in the sampler's own scaling; the edited latents when `is_done`"
    image_latents: Float[Tensor, "c h w"]
    "source image, VAE posterior mode, not scaled"
    condition: Float[Tensor, "Q C"]
    "text condition"
    null_condition: Float[Tensor, "Q C"]
    "condition of no text"
    text_scale: float
    "s_T"
    image_scale: float
    "s_I"
    schedule: Schedule
    "where the steps are"
    generator: torch.Generator
    "on the CPU; has given the initial latents and one draw per step so far"
    step: int = 0
    "steps done"
    predicted_x0: Float[Tensor, "c h w"] | None = None
    "the clean latents as the last step predicted them: shown as previews, remembered by the multistep sampler"
    frozen: FrozenRegion | None = None
    "what of it must not change; None = all may"
    given_noise: Iterator[Tensor] | None = field(default=None, repr=False)
    "step noise [4, h, w] to take in place of the generator's (comparing with recorded runs)"

    @property
    def is_done(self) -> bool:
        """Whether every step of the schedule has been taken."""
        return self.step >= self.schedule.num_steps


def make_schedule(scheduler_config: Mapping[str, Any], sampler: Sampler, steps: int) -> Schedule:
    """The schedule of `steps` steps; cached, and safe to call from several threads.

    Args:
        scheduler_config: `scheduler_config.json` of the bundle (JSON values), of whichever scheduler class: each
            sampler's own defaults fill the gaps, as diffusers' `from_config` does.
        sampler: The algorithm.
        steps: Denoising steps.

    Raises:
        ConfigError: The configuration asks for something that our steps do not do (`clip_sample`, `thresholding`,
            another solver), or that cannot be (x0 from the predicted noise, where latents are nothing but noise);
            or it has no `steps` distinct noise levels.
    """
    return _make_schedule(json.dumps(dict(scheduler_config), sort_keys=True), sampler, steps)


@lru_cache(maxsize=256)
def _make_schedule(config_json: str, sampler: Sampler, steps: int) -> Schedule:
    try:
        scheduler = _SCHEDULERS[sampler].from_config(json.loads(config_json))
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"scheduler config cannot be used for {sampler}: {error}") from error
    config = scheduler.config
    for option, allowed in _IMPLEMENTED[sampler].items():
        if config[option] not in allowed:
            raise ConfigError(
                f"scheduler config has {option} {config[option]!r} (given, or the default of {sampler}); "
                f"it must be {' or '.join(repr(value) for value in allowed)}",
                param=option,
            )
    if not 1 <= steps <= config.num_train_timesteps:
        raise ConfigError(f"steps is {steps}; it must be 1 to {config.num_train_timesteps}", param="steps")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ConfigError(f"scheduler config cannot be used for {sampler}: {error}") from error

    # Trailing spacing yields one timestep too many, at -1, where its floating-point range overshoots (61 steps
    # of 1000): the cut drops it.
    timesteps = tuple(float(timestep) for timestep in scheduler.timesteps.tolist()[:steps])
    is_possible = len(timesteps) == steps and all(0 <= timestep < config.num_train_timesteps for timestep in timesteps)
    if is_possible:
        sigmas = _ddim_sigmas(scheduler, timesteps) if sampler == "ddim" else _sigmas(scheduler, steps)
        is_possible = all(sigma > lower for sigma, lower in pairwise(sigmas[:-1]))
    if not is_possible:
        raise ConfigError(
            f"steps is {steps}; {sampler} with timestep_spacing {config.timestep_spacing!r} and steps_offset "
            f"{config.steps_offset} has no {steps} distinct noise levels within {config.num_train_timesteps} "
            f"timesteps; it must be less",
            param="steps",
        )
    try:
        if sampler == "euler_ancestral":
            rows = _euler_ancestral_steps(sigmas, config.prediction_type)
        elif sampler == "ddim":
            rows = _ddim_steps(_ddim_alphas(scheduler, timesteps), config.prediction_type)
        else:
            rows = _dpmpp_2m_steps(sigmas, config.prediction_type, _second_order(config, steps))
    except ZeroDivisionError as error:
        raise ConfigError(
            f"scheduler config has prediction_type {config.prediction_type!r} with a timestep of zero signal "
            f"(rescale_betas_zero_snr); {sampler} needs 'v_prediction' or 'sample' there",
            param="prediction_type",
        ) from error
    return Schedule(
        sampler=sampler,
        prediction_type=config.prediction_type,
        timesteps=timesteps,
        sigmas=sigmas,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        coefficients=torch.tensor(rows, dtype=torch.float32),
    )


def _sigmas(scheduler: Any, steps: int) -> tuple[float, ...]:
    sigmas = scheduler.sigmas.tolist()
    return (*sigmas[:steps], sigmas[-1])  # the cut as for the timesteps


def _ddim_alphas(scheduler: Any, timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """Cumulative alphas (abar) at the start and at the end of each step.

    A step ends a fixed stride below its start, not at the next timestep; the two differ by rounding with trailing
    and by up to a stride with linspace spacing. This is diffusers' DDIM, and that of every model tuned with it.
    """
    stride = scheduler.config.num_train_timesteps // len(timesteps)
    alphas: list[float] = scheduler.alphas_cumprod.tolist()
    final = float(scheduler.final_alpha_cumprod)
    return [(alphas[int(t)], alphas[int(t) - stride] if int(t) >= stride else final) for t in timesteps]


def _ddim_sigmas(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    pairs = _ddim_alphas(scheduler, timesteps)
    alphas = [start for start, _ in pairs] + [pairs[-1][1]]
    return tuple(math.sqrt((1 - alpha) / alpha) if alpha > 0 else math.inf for alpha in alphas)


def _second_order(config: Any, steps: int) -> list[bool]:
    """Which steps of DPM-Solver++ use the previous prediction: not the first, nor (mostly) the last."""
    is_last_first_order = (
        config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and steps < 15)
    )
    return [
        config.solver_order == 2 and step > 0 and not (step == steps - 1 and is_last_first_order)
        for step in range(steps)
    ]


def _x0_weights(prediction_type: PredictionType, alpha: float, sigma: float) -> tuple[float, float]:
    """Weights of (model input, model output) in x0, where model input = alpha x0 + sigma noise, alpha^2 + sigma^2 = 1.

    Source: Ho et al. (arXiv 2006.11239), equation 15; Salimans and Ho (arXiv 2202.00512), section 4 and appendix D.
    """
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def _euler_ancestral_steps(sigmas: Sequence[float], prediction_type: PredictionType) -> list[_Step]:
    """Latents are x0 + sigma noise; each step goes down to sigma_down, then adds noise up to the next sigma.

    Source: Karras et al. (arXiv 2206.00364), equation 1 and algorithm 1 (Euler); the ancestral split of the next
    level, sigma_up^2 + sigma_down^2 = sigma_to^2 with sigma_up^2 = sigma_to^2 (1 - sigma_to^2 / sigma^2), is DDPM's
    posterior variance (arXiv 2006.11239, equation 7), from which sigma_down = sigma_to^2 / sigma.
    """
    steps = []
    for sigma, sigma_to in pairwise(sigmas):
        ratio = sigma_to / sigma
        input_scale = 1 / math.sqrt(sigma**2 + 1)
        from_input, from_output = _x0_weights(prediction_type, input_scale, sigma * input_scale)
        keep = ratio**2  # sigma_down / sigma
        noise_scale = sigma_to * math.sqrt(1 - ratio**2)
        steps.append(_Step(input_scale, from_input * input_scale, from_output, keep, 1 - keep, noise_scale=noise_scale))
    return steps


def _ddim_steps(alphas: Sequence[tuple[float, float]], prediction_type: PredictionType) -> list[_Step]:
    """Latents are sqrt(abar) x0 + sqrt(1 - abar) noise; the predicted noise is kept, at its next level (eta = 0).

    Source: Song et al., DDIM (arXiv 2010.02502), equation 12.
    """
    steps = []
    for alpha_bar, alpha_bar_to in alphas:
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        keep = math.sqrt(1 - alpha_bar_to) / sigma
        weights = _x0_weights(prediction_type, alpha, sigma)
        steps.append(_Step(1.0, *weights, keep, math.sqrt(alpha_bar_to) - keep * alpha))
    return steps


def _dpmpp_2m_steps(
    sigmas: Sequence[float], prediction_type: PredictionType, second_order: Sequence[bool]
) -> list[_Step]:
    """Latents are alpha x0 + alpha sigma noise with alpha = 1 / sqrt(1 + sigma^2); x0 is extrapolated over two steps.

    With lambda = -log sigma: h = lambda_to - lambda, exp(-h) = sigma_to / sigma, r = (lambda - lambda_before) / h.

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), algorithm 2 (2M); equation 9 for first order.
    """
    steps = []
    for index, (sigma, sigma_to) in enumerate(pairwise(sigmas)):
        alpha, alpha_to = 1 / math.sqrt(1 + sigma**2), 1 / math.sqrt(1 + sigma_to**2)
        gain = alpha_to * (1 - sigma_to / sigma)
        half_inverse_r = 0.0
        if second_order[index]:
            half_inverse_r = 0.5 * math.log(sigma / sigma_to) / math.log(sigmas[index - 1] / sigma)
        steps.append(
            _Step(
                1.0,
                *_x0_weights(prediction_type, alpha, alpha * sigma),
                keep=(alpha_to * sigma_to) / (alpha * sigma),
                to_x0=gain * (1 + half_inverse_r),
                to_previous_x0=-gain * half_inverse_r,
            )
        )
    return steps


def start(
    *,
    image_latents: Float[Tensor, "c h w"],
    condition: Float[Tensor, "Q C"],
    null_condition: Float[Tensor, "Q C"],
    schedule: Schedule,
    text_scale: float,
    image_scale: float,
    seed: int,
) -> SampleState:
    """A sample before its first step, on the device of `image_latents`.

    The generator gives the initial latents here, then one draw per step where the sampler takes noise.

    Args:
        image_latents: Source image, VAE posterior mode, not scaled.
        condition: Text condition.
        null_condition: Condition of no text.
        schedule: From `make_schedule`.
        text_scale: s_T.
        image_scale: s_I.
        seed: 0 to `MAX_SEED`; the same seed gives the same noise on every device and in every batch.

    Raises:
        ConfigError: `seed` is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed is {seed}; it must be 0 to {MAX_SEED}", param="seed")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(image_latents.shape, generator=generator, dtype=torch.float32, device="cpu")
    return SampleState(
        latents=(noise * schedule.init_noise_sigma).to(image_latents.device),
        image_latents=image_latents.float(),
        condition=condition,
        null_condition=null_condition,
        text_scale=text_scale,
        image_scale=image_scale,
        schedule=schedule,
        generator=generator,
    )


@torch.no_grad()
def denoise_step(denoiser: Denoiser, states: Sequence[SampleState]) -> None:
    """Advances each state by one step, in place, with one call of the denoiser.

    States may differ in sampler, schedule, position, scales and seed. A sample's result does not depend on who
    shares its batch, beyond the rounding of the denoiser's own kernels. If the denoiser raises (out of memory),
    every state and generator is as before: the caller may try again with fewer.

    Args:
        denoiser: The diffusion model.
        states: On one device, none of them done. Empty: nothing happens.

    Raises:
        ConfigError: Latents or conditions of the states differ in size, or a state is done.
    """
    if not states:
        return
    _check_fit(states)
    latents = torch.stack([state.latents for state in states])  # [B, c, h, w]
    rows = torch.stack([state.schedule.coefficients[state.step] for state in states]).to(latents.device)
    columns = rows[:, :, None, None, None].unbind(1)  # 7 x [B, 1, 1, 1]
    input_scale, x0_from_latents, x0_from_output, keep, to_x0, to_previous_x0, noise_scale = columns
    scaled = input_scale * latents
    output = guided_prediction(
        denoiser,
        [
            GuidanceInput(
                latents=scaled[index],
                timestep=state.schedule.timesteps[state.step],
                image_latents=state.image_latents,
                condition=state.condition,
                null_condition=state.null_condition,
                text_scale=state.text_scale,
                image_scale=state.image_scale,
            )
            for index, state in enumerate(states)
        ],
    )
    x0 = x0_from_latents * latents + x0_from_output * output
    # Where there is no previous prediction yet its weight is zero, and any tensor serves.
    previous = torch.stack([state.latents if state.predicted_x0 is None else state.predicted_x0 for state in states])
    following = keep * latents + to_x0 * x0 + to_previous_x0 * previous
    with _undone_on_failure(states):
        if any(state.schedule.draws_noise for state in states):
            following += noise_scale * torch.stack([_draw(state) for state in states]).to(latents.device)
        # The states get views of the batch's tensors: cheap, and their storage goes with the last of them.
        stepped = [_hold_frozen(state, following[index]) for index, state in enumerate(states)]
    for index, state in enumerate(states):
        state.latents, state.predicted_x0 = stepped[index], x0[index]
        state.step += 1


@contextlib.contextmanager
def _undone_on_failure(states: Sequence[SampleState]) -> Iterator[None]:
    """The generators are as before where the block raises."""
    before = [state.generator.get_state() for state in states]
    try:
        yield
    except BaseException:
        for state, generator in zip(states, before, strict=True):
            state.generator.set_state(generator)
        raise


def _hold_frozen(state: SampleState, latents: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    """The latents after a step, with the part that stays as its source at that step's noise level."""
    if (frozen := state.frozen) is None:
        return latents
    known = state.schedule.noised(frozen.clean, frozen.noise, state.step + 1)
    return torch.where(frozen.where, known, latents)


def _draw(state: SampleState) -> Float[Tensor, "c h w"]:
    """The sample's noise for this step, on the CPU; zeros, without a draw, where its sampler takes none."""
    if not state.schedule.draws_noise:
        return torch.zeros(state.latents.shape, dtype=torch.float32, device="cpu")
    if state.given_noise is not None:
        return next(state.given_noise)
    return torch.randn(state.latents.shape, generator=state.generator, dtype=torch.float32, device="cpu")


def _check_fit(states: Sequence[SampleState]) -> None:
    """Raises ConfigError unless the states can share a batch."""
    sizes = sorted({tuple(state.latents.shape) for state in states})
    if len(sizes) > 1:
        raise ConfigError(f"latents of one batch have shapes {sizes}; they must be equal")
    shapes = sorted({tuple(state.condition.shape) for state in states})
    if len(shapes) > 1:
        raise ConfigError(f"conditions of one batch have shapes {shapes}; they must be equal")
    for state in states:
        if state.is_done:
            raise ConfigError(f"a sample is at step {state.step} of {state.schedule.num_steps}; it must not be done")
