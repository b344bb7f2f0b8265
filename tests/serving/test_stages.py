"""The stages as plain Python, against the one-process Editor as the slower reference."""

import asyncio
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgie.bundle.bundle import open_bundle
from mgie.config import ImageLimits
from mgie.editor import Editor
from mgie.errors import (
    BundleError,
    ConfigError,
    DeadlineError,
    EngineFullError,
    ImageError,
    ImageTooLargeError,
    MaskError,
    PromptError,
)
from mgie.images.files import read_image, read_metadata
from mgie.images.geometry import plan_framing
from serving.errors import ModelUnavailableError
from serving.stages.diffusion import DiffusionStage
from serving.stages.messages import Derived, RenderedEdit
from serving.stages.mllm import MLLMStage
from serving.stages.packing import unpack
from tests.serving.asking import ask
from tests.waiting import pass_time, until, until_async

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
# Three shapes of photo that the diffusion model works at in three sizes.
SHAPES = ((96, 64), (64, 96), (80, 80))


async def edit(
    mllm: MLLMStage, diffusion: DiffusionStage, image: bytes, prompt: str, *, seed: int, steps: int = 3
) -> tuple[Derived, RenderedEdit]:
    derived = await mllm.derive(image, ask(prompt))
    return derived, await diffusion.render(image, derived, ask(overrides={"steps": steps}, seed=seed))


def pixels(rendered: RenderedEdit, index: int = 0) -> np.ndarray:
    return np.asarray(read_image(rendered.images[index])).astype(int)


def test_an_edit_through_the_stages_equals_the_editor(
    random_bundle: Path, mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo
) -> None:
    image = photo(100, 60)
    derived, rendered = asyncio.run(edit(mllm, diffusion, image, "make it night", seed=5))
    expected = Editor.load(random_bundle, device="cpu").edit(read_image(image), "make it night", seed=5, steps=3)
    assert derived.expressive == expected.expressive
    assert (pixels(rendered) == np.asarray(expected.image)).all()
    assert (rendered.width, rendered.height) == (100, 60)
    assert rendered.settings == expected.settings
    assert read_metadata(rendered.images[0])["seed"] == "5"


def test_concurrent_edits_of_mixed_sizes_equal_those_sent_alone_and_no_batch_mixes_sizes(
    random_bundle: Path, photo: Photo
) -> None:
    mllm = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)
    diffusion = DiffusionStage(str(random_bundle), device="cpu")
    calls = [(photo(*SHAPES[i % 3], seed=i), f"make it {'very ' * (i % 4)}dark", i) for i in range(12)]

    async def together() -> list[tuple[Derived, RenderedEdit]]:
        return await asyncio.gather(*(edit(mllm, diffusion, image, prompt, seed=seed) for image, prompt, seed in calls))

    results = asyncio.run(together())
    [engine] = [one.engine for one in diffusion._pool.models().values()]
    batches = engine.recent_batches()
    mean_sizes = [asyncio.run(stage.stats()).work.mean_batch_size for stage in (mllm, diffusion)]
    assert min(mean_sizes) > 1.5
    assert sum(map(len, batches)) == 3 * len(calls)  # steps
    assert all(len(set(keys)) == 1 for keys in batches)
    config = open_bundle(random_bundle).config
    for (image, _, _), (_, rendered) in zip(calls, results, strict=True):
        framing = plan_framing(read_image(image).size, work_area_px=config.work_area_px, multiple_px=config.multiple_px)
        assert rendered.work_wh == framing.work_wh
    assert len({rendered.work_wh for _, rendered in results}) == 3
    for (image, prompt, seed), (derived, rendered) in zip(calls, results, strict=True):
        alone_derived, alone = asyncio.run(edit(mllm, diffusion, image, prompt, seed=seed))
        assert alone.run.mean_batch_size == alone_derived.run.batch_size == 1
        assert derived.expressive == alone_derived.expressive
        assert np.abs(pixels(rendered) - pixels(alone)).max() <= 2
    mllm.close()
    diffusion.close()


