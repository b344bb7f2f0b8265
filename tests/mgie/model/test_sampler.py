"""The samplers against diffusers' own steps, the recorded runs, and themselves in other company."""

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from safetensors.torch import load_file
from torch import Tensor

from mgie.config import MAX_SEED, SAMPLERS, Sampler
from mgie.errors import ConfigError
from mgie.model.guidance import Denoiser
from mgie.model.sampler import FrozenRegion, SampleState, Schedule, denoise_step, make_schedule, start

CONFIG: dict[str, Any] = {  # of the published InstructPix2Pix
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
DIFFUSERS: dict[Sampler, Any] = {
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def sample(denoiser: Any, states: Sequence[SampleState]) -> None:
    """Runs all states to their end, in place; those with fewer steps leave the batch earlier."""
    while pending := [state for state in states if not state.is_done]:
        denoise_step(denoiser, pending)


@pytest.fixture(scope="module")
def unet() -> Denoiser:
    """A real UNet with 8 input channels, small and random."""
    torch.manual_seed(0)
    return as_denoiser(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=6,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )


def as_denoiser(unet: UNet2DConditionModel) -> Denoiser:
    unet = unet.eval().requires_grad_(False)

    def denoise(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        output: Tensor = unet(latents, timesteps, condition).sample
        return output

    return denoise


def make_state(
    schedule: Schedule, seed: int = 0, text_scale: float = 7.5, image_scale: float = 1.5, hw: tuple[int, int] = (8, 8)
) -> SampleState:
    generator = torch.Generator().manual_seed(1000 + seed)
    return start(
        image_latents=torch.randn((4, *hw), generator=generator),
        condition=torch.randn((5, 6), generator=generator),
        null_condition=torch.randn((5, 6), generator=generator),
        schedule=schedule,
        text_scale=text_scale,
        image_scale=image_scale,
        seed=seed,
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# Against diffusers


class DiffusersRun:
    """diffusers' own scheduler, stepped by hand with a generator of its own.

    `in_double` runs its arithmetic in double precision, from the float32 noise levels that it made.
    """

    def __init__(self, config: dict[str, Any], sampler: Sampler, steps: int, seed: int, *, in_double: bool) -> None:
        self.scheduler = DIFFUSERS[sampler].from_config(config)
        self.scheduler.set_timesteps(steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.is_ancestral = sampler == "euler_ancestral"
        self.dtype = torch.float64 if in_double else torch.float32
        noise = torch.randn((1, 4, 4, 4), generator=self.generator)
        self.latents = (noise * self.scheduler.init_noise_sigma).to(self.dtype)
        if in_double:
            self.scheduler.sigmas = self.scheduler.sigmas.double()

    def step(self, output: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(model input, latents after the step)."""
        model_input = self.scheduler.scale_model_input(self.latents, timestep)
        extra = {"generator": self.generator} if self.is_ancestral else {}
        self.latents = self.scheduler.step(output.to(self.dtype), timestep, self.latents, **extra).prev_sample
        return model_input, self.latents


def worst_difference(config: dict[str, Any], sampler: Sampler, steps: int, *, in_double: bool = False) -> float:
    """Runs both on the same random outputs; the largest relative difference of inputs, latents and timesteps."""
    schedule = make_schedule(config, sampler, steps)
    state = make_state(schedule, seed=5, text_scale=1.0, image_scale=1.0, hw=(4, 4))
    expected = DiffusersRun(config, sampler, steps, seed=5, in_double=in_double)
    generator = torch.Generator().manual_seed(17)
    worst = relative_error(state.latents, expected.latents[0])
    assert len(expected.scheduler.timesteps) == schedule.num_steps
    for timestep in expected.scheduler.timesteps:
        output = torch.randn((1, 4, 4, 4), generator=generator)
        seen: list[tuple[Tensor, Tensor]] = []

        def denoise(latents: Tensor, timesteps: Tensor, condition: Tensor, output: Tensor = output) -> Tensor:
            seen.append((latents, timesteps))  # noqa: B023 (called within this iteration)
            return output

        denoise_step(denoise, [state])
        model_input, latents = expected.step(output, timestep)
        ((got_input, got_timestep),) = seen
        assert got_timestep.item() == float(timestep)
        worst = max(
            worst, relative_error(got_input[:, :4], model_input), relative_error(state.latents, latents[0])
        )  # fmt: skip
    assert state.is_done
    return worst


def comparable_settings() -> Iterator[tuple[Sampler, str, str, bool]]:
    """(sampler, prediction type, spacing, zero terminal SNR), without what diffusers itself cannot do."""
    kinds = ("epsilon", "v_prediction", "sample")
    for sampler, kind, spacing, zero_snr in product(
        SAMPLERS, kinds, ("linspace", "leading", "trailing"), (False, True)
    ):
        is_implemented = not (sampler == "euler_ancestral" and kind == "sample")
        is_finite = not (sampler == "ddim" and kind == "epsilon" and zero_snr and spacing != "leading")
        if is_implemented and is_finite:
            yield sampler, kind, spacing, zero_snr


@pytest.mark.parametrize(("sampler", "prediction_type", "spacing", "zero_snr"), list(comparable_settings()))
def test_steps_equal_diffusers(
    sampler: Sampler, prediction_type: str, spacing: str, zero_snr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        **CONFIG,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
    }
    # With zero terminal SNR Euler's first sigma is 4096, where diffusers' float32 steps lose 4 digits to
    # cancellation (3e-4 seen); ours do not, so that they are held against diffusers in double precision.
    in_double = sampler == "euler_ancestral" and zero_snr
    if in_double:
        draw: Callable[..., Tensor] = lambda shape, generator, **_: torch.randn(shape, generator=generator)  # noqa: E731
        monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", draw)
    for steps in (1, 2, 3, 10, 50):
        worst = worst_difference(config, sampler, steps, in_double=in_double)
        assert worst < 5e-6, f"{steps} steps: {worst}"  # 2.9e-6 seen, at 50 steps


@pytest.mark.parametrize(
    "option",
    [
        {"solver_order": 1},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"use_karras_sigmas": True},
        {"lambda_min_clipped": -5.0, "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_dpmpp_2m_follows_the_options_of_its_config(option: dict[str, Any]) -> None:
    for steps in (2, 10, 20):
        assert worst_difference({**CONFIG, **option}, "dpmpp_2m", steps) < 5e-6


@pytest.mark.parametrize("steps_offset", [0, 1])  # with 0 the last step but one ends at timestep 0 itself
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_ends_where_set_alpha_to_one_says(set_alpha_to_one: bool, steps_offset: int) -> None:
    """Without it a little noise stays in the result; with it the last step returns x0."""
    config = {**CONFIG, "set_alpha_to_one": set_alpha_to_one, "steps_offset": steps_offset}
    assert worst_difference(config, "ddim", 10) < 5e-6
    assert (make_schedule(config, "ddim", 10).sigmas[-1] == 0.0) == set_alpha_to_one


def test_trailing_spacing_has_no_timestep_below_zero() -> None:
    """diffusers returns 62 timesteps for 61 steps, the last of them -1."""
    config = {**CONFIG, "timestep_spacing": "trailing"}
    for sampler in SAMPLERS:
        schedule = make_schedule(config, sampler, 61)
        assert schedule.num_steps == len(schedule.coefficients) == len(schedule.sigmas) - 1 == 61
        assert min(schedule.timesteps) >= 0
        expected = DIFFUSERS[sampler].from_config(config)
        expected.set_timesteps(61)
        assert schedule.timesteps == tuple(expected.timesteps.tolist()[:61])


def test_noise_velocity_and_sample_predictions_of_one_model_give_one_result() -> None:
    """x0 known exactly: whichever way it is told, the trajectory is the same and ends there."""
    truth = torch.randn((4, 4, 4), generator=torch.Generator().manual_seed(2))
    for sampler in SAMPLERS:
        results = []
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            config = {**CONFIG, "prediction_type": prediction_type, "set_alpha_to_one": True}
            schedule = make_schedule(config, sampler, 7)
            alphas_cumprod = DDIMScheduler.from_config(CONFIG).alphas_cumprod.double()
            state = make_state(schedule, seed=3, text_scale=1.0, image_scale=1.0, hw=(4, 4))

            def oracle(
                latents: Tensor,
                timesteps: Tensor,
                condition: Tensor,
                kind: str = prediction_type,
                alphas: Tensor = alphas_cumprod,
            ) -> Tensor:
                # Euler's fractional timesteps lie between two levels, interpolated in sigma.
                low, rest = int(timesteps[0]), timesteps[0].double() % 1
                levels = ((1 - alphas) / alphas).sqrt()
                level = levels[low] + rest * (levels[min(low + 1, 999)] - levels[low])
                alpha, sigma = 1 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt()
                noise = (latents[0, :4].double() - alpha * truth) / sigma
                answers = {"epsilon": noise, "v_prediction": alpha * noise - sigma * truth, "sample": truth.double()}
                return answers[kind].float()[None]

            sample(oracle, [state])
            results.append(state.latents)
        for result in results:
            assert relative_error(result, truth) < 2e-5


def test_noise_prediction_at_zero_signal_is_refused() -> None:
    config = {**CONFIG, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ConfigError, match=r"zero signal.*v_prediction") as caught:
        make_schedule(config, "ddim", 10)
    assert caught.value.param == "prediction_type"
    schedule = make_schedule({**config, "prediction_type": "v_prediction"}, "ddim", 10)
    assert schedule.sigmas[0] == math.inf
    assert schedule.coefficients.isfinite().all()


# Schedules


@pytest.mark.parametrize(
    ("sampler", "option", "message"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample True .*must be False"),
        ("ddim", {"thresholding": True}, "thresholding True .*must be False"),
        ("dpmpp_2m", {"thresholding": True}, "thresholding True .*must be False"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order 3 .*must be 1 or 2"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver"),
        ("dpmpp_2m", {"solver_type": "heun"}, "solver_type 'heun'"),
        ("dpmpp_2m", {"variance_type": "learned"}, "variance_type 'learned'"),
        ("dpmpp_2m", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("euler_ancestral", {"beta_schedule": "cubic"}, "cubic"),
        ("euler_ancestral", {"timestep_spacing": "dense"}, "dense"),
    ],
)
def test_config_that_asks_for_another_step_is_refused(sampler: Sampler, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule({**CONFIG, **option}, sampler, 10)


def test_clipping_is_ignored_where_the_scheduler_class_ignores_it() -> None:
    config = {**CONFIG, "clip_sample": True}
    for sampler in ("euler_ancestral", "dpmpp_2m"):
        plain = make_schedule(CONFIG, sampler, 5)
        assert torch.equal(make_schedule(config, sampler, 5).coefficients, plain.coefficients)


def test_ddim_refuses_a_config_without_clip_sample_since_its_default_clips() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "clip_sample"}
    with pytest.raises(ConfigError, match=r"clip_sample True \(given, or the default of ddim\)"):
        make_schedule(config, "ddim", 5)


@pytest.mark.parametrize(
    ("sampler", "steps", "option"),
    [
        ("euler_ancestral", 0, {}),
        ("euler_ancestral", 1001, {}),
        ("ddim", 1001, {}),
        ("dpmpp_2m", 1000, {}),
        ("ddim", 1000, {}),  # leading with offset 1 would begin at timestep 1000
        ("dpmpp_2m", 999, {"timestep_spacing": "leading"}),
        ("euler_ancestral", 501, {"num_train_timesteps": 500}),
    ],
)
def test_impossible_numbers_of_steps_are_refused(sampler: Sampler, steps: int, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"steps is {steps}; ") as caught:
        make_schedule({**CONFIG, **option}, sampler, steps)
    assert caught.value.param == "steps"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_largest_possible_schedules_are_finite(sampler: Sampler) -> None:
    schedule = make_schedule({**CONFIG, "steps_offset": 0}, sampler, 999)
    assert schedule.num_steps == 999
    assert schedule.coefficients.isfinite().all()


def test_spacing_defaults_are_those_of_each_scheduler_class() -> None:
    assert make_schedule(CONFIG, "euler_ancestral", 10).timesteps == tuple(float(t) for t in range(999, -1, -111))
    assert make_schedule(CONFIG, "ddim", 10).timesteps == tuple(float(t) for t in range(901, 0, -100))
    assert make_schedule(CONFIG, "dpmpp_2m", 10).timesteps[0] == 999.0


def test_schedules_are_shared_between_threads_and_calls() -> None:
    with ThreadPoolExecutor(8) as pool:
        schedules = list(pool.map(lambda steps: make_schedule(CONFIG, "ddim", 30 + steps % 4), range(64)))
    for index, schedule in enumerate(schedules):
        expected = DDIMScheduler.from_config(CONFIG)
        expected.set_timesteps(30 + index % 4)
        assert schedule.timesteps == tuple(expected.timesteps.tolist())
    assert make_schedule(dict(reversed(CONFIG.items())), "ddim", 30) is make_schedule(CONFIG, "ddim", 30)


# Samples and batches


def test_a_sample_does_not_depend_on_its_batch_mates(unet: Denoiser) -> None:
    """Samplers, steps, positions, scales and prediction types mixed; samples join late and leave early."""
    settings: list[tuple[Sampler, int, float, float, str]] = [
        ("euler_ancestral", 6, 7.5, 1.5, "epsilon"),
        ("ddim", 4, 1.0, 1.0, "epsilon"),
        ("dpmpp_2m", 5, 3.0, 3.0, "epsilon"),
        ("dpmpp_2m", 20, 0.0, 2.0, "v_prediction"),
        ("euler_ancestral", 3, 4.0, 1.0, "v_prediction"),
        ("ddim", 7, 7.5, 1.5, "sample"),
    ]

    def make_states() -> list[SampleState]:
        return [
            make_state(make_schedule({**CONFIG, "prediction_type": kind}, sampler, steps), seed, *scales)
            for seed, (sampler, steps, *scales, kind) in enumerate(settings)  # type: ignore[misc]
        ]

    alone = make_states()
    for state in alone:
        sample(unet, [state])

    waiting, running = make_states(), []
    together = list(waiting)
    sizes = []
    while waiting or running:
        running += waiting[:2]
        del waiting[:2]
        denoise_step(unet, running)
        sizes.append(len(running))
        running = [state for state in reversed(running) if not state.is_done]
    assert max(sizes) >= 4
    for one, other in zip(alone, together, strict=True):
        assert one.step == other.step == one.schedule.num_steps
        assert relative_error(other.latents, one.latents) < 2e-5
        assert other.predicted_x0 is not None
        assert one.predicted_x0 is not None
        assert relative_error(other.predicted_x0, one.predicted_x0) < 2e-5


def test_sample_runs_states_of_different_lengths_to_their_ends(unet: Denoiser) -> None:
    states = [make_state(make_schedule(CONFIG, "ddim", steps), steps) for steps in (1, 3, 2)]
    sample(unet, states)
    assert [state.step for state in states] == [1, 3, 2]
    assert all(state.is_done for state in states)


def test_final_latents_are_the_last_predicted_x0(unet: Denoiser) -> None:
    for sampler in ("euler_ancestral", "dpmpp_2m"):
        state = make_state(make_schedule(CONFIG, sampler, 4))
        assert state.predicted_x0 is None
        sample(unet, [state])
        assert state.predicted_x0 is not None
        assert torch.equal(state.latents, state.predicted_x0)


def test_latents_stay_float32_with_a_bfloat16_denoiser(unet: Denoiser) -> None:
    def in_bfloat16(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return unet(latents, timesteps, condition).bfloat16()

    state = make_state(make_schedule(CONFIG, "euler_ancestral", 3))
    sample(in_bfloat16, [state])
    assert state.latents.dtype == torch.float32


def test_noise_is_the_plain_stream_of_the_samples_own_generator() -> None:
    """First the initial latents, then one draw per Euler step, also at the last, in whatever company."""
    schedule = make_schedule(CONFIG, "euler_ancestral", 3)
    generator = torch.Generator().manual_seed(11)
    draws = [torch.randn((1, 4, 8, 8), generator=generator)[0] for _ in range(4)]

    def perfect(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(latents[:, :4])

    state, mate = make_state(schedule, seed=11), make_state(make_schedule(CONFIG, "ddim", 3), seed=12)
    untouched = mate.generator.get_state()
    assert torch.equal(state.latents, draws[0] * schedule.init_noise_sigma)
    for index in range(3):
        before = state.latents
        denoise_step(perfect, [mate, state])
        sigma, sigma_to = schedule.sigmas[index : index + 2]
        sigma_up = math.sqrt(sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2)
        torch.testing.assert_close(state.latents, before + sigma_up * draws[index + 1])
    assert torch.equal(state.generator.get_state(), generator.get_state())
    assert torch.equal(mate.generator.get_state(), untouched)


def test_seeds_make_results(unet: Denoiser) -> None:
    def run(seed: int) -> Tensor:
        state = make_state(make_schedule(CONFIG, "euler_ancestral", 3))
        fresh = start(
            image_latents=state.image_latents,
            condition=state.condition,
            null_condition=state.null_condition,
            schedule=state.schedule,
            text_scale=7.5,
            image_scale=1.5,
            seed=seed,
        )
        sample(unet, [fresh])
        return fresh.latents

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    run(MAX_SEED)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed is {seed}; ") as caught:
        make_state(make_schedule(CONFIG, "ddim", 2), seed=seed)
    assert caught.value.param == "seed"


def test_a_step_that_fails_leaves_states_as_they_were(unet: Denoiser) -> None:
    def out_of_memory(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    states = [make_state(make_schedule(CONFIG, sampler, 3), seed) for seed, sampler in enumerate(SAMPLERS)]
    others = copy.deepcopy(states)
    for batch in (states, others):
        denoise_step(unet, batch)
    with pytest.raises(torch.OutOfMemoryError):
        denoise_step(out_of_memory, states)
    for batch in (states, others):
        sample(unet, batch)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(states, others, strict=True))


def test_a_step_that_fails_after_its_noise_was_drawn_draws_the_same_again(
    unet: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [make_state(make_schedule(CONFIG, "euler_ancestral", 3), seed) for seed in range(2)]
    others = copy.deepcopy(states)

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mgie.model.sampler._hold_frozen", fail)
        with pytest.raises(torch.OutOfMemoryError):
            denoise_step(unet, states)
    for batch in (states, others):
        denoise_step(unet, batch)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(states, others, strict=True))


def test_a_step_replaces_tensors_and_does_not_write_into_them(unet: Denoiser) -> None:
    state = make_state(make_schedule(CONFIG, "euler_ancestral", 3))
    denoise_step(unet, [state])
    assert state.predicted_x0 is not None
    taken = (state.latents, state.predicted_x0)
    copies = tuple(tensor.clone() for tensor in taken)
    denoise_step(unet, [state])
    assert all(torch.equal(tensor, frozen) for tensor, frozen in zip(taken, copies, strict=True))


def test_states_survive_pickling_in_the_middle_of_a_run(unet: Denoiser) -> None:
    for sampler in SAMPLERS:
        state = make_state(make_schedule(CONFIG, sampler, 4))
        denoise_step(unet, [state])
        denoise_step(unet, [state])
        other: SampleState = pickle.loads(pickle.dumps(state))
        sample(unet, [state])
        sample(unet, [other])
        assert torch.equal(state.latents, other.latents)


def test_no_states_is_no_work() -> None:
    def never(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError

    denoise_step(never, [])
    sample(never, [])


def test_batch_of_unequal_latents_is_refused(unet: Denoiser) -> None:
    schedule = make_schedule(CONFIG, "ddim", 3)
    with pytest.raises(ConfigError, match=r"\(4, 8, 8\), \(4, 8, 16\).*must be equal"):
        denoise_step(unet, [make_state(schedule), make_state(schedule, hw=(8, 16))])


def test_batch_of_unequal_conditions_is_refused(unet: Denoiser) -> None:
    schedule = make_schedule(CONFIG, "ddim", 3)
    other = make_state(schedule)
    other.condition = other.null_condition = torch.zeros(9, 6)
    with pytest.raises(ConfigError, match=r"\(5, 6\), \(9, 6\).*must be equal"):
        denoise_step(unet, [make_state(schedule), other])


def test_a_done_state_is_refused(unet: Denoiser) -> None:
    state = make_state(make_schedule(CONFIG, "ddim", 1))
    denoise_step(unet, [state])
    with pytest.raises(ConfigError, match="at step 1 of 1"):
        denoise_step(unet, [state])


# Against the recorded runs of the original


@pytest.fixture(scope="module")
def vectors(reference_dir: Path) -> dict[str, Tensor]:
    return load_file(reference_dir / "vectors.safetensors")


@pytest.fixture(scope="module")
def reference_schedule(reference_dir: Path) -> Schedule:
    config = json.loads((reference_dir / "stable-diffusion/scheduler/scheduler_config.json").read_text())
    return make_schedule(config, "euler_ancestral", 10)


@pytest.fixture(scope="module")
def reference_unet(reference_dir: Path) -> Denoiser:
    config = json.loads((reference_dir / "stable-diffusion/unet/config.json").read_text())
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(torch.load(reference_dir / "mgie/unet.pt", weights_only=True))
    return as_denoiser(unet)


def reference_state(vectors: dict[str, Tensor], index: int, schedule: Schedule, *, seed: int = 13331) -> SampleState:
    return start(
        image_latents=vectors[f"gen{index}.image_latents"][0],
        condition=vectors[f"gen{index}.edit_features"][0],
        null_condition=vectors["gen.null_features"][0],
        schedule=schedule,
        text_scale=7.5,
        image_scale=1.5,
        seed=seed,
    )


def test_schedule_equals_the_recorded_one(vectors: dict[str, Tensor], reference_schedule: Schedule) -> None:
    assert torch.equal(torch.tensor(reference_schedule.timesteps), vectors["gen.scheduler_timesteps"])
    # One unit in the last place: powers and logarithms are rounded differently by different processors.
    torch.testing.assert_close(
        torch.tensor(reference_schedule.sigmas), vectors["gen.scheduler_sigmas"], rtol=1.2e-7, atol=0
    )


@pytest.mark.parametrize("index", range(4))
def test_generator_stream_equals_the_recorded_noise(
    vectors: dict[str, Tensor], reference_schedule: Schedule, index: int
) -> None:
    state = reference_state(vectors, index, reference_schedule)
    assert torch.equal(state.latents, vectors[f"gen{index}.init_latents"][0])
    for noise in vectors[f"gen{index}.step_noise"]:
        assert torch.equal(torch.randn((4, 8, 8), generator=state.generator), noise[0])


@pytest.mark.parametrize("index", range(4))
def test_trajectory_equals_the_recorded_one(
    vectors: dict[str, Tensor], reference_schedule: Schedule, reference_unet: Denoiser, index: int
) -> None:
    state = reference_state(vectors, index, reference_schedule)
    calls: list[tuple[Tensor, Tensor]] = []

    def recording(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        output = reference_unet(latents, timesteps, condition)
        calls.append((latents, output))
        return output

    for expected in vectors[f"gen{index}.step_latents"]:
        denoise_step(recording, [state])
        assert relative_error(state.latents, expected[0]) < 5e-5
    assert state.is_done
    assert relative_error(calls[0][0], vectors[f"gen{index}.unet_in_step0"]) < 1e-6
    assert relative_error(calls[0][1], vectors[f"gen{index}.unet_out_step0"]) < 5e-5


def test_recorded_samples_in_one_batch_at_different_steps_equal_their_recordings(
    vectors: dict[str, Tensor], reference_schedule: Schedule, reference_unet: Denoiser
) -> None:
    states = [reference_state(vectors, index, reference_schedule) for index in range(4)]
    for index, state in enumerate(states):
        for _ in range(index):
            denoise_step(reference_unet, [state])
    assert [state.step for state in states] == [0, 1, 2, 3]
    sample(reference_unet, states)
    for index, state in enumerate(states):
        assert relative_error(state.latents, vectors[f"gen{index}.step_latents"][-1][0]) < 5e-5


def test_given_noise_replaces_the_generators(
    vectors: dict[str, Tensor], reference_schedule: Schedule, reference_unet: Denoiser
) -> None:
    state = reference_state(vectors, 0, reference_schedule, seed=0)
    state.latents = vectors["gen0.init_latents"][0]
    state.given_noise = iter(vectors["gen0.step_noise"][:, 0])
    sample(reference_unet, [state])
    assert relative_error(state.latents, vectors["gen0.step_latents"][-1][0]) < 5e-5


# ---- what is kept


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_kept_latents_follow_the_source_at_each_level_and_are_the_source_at_the_end(
    unet: Denoiser, sampler: Sampler
) -> None:
    generator = torch.Generator().manual_seed(5)
    clean, noise = torch.randn(2, 4, 8, 8, generator=generator)
    where = torch.rand(1, 8, 8, generator=generator) < 0.5
    schedule = make_schedule(CONFIG, sampler, 5)
    state, free = make_state(schedule), make_state(schedule)
    state.frozen = FrozenRegion(where=where, clean=clean, noise=noise)
    scheduler = DIFFUSERS[sampler].from_config(CONFIG)
    scheduler.set_timesteps(5)
    for step in range(5):
        denoise_step(unet, [state, free])
        expected = clean
        if step < 4:
            timestep = scheduler.timesteps[step + 1 : step + 2]
            expected = scheduler.add_noise(clean[None], noise[None], timestep)[0]
        assert torch.allclose(state.latents[:, where[0]], expected[:, where[0]], atol=1e-5, rtol=1e-5)
        assert not torch.isclose(state.latents, expected)[:, ~where[0]].all()
    assert torch.equal(state.latents[:, where[0]], clean[:, where[0]])
    assert torch.equal(state.generator.get_state(), free.generator.get_state())


def test_where_nothing_is_kept_nothing_differs(unet: Denoiser) -> None:
    schedule = make_schedule(CONFIG, "euler_ancestral", 3)
    state, free = make_state(schedule), make_state(schedule)
    state.frozen = FrozenRegion(
        where=torch.zeros(1, 8, 8, dtype=torch.bool), clean=torch.zeros(4, 8, 8), noise=torch.zeros(4, 8, 8)
    )
    for one in (state, free):
        sample(unet, [one])
    assert torch.equal(state.latents, free.latents)
