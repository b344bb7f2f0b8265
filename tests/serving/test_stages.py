"""The stages as plain Python, against the one-process Editor as the slower reference."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mgie.bundles import open_bundle
from mgie.config import ImageLimits
from mgie.editor import Editor
from mgie.errors import BundleError, ConfigError, ImageError, ImageTooLargeError, PromptError
from mgie.images import plan_framing, read_image, read_metadata
from serving.stages import Derived, DiffusionStage, MLLMStage, RenderedEdit

Photo = Callable[..., bytes]
# Three shapes of photo that the diffusion model works at in three sizes.
SHAPES = ((96, 64), (64, 96), (80, 80))


async def edit(
    mllm: MLLMStage, diffusion: DiffusionStage, image: bytes, prompt: str, *, seed: int, steps: int = 3
) -> tuple[Derived, RenderedEdit]:
    derived = await mllm.derive(image, prompt)
    return derived, await diffusion.render(image, derived, overrides={"steps": steps}, seed=seed)


def pixels(rendered: RenderedEdit) -> np.ndarray:
    return np.asarray(read_image(rendered.data)).astype(int)


def test_an_edit_through_the_stages_equals_the_editor(
    tiny_bundle: Path, mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo
) -> None:
    image = photo(100, 60)
    derived, rendered = asyncio.run(edit(mllm, diffusion, image, "make it night", seed=5))
    expected = Editor.load(tiny_bundle, device="cpu").edit(read_image(image), "make it night", seed=5, steps=3)
    assert derived.guidance.expressive == expected.expressive
    assert (pixels(rendered) == np.asarray(expected.image)).all()
    assert (rendered.width, rendered.height) == (100, 60)
    assert rendered.settings == expected.settings
    assert read_metadata(rendered.data)["seed"] == "5"


def test_concurrent_edits_of_mixed_sizes_equal_those_sent_alone_and_no_batch_mixes_sizes(
    tiny_bundle: Path, photo: Photo
) -> None:
    mllm, diffusion = MLLMStage(str(tiny_bundle), device="cpu"), DiffusionStage(str(tiny_bundle), device="cpu")
    calls = [(photo(*SHAPES[i % 3], seed=i), f"make it {'very ' * (i % 4)}dark", i) for i in range(12)]

    async def together() -> list[tuple[Derived, RenderedEdit]]:
        return await asyncio.gather(*(edit(mllm, diffusion, image, prompt, seed=seed) for image, prompt, seed in calls))

    results = asyncio.run(together())
    batches = diffusion.recent_batches()
    mean_sizes = [asyncio.run(stage.stats()).batches.mean_batch_size for stage in (mllm, diffusion)]
    assert min(mean_sizes) > 1.5
    assert sum(map(len, batches)) == len(calls)
    assert all(len(set(keys)) == 1 for keys in batches)
    # The same, worked out here and not taken from the stage's own keys.
    config = open_bundle(tiny_bundle).config
    sizes_by_batch: dict[int, set[tuple[int, int]]] = {}
    for (image, _, _), (_, rendered) in zip(calls, results, strict=True):
        framing = plan_framing(read_image(image).size, work_area_px=config.work_area_px, multiple_px=config.multiple_px)
        assert rendered.work_wh == framing.work_wh
        sizes_by_batch.setdefault(rendered.run.run.batch, set()).add(framing.work_wh)
    assert len({size for sizes in sizes_by_batch.values() for size in sizes}) == 3
    assert all(len(sizes) == 1 for sizes in sizes_by_batch.values())
    for (image, prompt, seed), (derived, rendered) in zip(calls, results, strict=True):
        alone_derived, alone = asyncio.run(edit(mllm, diffusion, image, prompt, seed=seed))
        assert alone.run.run.batch_size == alone_derived.run.run.batch_size == 1
        assert derived.guidance.expressive == alone_derived.guidance.expressive
        assert np.abs(pixels(rendered) - pixels(alone)).max() <= 2
    mllm.close()
    diffusion.close()


def test_given_and_generated_texts_do_not_share_a_batch(tiny_bundle: Path, photo: Photo) -> None:
    stage = MLLMStage(str(tiny_bundle), device="cpu")

    async def main() -> list[Derived]:
        texts = [None, "a dark sky"] * 4
        return await asyncio.gather(*(stage.derive(photo(), "p", text) for text in texts))

    derived = asyncio.run(main())
    assert [d.guidance.expressive for d in derived[1::2]] == ["a dark sky"] * 4
    assert all(d.guidance.output_tokens > 0 for d in derived[::2])
    kinds: dict[int, set[str]] = {}
    for number, one in enumerate(derived):
        kinds.setdefault(one.run.run.batch, set()).add("given" if number % 2 else "generated")
    assert all(len(kind) == 1 for kind in kinds.values())
    assert len(kinds) < len(derived)  # there were batches to mix them in
    stage.close()


def test_a_bad_request_fails_alone(mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo) -> None:
    async def main() -> list[Derived | BaseException]:
        good, bad = photo(), photo()[:200]
        return await asyncio.gather(
            mllm.derive(good, "p"), mllm.derive(bad, "p"), mllm.derive(good, " "), mllm.derive(good, "p"),
            return_exceptions=True,
        )  # fmt: skip

    first, broken, blank, last = asyncio.run(main())
    assert isinstance(broken, ImageError)
    assert isinstance(blank, PromptError)
    assert isinstance(first, Derived)
    assert isinstance(last, Derived)
    assert torch.allclose(first.guidance.condition, last.guidance.condition, atol=1e-4)
    with pytest.raises(ConfigError, match="steps"):
        asyncio.run(diffusion.render(photo(), first, overrides={"steps": 0}, seed=1))
    mllm.check_health()
    diffusion.check_health()


def test_limits_of_the_service_hold_in_both_stages(tiny_bundle: Path, mllm: MLLMStage, photo: Photo) -> None:
    limits = ImageLimits(max_pixels=1000)
    strict_mllm = MLLMStage(str(tiny_bundle), device="cpu", limits=limits)
    strict_diffusion = DiffusionStage(str(tiny_bundle), device="cpu", limits=limits)
    derived = asyncio.run(mllm.derive(photo(), "p"))
    with pytest.raises(ImageTooLargeError):
        asyncio.run(strict_mllm.derive(photo(), "p"))
    with pytest.raises(ImageTooLargeError):
        asyncio.run(strict_diffusion.render(photo(), derived, overrides={}, seed=1))
    strict_mllm.close()
    strict_diffusion.close()


def test_guidance_of_another_bundle_is_refused(mllm: MLLMStage, renamed_bundle: Path, photo: Photo) -> None:
    other = DiffusionStage(str(renamed_bundle), device="cpu")
    derived = asyncio.run(mllm.derive(photo(), "p"))
    with pytest.raises(BundleError, match="guidance comes from bundle"):
        asyncio.run(other.render(photo(), derived, overrides={"steps": 1}, seed=1))
    other.close()


def test_each_stage_loads_only_its_own_parts(tiny_bundle: Path, tmp_path: Path, photo: Photo) -> None:
    for parts in (("unet", "vae"), ("vision", "projector", "llm", "edit_head")):
        shutil.copytree(tiny_bundle, tmp_path / parts[0])
        for part in parts:
            shutil.rmtree(tmp_path / parts[0] / part)
    mllm = MLLMStage(str(tmp_path / "unet"), device="cpu")
    diffusion = DiffusionStage(str(tmp_path / "vision"), device="cpu")
    _, rendered = asyncio.run(edit(mllm, diffusion, photo(), "p", seed=1))
    assert (rendered.width, rendered.height) == (96, 64)
    with pytest.raises(BundleError):
        MLLMStage(str(tmp_path / "vision"), device="cpu")
    with pytest.raises(BundleError):
        DiffusionStage(str(tmp_path / "unet"), device="cpu")
    mllm.close()
    diffusion.close()


def test_a_dead_worker_is_unhealthy(tiny_bundle: Path) -> None:
    stage = MLLMStage(str(tiny_bundle), device="cpu")
    stage.check_health()
    stage.close()
    with pytest.raises(RuntimeError, match="has ended"):
        stage.check_health()


def test_the_number_of_threads_is_fixed_where_the_model_runs(tiny_bundle: Path, photo: Photo) -> None:
    before = torch.get_num_threads()
    stage = MLLMStage(str(tiny_bundle), device="cpu", num_threads=2)
    seen = []
    derive = stage._conditioner.derive

    def record(*args: object) -> object:
        seen.append(torch.get_num_threads())
        return derive(*args)

    stage._conditioner.derive = record
    asyncio.run(stage.derive(photo(), "p"))
    stage.close()
    torch.set_num_threads(before)
    assert seen == [2]