def test_given_and_generated_texts_do_not_share_a_batch(random_bundle: Path, photo: Photo) -> None:
    stage = MLLMStage(str(random_bundle), device="cpu")

    async def main() -> list[Derived]:
        texts = [None, "a dark sky"] * 4
        return await asyncio.gather(*(stage.derive(photo(seed=i), ask("p", text)) for i, text in enumerate(texts)))

    derived = asyncio.run(main())
    assert [d.expressive for d in derived[1::2]] == ["a dark sky"] * 4
    assert all(d.output_tokens > 0 for d in derived[::2])
    kinds: dict[int, set[str]] = {}
    for number, one in enumerate(derived):
        kinds.setdefault(one.run.batch, set()).add("given" if number % 2 else "generated")
    assert all(len(kind) == 1 for kind in kinds.values())
    assert len(kinds) < len(derived)  # there were batches to mix them in
    stage.close()


def test_a_bad_request_fails_alone(mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo) -> None:
    async def main() -> list[Derived | BaseException]:
        good, bad = photo(), photo()[:200]
        return await asyncio.gather(
            mllm.derive(good, ask("p")), mllm.derive(bad, ask("p")), mllm.derive(good, ask(" ")), mllm.derive(good, ask("p")),
            return_exceptions=True,
        )  # fmt: skip

    first, broken, blank, last = asyncio.run(main())
    assert isinstance(broken, ImageError)
    assert isinstance(blank, PromptError)
    assert isinstance(first, Derived)
    assert isinstance(last, Derived)
    assert torch.allclose(unpack(first).condition, unpack(last).condition, atol=1e-4)
    with pytest.raises(ConfigError, match="steps"):
        asyncio.run(diffusion.render(photo(), first, ask(overrides={"steps": 0})))
    asyncio.run(mllm.check_health())
    asyncio.run(diffusion.check_health())


def test_limits_of_the_service_hold_in_both_stages(random_bundle: Path, mllm: MLLMStage, photo: Photo) -> None:
    limits = ImageLimits(max_pixels=1000)
    strict_mllm = MLLMStage(str(random_bundle), device="cpu", limits=limits)
    strict_diffusion = DiffusionStage(str(random_bundle), device="cpu", limits=limits)
    derived = asyncio.run(mllm.derive(photo(), ask("p")))
    with pytest.raises(ImageTooLargeError):
        asyncio.run(strict_mllm.derive(photo(), ask("p")))
    with pytest.raises(ImageTooLargeError):
        asyncio.run(strict_diffusion.render(photo(), derived, ask()))
    strict_mllm.close()
    strict_diffusion.close()


def test_guidance_of_another_bundle_is_refused(mllm: MLLMStage, renamed_bundle: Path, photo: Photo) -> None:
    other = DiffusionStage(str(renamed_bundle), device="cpu")
    derived = asyncio.run(mllm.derive(photo(), ask("p")))
    with pytest.raises(BundleError, match="comes from bundle"):
        asyncio.run(other.render(photo(), derived, ask()))
    other.close()


def test_each_stage_loads_only_its_own_parts(random_bundle: Path, tmp_path: Path, photo: Photo) -> None:
    for parts in (("unet", "vae"), ("vision", "projector", "llm", "edit_head")):
        shutil.copytree(random_bundle, tmp_path / parts[0])
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


def test_several_images_of_one_edit_are_those_of_the_seeds_that_follow(
    mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo
) -> None:
    async def main() -> tuple[RenderedEdit, list[RenderedEdit]]:
        derived = await mllm.derive(photo(), ask("p"))

        async def render(seed: int, n: int) -> RenderedEdit:
            options = ask(overrides={"steps": 2}, seed=seed, n=n, deterministic=True)
            return await diffusion.render(photo(), derived, options)

        return await render(7, 3), [await render(seed, 1) for seed in (7, 8, 9)]

    together, alone = asyncio.run(main())
    assert together.images == [one.images[0] for one in alone]  # also the seeds in their metadata
    assert len(set(together.images)) == 3


def test_nothing_changes_where_the_mask_is_opaque(
    mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo, mask: Photo
) -> None:
    derived = asyncio.run(mllm.derive(photo(), ask("p")))
    options, allowed = ask(overrides={"steps": 3}), mask((20, 10, 70, 50))
    rendered = asyncio.run(diffusion.render(photo(), derived, options, mask=allowed))
    changed = (pixels(rendered) != np.asarray(read_image(photo()))).any(2)
    assert changed[10:50, 20:70].any()
    changed[10:50, 20:70] = False
    assert not changed.any()


def test_a_mask_that_cannot_be_used_is_named(
    mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo, mask: Photo
) -> None:
    derived = asyncio.run(mllm.derive(photo(), ask("p")))
    small, opaque, jpeg = mask((0, 0, 9, 9), size=(95, 64)), mask((0, 0, 0, 0)), photo(file_type="JPEG")
    for bad, words in (
        (small, "95x64 px; it must be 96x64"), (opaque, "no pixel to edit"), (photo(), "without transparency"),
        (jpeg, "mask is JPEG"), (b"", "unknown format"), (mask((0, 0, 9, 9))[:90], "mask"),
    ):  # fmt: skip
        with pytest.raises(MaskError, match=words) as caught:
            asyncio.run(diffusion.render(photo(), derived, ask(), mask=bad))
        assert caught.value.param == "mask"


def test_a_cancelled_or_overdue_edit_leaves_the_engine_within_a_step(
    mllm: MLLMStage, random_bundle: Path, photo: Photo
) -> None:
    stage = DiffusionStage(str(random_bundle), device="cpu")
    [engine] = [one.engine for one in stage._pool.models().values()]

    async def main() -> None:
        derived = await mllm.derive(photo(), ask("p"))
        long = ask(overrides={"steps": 1000}, n=10)  # more than any machine does in the times below
        task = asyncio.create_task(stage.render(photo(), derived, long))
        await until_async(lambda: engine.stats().num_steps)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (engine.stats().num_in_flight, engine.stats().num_denoising) == (0, 0)
        started = engine.stats().num_steps
        for timeout_s in (0.3, 1, 3, 9, 27):  # until it is enough for a first step on this machine
            with pytest.raises(DeadlineError):
                await stage.render(photo(), derived, long, timeout_s=timeout_s)
            assert (engine.stats().num_in_flight, engine.stats().num_denoising) == (0, 0)
            if engine.stats().num_steps > started:
                break
        _, after = await edit(mllm, stage, photo(), "p", seed=1)
        assert after.run.mean_batch_size == 1

    asyncio.run(main())
    stats = engine.stats()
    assert (stats.num_cancelled, stats.num_done) == (1, 1)
    assert stats.num_overdue >= 1
    assert stats.max_steps_after_end <= 1
    stage.close()


def test_guidance_whose_time_has_run_out_is_not_derived(random_bundle: Path, photo: Photo) -> None:
    stage = MLLMStage(str(random_bundle), device="cpu")
    may_go_on = threading.Event()
    [conditioner] = stage._pool.models().values()
    derive = conditioner.derive
    conditioner.derive = lambda requests, **given: may_go_on.wait() and derive(requests, **given)

    async def main() -> None:
        first = asyncio.create_task(stage.derive(photo(), ask("p")))
        await until_async(lambda: stage._worker.stats().num_running == 1)
        with pytest.raises(DeadlineError, match=r"0\.2 s"):
            await stage.derive(photo(), ask("q"), timeout_s=0.2)
        may_go_on.set()
        await first
        await stage.derive(photo(), ask("q"))

    asyncio.run(main())
    stats = stage._worker.stats()
    assert (stats.num_items, stats.num_dropped, stats.num_waiting) == (2, 1, 0)
    stage.close()


def test_a_full_engine_says_when_to_come_back_also_from_another_process(
    mllm: MLLMStage, random_bundle: Path, photo: Photo
) -> None:
    stage = DiffusionStage(str(random_bundle), device="cpu", max_pixels_in_flight=60_000, max_waiting=1)
    refused: list[EngineFullError] = []
    [one] = stage._pool.models().values()
    denoiser = one.renderer.denoiser

    def held(*args: Any, **given: Any) -> Any:
        until(lambda: len(refused) == 2)  # else the first might be done before the last have come
        return denoiser(*args, **given)

    one.renderer.denoiser = held

    async def main() -> None:
        derived = await mllm.derive(photo(), ask("p"))

        async def render() -> RenderedEdit | None:
            try:
                return await stage.render(photo(), derived, ask(overrides={"steps": 5}))
            except EngineFullError as error:
                refused.append(error)
                return None

        answers = await asyncio.gather(*(render() for _ in range(4)))
        assert sum(answer is None for answer in answers) == 2

    asyncio.run(main())
    copy = pickle.loads(pickle.dumps(refused[0]))
    assert (str(copy), copy.retry_after_s) == (str(refused[0]), refused[0].retry_after_s)
    stage.close()


@pytest.mark.parametrize("kind", [MLLMStage, DiffusionStage])
def test_a_dead_worker_is_unhealthy(random_bundle: Path, kind: type[MLLMStage | DiffusionStage]) -> None:
    stage = kind(str(random_bundle), device="cpu")
    asyncio.run(stage.check_health())
    stage.close()
    with pytest.raises(RuntimeError, match="has ended"):
        asyncio.run(stage.check_health())


def test_the_number_of_threads_is_fixed_where_the_model_runs(random_bundle: Path, photo: Photo) -> None:
    before = torch.get_num_threads()
    stage = MLLMStage(str(random_bundle), device="cpu", num_threads=2)
    seen = []
    [conditioner] = stage._pool.models().values()
    derive = conditioner.derive

    def record(*args: object, **given: object) -> object:
        seen.append(torch.get_num_threads())
        return derive(*args, **given)

    conditioner.derive = record
    asyncio.run(stage.derive(photo(), ask("p")))
    stage.close()
    torch.set_num_threads(before)
    assert seen == [2]


def test_an_edit_asked_for_again_takes_its_guidance_from_the_cache(random_bundle: Path, photo: Photo) -> None:
    stage = MLLMStage(str(random_bundle), device="cpu")

    async def main() -> list[Derived]:
        one = await stage.derive(photo(), ask("p"))
        given = (photo(), ask("p", "given"))
        calls = ((photo(), ask("p")), (photo(), ask("q")), (photo(seed=1), ask("p")), given, given)
        return [
            one,
            *[await stage.derive(*call) for call in calls],
            await stage.derive(photo(), ask("p", deterministic=True)),
        ]

    one, again, *others = asyncio.run(main())
    assert again.run is None
    assert torch.equal(unpack(one).condition, unpack(again).condition)
    assert all(other.run is not None for other in others)
    cache = asyncio.run(stage.stats()).cache
    assert cache is not None
    assert (cache.num_hits, cache.num_misses, cache.num_entries) == (1, 4, 4)  # a given text is not looked for
    stage.close()


def test_edits_that_run_together_are_derived_once_where_they_are_equal(mllm: MLLMStage, photo: Photo) -> None:
    async def main() -> list[Derived]:
        return await asyncio.gather(*(mllm.derive(photo(seed=7), ask("equal")) for _ in range(3)))

    derived = asyncio.run(main())
    assert sorted(one.run is None for one in derived) == [False, True, True]
    assert torch.equal(unpack(derived[0]).condition, unpack(derived[2]).condition)


def test_prompts_of_one_length_share_a_batch_and_a_deterministic_edit_has_its_own(
    random_bundle: Path, photo: Photo
) -> None:
    stage = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)

    async def main() -> list[Derived]:
        return await asyncio.gather(
            *(stage.derive(photo(seed=i), ask("make it dark" + " very" * 80 * (i % 2))) for i in range(6)),
            *(stage.derive(photo(seed=i), ask("make it dark", deterministic=True)) for i in range(6, 8)),
        )

    derived = asyncio.run(main())
    runs = [one.run for one in derived if one.run]
    assert len(runs) == 8
    assert {run.batch for run in runs[:6:2]}.isdisjoint(run.batch for run in runs[1:6:2])
    assert max(run.batch_size for run in runs[:6]) > 1
    assert {run.batch_size for run in runs[6:]} == {1}
    stage.close()


@pytest.mark.parametrize("ends", ["cancel", "deadline"])
def test_a_derivation_that_nobody_waits_for_leaves_its_batch_within_a_token(
    random_bundle: Path, photo: Photo, ends: str
) -> None:
    stage = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)
    [conditioner] = stage._pool.models().values()
    rows: list[int] = []
    all_wait, gone = threading.Event(), threading.Event()
    model = conditioner._mllm.llm.model

    def record(module: object, args: object, output: object) -> None:
        rows.append(len(output.last_hidden_state))
        if len(rows) == 1:
            all_wait.wait()  # so that the others make one batch
        if rows.count(3) == 4:
            gone.wait()  # a pass is running while the caller goes

    hook = model.register_forward_hook(record)

    async def main() -> tuple[list[Derived], list[Derived]]:
        blocker = asyncio.create_task(stage.derive(photo(seed=9), ask("first", "given")))
        await until_async(lambda: len(rows) == 1)
        timeout_s = 1000.0 if ends == "deadline" else None
        tasks = [asyncio.create_task(stage.derive(photo(seed=i), ask(f"edit {i}"))) for i in (0, 1)]
        leaver = asyncio.create_task(stage.derive(photo(seed=2), ask("edit 2"), timeout_s=timeout_s))
        await until_async(lambda: stage._worker.stats().num_waiting == 3)
        all_wait.set()
        await blocker
        await until_async(lambda: rows.count(3) == 4)
        if ends == "cancel":
            leaver.cancel()
        else:
            pass_time(1000.0)
        with pytest.raises(asyncio.CancelledError if ends == "cancel" else DeadlineError):
            await leaver
        num_running = stage._worker.stats().num_running
        gone.set()
        together = await asyncio.gather(*tasks)
        assert num_running == 2
        hook.remove()
        return together, [await stage.derive(photo(seed=i), ask(f"edit {i}")) for i in (0, 1)]

    together, alone = asyncio.run(main())
    start = rows.index(3)
    assert rows[start : start + 4] == [3, 3, 3, 3]
    assert set(rows[start + 4 :]) <= {1, 2}
    for one, other in zip(together, alone, strict=True):
        assert one.expressive == other.expressive
        assert torch.allclose(unpack(one).condition, unpack(other).condition, atol=1e-4)
    assert asyncio.run(stage.stats()).work.num_cancelled == 1
    stage.close()


@pytest.mark.parametrize("max_loaded", [1, 2])
def test_two_bundles_under_alternating_load_equal_each_served_alone(
    random_bundle: Path, renamed_bundle: Path, photo: Photo, max_loaded: int
) -> None:
    given = {"device": "cpu", "max_loaded": max_loaded}
    mllm = MLLMStage(str(random_bundle), [str(renamed_bundle)], cache_bytes=0, **given)
    diffusion = DiffusionStage(str(random_bundle), [str(renamed_bundle)], **given)
    names = [info.name for info in asyncio.run(mllm.models())]
    assert names == [info.name for info in asyncio.run(diffusion.models())]
    assert names[1] == "renamed"

    async def edited(i: int) -> RenderedEdit:
        model = names[i % 2]
        derived = await mllm.derive(photo(seed=i), ask("p", model=model))
        options = ask(model=model, overrides={"steps": 3}, seed=i, deterministic=True)
        return await diffusion.render(photo(seed=i), derived, options)

    async def main() -> list[RenderedEdit]:
        return await asyncio.gather(*map(edited, range(6)))

    together = asyncio.run(main())
    for i in (0, 2, 4, 1, 3, 5):
        info = asyncio.run(diffusion.models())[i % 2]
        assert read_metadata(together[i].images[0])["bundle"] == info.identity
        assert np.abs(pixels(together[i]) - pixels(asyncio.run(edited(i)))).max() <= 2
    for stage in (mllm, diffusion):
        stats = asyncio.run(stage.stats())
        assert len(stats.loaded) == max_loaded
        asyncio.run(stage.check_health())
    work = asyncio.run(diffusion.stats()).work
    assert (work.num_done, work.num_in_flight, work.num_failed) == (12, 0, 0)  # those of closed engines count
    mllm.close()
    diffusion.close()


def test_a_bundle_that_cannot_be_loaded_fails_its_own_edits_by_name(
    random_bundle: Path, renamed_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    shutil.copytree(renamed_bundle, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "llm")
    stage = MLLMStage(str(random_bundle), [str(tmp_path / "broken")], device="cpu")

    async def main() -> None:
        good, bad = await asyncio.gather(
            stage.derive(photo(), ask("p")), stage.derive(photo(), ask("p", model="renamed")), return_exceptions=True
        )
        assert isinstance(good, Derived)
        assert isinstance(bad, ModelUnavailableError)
        assert "model 'renamed' cannot be loaded" in str(bad)
        with pytest.raises(ConfigError, match="model is 'other'; it must be one of"):
            await stage.derive(photo(), ask("p", model="other"))

    asyncio.run(main())
    asyncio.run(stage.check_health())
    stage.close()


def test_bundles_of_one_name_are_refused(random_bundle: Path) -> None:
    with pytest.raises(BundleError, match="names must differ"):
        MLLMStage(str(random_bundle), [str(random_bundle)], device="cpu")


def test_both_stages_serve_the_patient_after_those_who_come_later(
    random_bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)
    diffusion = DiffusionStage(str(random_bundle), device="cpu", max_pixels_in_flight=3 * 160 * 112)
    may_begin, work = threading.Event(), mllm._worker._work
    ended: list[str] = []

    def held(*args: Any) -> Any:
        may_begin.wait()
        return work(*args)

    monkeypatch.setattr(mllm._worker, "_work", held)

    async def derive(name: str, queue_delay_s: float) -> None:
        await mllm.derive(photo(), ask(name, deterministic=True, queue_delay_s=queue_delay_s))
        ended.append(name)

    async def render(name: str, queue_delay_s: float, derived: Derived, steps: int) -> None:
        options = ask(overrides={"steps": steps}, queue_delay_s=queue_delay_s)
        await diffusion.render(photo(), derived, options)
        ended.append(name)

    def in_line(stage: MLLMStage | DiffusionStage, num: int) -> Callable[[], bool]:
        stats = stage._worker.stats if isinstance(stage, MLLMStage) else stage._pool.models()["random"].engine.stats
        inside = "num_running" if isinstance(stage, MLLMStage) else "num_in_flight"
        return lambda: (stats().num_waiting, getattr(stats(), inside)) == (num, 1)

    async def main() -> None:
        tasks = []
        for number, (name, queue_delay_s) in enumerate((("first", 0.0), ("patient", 60.0), ("later", 0.0))):
            tasks.append(asyncio.create_task(derive(name, queue_delay_s)))
            await until_async(in_line(mllm, number))
        may_begin.set()
        await asyncio.gather(*tasks)
        assert ended == ["first", "later", "patient"]
        ended.clear()
        derived = await mllm.derive(photo(), ask("p"))
        first = asyncio.create_task(render("first", 0.0, derived, 1000))
        await until_async(in_line(diffusion, 0))
        tasks = []
        for number, (name, queue_delay_s) in enumerate((("patient", 60.0), ("later", 0.0)), 1):
            tasks.append(asyncio.create_task(render(name, queue_delay_s, derived, 1)))
            await until_async(in_line(diffusion, number))
        first.cancel()
        await asyncio.gather(*tasks)
        assert ended == ["later", "patient"]

    asyncio.run(main())
    mllm.close()
    diffusion.close()
