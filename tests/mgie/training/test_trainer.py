"""The loop: independence of micro-batches and workers, exact resuming, skipped steps, the recorded reference."""

import contextlib
import json
import multiprocessing
import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgie.bundle.bundle import Bundle
from mgie.bundle.convert import convert
from mgie.bundle.embedded import EmbeddedName, ensure_bundle
from mgie.bundle.record import encoder_identity
from mgie.config import ObjectiveConfig, OptimizerConfig, Sources, TrainingConfig, Variant
from mgie.data.examples import Examples
from mgie.data.latent_cache import CacheSpec, finish_cache, list_shards, write_shard
from mgie.data.latent_reader import LatentCache
from mgie.data.loader import MicroBatch
from mgie.errors import ConfigError, TrainingError
from mgie.evaluation.parity import _Comparison
from mgie.model.batch import TrainingBatch
from mgie.model.mgie import LatentDiffusion
from mgie.model.mllm import MLLM
from mgie.storage.folder import open_folder
from mgie.training.checkpoint import write_snapshot
from mgie.training.distributed import Alone, Sharded
from mgie.training.export import export_bundle, read_trained
from mgie.training.trainer import StepRecord, Trainer, TrainerState, accumulate_gradients
from mgie.training.variants import load_training_model
from tests.mgie.training_rows import draw_rows, make_trainer, open_rows

pytestmark = pytest.mark.slow

CONFIG = TrainingConfig(
    steps=6,
    global_batch=6,
    micro_batch=3,
    image_side_px=32,
    optimizer=OptimizerConfig(lr_tokens=1e-3, lr_edit_head=1e-3, lr_unet=1e-3, warmup=0.3, ema_decay=0.9),
    objective=ObjectiveConfig(condition_dropout=0.2),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of many small operations; threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> Examples:
    return open_rows(folder)


def _run(bundle: Bundle, rows: Examples, config: TrainingConfig, **options: Any) -> tuple[list[StepRecord], Trainer]:
    records: list[StepRecord] = []
    trainer = make_trainer(bundle, rows, config, on_step=records.append, **options)
    list(trainer.run(config.steps))
    return records, trainer


@pytest.fixture(scope="module")
def plain(random_bundle: Bundle, rows: Examples) -> tuple[list[StepRecord], TrainerState]:
    """What the undisturbed run of CONFIG tells, and where it ends."""
    records, trainer = _run(random_bundle, rows, CONFIG)
    return records, trainer.state()


def _losses(records: list[StepRecord]) -> list[tuple[float, ...]]:
    return [(r.loss, r.instruction, r.edit, r.grad_norm) for r in records]


def _close(ours: list[StepRecord], theirs: list[StepRecord], rel: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(_losses(ours), _losses(theirs), strict=True):
        assert a == pytest.approx(b, rel=rel)


# ---- what a step computes


def test_the_size_of_micro_batches_changes_rounding_only(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, dtype="float64", steps=2)
    whole, _ = _run(random_bundle, rows, replace(config, micro_batch=6))
    for size in (1, 4):
        parts, _ = _run(random_bundle, rows, replace(config, micro_batch=size))
        _close(parts, whole, rel=1e-10)


def test_options_that_save_time_or_memory_change_rounding_only(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, steps=2)
    plain, _ = _run(random_bundle, rows, config)
    for other in (replace(config, gradient_checkpointing=True), replace(config, channels_last=True)):
        _close(_run(random_bundle, rows, other)[0], plain, rel=1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.endure)])
def test_compiled_blocks_change_rounding_only(
    random_bundle: Bundle, rows: Examples, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The eager backend captures the blocks as the usual one does, which takes minutes to write their code."""
    seen = []

    def compiled(block: Any, **options: Any) -> None:
        seen.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    config = replace(CONFIG, steps=2)
    _close(_run(random_bundle, rows, replace(config, compile=True))[0], _run(random_bundle, rows, config)[0], rel=1e-4)
    assert seen


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(
    random_bundle: Bundle, rows: Examples, plain: tuple[list[StepRecord], TrainerState]
) -> None:
    half, trainer = _run(random_bundle, rows, replace(CONFIG, dtype="bfloat16"))
    _close(half, plain[0], rel=2e-2)
    assert _losses(half) != _losses(plain[0])
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    assert {dtypes[name] for name in trainer.optimization.parameters} == {torch.float32}
    assert dtypes["mllm.llm.model.norm.weight"] == torch.bfloat16
    assert dtypes["vae.autoencoder.quant_conv.weight"] == torch.float32


def test_training_lowers_the_losses(random_bundle: Bundle, rows: Examples) -> None:
    records, _ = _run(random_bundle, rows, replace(CONFIG, steps=25))
    first, last = (sum(r.loss for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last < 0.8 * first


class _Waits(TorchDispatchMode):
    """Counts the operations that bring a number from the device to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_once_a_step_and_that_for_what_is_told(
    random_bundle: Bundle, rows: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(random_bundle, rows, CONFIG)
    work = next(trainer._loader.steps(0, 1))
    # What the CPU alone is asked, where it does not wait: whether the rows hold their placeholders.
    monkeypatch.setattr(MLLM, "_check_placeholders", lambda *args: None)
    with _Waits() as waits:
        trainer._train(work)
    assert waits.seen == []
    with _Waits() as waits:
        trainer._tell(keep=0)
    assert waits.seen != []


def test_min_snr_changes_the_edit_loss_alone(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, steps=1)
    [plain], _ = _run(random_bundle, rows, config)
    [weighted], _ = _run(random_bundle, rows, replace(config, objective=replace(CONFIG.objective, min_snr_gamma=5.0)))
    assert weighted.edit < plain.edit
    assert weighted.instruction == plain.instruction


def test_weight_on_changed_places_changes_the_edit_loss_alone(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, steps=1)
    [plain], _ = _run(random_bundle, rows, config)
    [weighted], _ = _run(random_bundle, rows, replace(config, objective=replace(CONFIG.objective, change_weight=4.0)))
    assert plain.edit < weighted.edit < 5 * plain.edit
    assert weighted.instruction == plain.instruction


# ---- variants


def test_the_llm_without_eyes_trains_and_does_not_look(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, variant="lgie", steps=2)
    made = load_training_model(random_bundle, config, device="cpu")
    assert made.clip_pixels is None
    records, trainer = _run(random_bundle, rows, config)
    assert all(r.is_finite and r.instruction > 0 for r in records)
    assert not any("vision" in name or "projector" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize("variant", ["ft", "ip2p"])
def test_text_variants_train_the_unet_alone(variant: Variant, rows: Examples) -> None:
    bundle = Bundle(ensure_bundle("random-ip2p"))
    records, trainer = _run(bundle, rows, replace(CONFIG, variant=variant, steps=3))
    assert {name.split(".")[0] for name in trainer.optimization.parameters} == {"unet"}
    assert all(r.instruction == 0 and r.loss == r.edit for r in records)


@pytest.mark.parametrize(
    ("variant", "rate", "part"),
    [("e2e", "lr_llm", "mllm.llm.model.layers."), ("ip2p", "lr_text_encoder", "text_encoder.")],
)
def test_what_understands_words_trains_where_it_is_given_a_rate(
    variant: Variant, rate: str, part: str, rows: Examples, tmp_path: Path
) -> None:
    bundle: EmbeddedName = "random" if variant == "e2e" else "random-ip2p"
    opened = Bundle(ensure_bundle(bundle))
    optimizer = replace(CONFIG.optimizer, **{rate: 1e-3}, ema_decay=0.0)
    _, trainer = _run(opened, rows, replace(CONFIG, variant=variant, steps=2, optimizer=optimizer))
    frozen = load_training_model(opened, replace(CONFIG, variant=variant), device="cpu").model
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad and name.startswith(part)}
    assert trained
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if name.startswith(part))
    before, after = dict(frozen.named_parameters()), dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    # And it is in the bundle that comes of it.
    weights = trainer.optimization.weights()
    snapshot = write_snapshot(
        tmp_path / "step", step=2, variant=variant, base=opened.identity, base_bundle=bundle, config={}, data="",
        data_names=(), metrics={}, trainable=weights, ema=None, optimizer={"step.x": torch.tensor(1.0)},
    )  # fmt: skip
    made = export_bundle(read_trained(snapshot.folder), opened, tmp_path / "bundle")
    again = load_training_model(made, replace(CONFIG, variant=variant), device="cpu").model
    assert all(torch.equal(p, after[name]) for name, p in again.named_parameters() if name in trained)


def test_ft_reads_the_expressive_and_ip2p_the_brief_instruction(rows: Examples) -> None:
    bundle = Bundle(ensure_bundle("random-ip2p"))
    words = [("make it night", "The sky would be dark.")]
    expected: dict[Variant, str] = {"ft": words[0][1], "fz": words[0][1], "ip2p": words[0][0]}
    tokenizer, _ = bundle.load_text_encoder()
    for variant, text in expected.items():
        made = load_training_model(bundle, replace(CONFIG, variant=variant), device="cpu")
        ids = made.collate(words).input_ids[0].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_nothing_of_the_frozen_baseline_trains() -> None:
    made = load_training_model(Bundle(ensure_bundle("random-ip2p")), replace(CONFIG, variant="fz"), device="cpu")
    assert not any(p.requires_grad for p in made.model.parameters())


def test_a_variant_needs_a_bundle_of_its_kind(random_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="variant ft trains a bundle with conditioner 'text'"):
        load_training_model(random_bundle, replace(CONFIG, variant="ft"), device="cpu")
    with pytest.raises(ConfigError, match="variant e2e trains a bundle with conditioner 'mllm'"):
        load_training_model(Bundle(ensure_bundle("random-ip2p")), CONFIG, device="cpu")


# ---- going on


@pytest.mark.parametrize(
    ("options", "stops"),
    [({}, (1, 4)), ({"channels_last": True}, (2,)), ({"dtype": "bfloat16", "gradient_checkpointing": True}, (2,))],
)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    random_bundle: Bundle,
    rows: Examples,
    options: dict[str, Any],
    stops: tuple[int, ...],
    plain: tuple[list[StepRecord], TrainerState],
) -> None:
    config = replace(CONFIG, **options, steps=4) if options else CONFIG
    if options:
        whole, trainer = _run(random_bundle, rows, config)
        end = trainer.state()
    else:
        whole, end = plain
    for stop in stops:
        first = make_trainer(random_bundle, rows, config)
        list(first.run(stop))
        state = first.state()
        records: list[StepRecord] = []
        second = make_trainer(random_bundle, rows, config, on_step=records.append)
        second.restore(state)
        list(second.run(config.steps))
        assert _losses(records) == _losses(whole)[stop:]
        _equal_states(second.state(), end)


def _equal_states(ours: TrainerState, theirs: TrainerState) -> None:
    assert (ours.step, ours.num_skipped) == (theirs.step, theirs.num_skipped)
    for name in ("weights", "average", "moments"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.keys() == b.keys() != set()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_looking_does_not_change_the_run(
    random_bundle: Bundle, rows: Examples, plain: tuple[list[StepRecord], TrainerState]
) -> None:
    """Validation puts the averaged weights in place, and takes them away again."""
    records: list[StepRecord] = []
    trainer = make_trainer(random_bundle, rows, CONFIG, on_step=records.append)
    made = load_training_model(random_bundle, CONFIG, device="cpu")
    maker = made.batch_maker([rows], CONFIG)
    loader = trainer._loader
    seen = []
    for step in trainer.run(CONFIG.steps):
        parts = [maker(part, is_validation=True) for part in loader.places(0)]
        seen.append(trainer.validate(parts))
        assert step == len(seen)
    assert _losses(records) == _losses(plain[0])
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert seen[0]["loss"] == pytest.approx(seen[0]["instruction"] + 0.5 * seen[0]["edit"])


def test_validation_is_a_mean_whatever_the_micro_batches(random_bundle: Bundle, rows: Examples) -> None:
    trainer = make_trainer(random_bundle, rows, CONFIG)
    maker = load_training_model(random_bundle, CONFIG, device="cpu").batch_maker([rows], CONFIG)
    places = [place for part in trainer._loader.places(0) for place in part]
    means = [
        trainer.validate([maker(places[i : i + size], is_validation=True) for i in range(0, 6, size)])
        for size in (1, 4, 6)
    ]
    for other in means[1:]:
        assert other == pytest.approx(means[0], rel=1e-5)


# ---- steps that are not finite


def _poison(calls: set[int]) -> Callable[[LatentDiffusion], None]:
    """Makes the loss of the forward passes with these numbers not a number."""

    def change(model: LatentDiffusion) -> None:
        count = iter(range(10**6))

        def hook(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:  # torch's signature
            return output * float("nan") if next(count) in calls else output

        model.unet.conv_out.register_forward_hook(hook)

    return change


def test_one_bad_step_is_skipped_and_the_run_goes_on(random_bundle: Bundle, rows: Examples) -> None:
    records, trainer = _run(random_bundle, rows, CONFIG, change=_poison({2}))  # two micro-batches a step
    assert [r.is_finite for r in records] == [True, False, True, True, True, True]
    assert trainer.state().num_skipped == 1
    assert all(torch.isfinite(value).all() for value in trainer.state().weights.values())
    assert {float(v) for k, v in trainer.state().moments.items() if k.startswith("step.")} == {5.0}


def test_bad_steps_in_a_row_stop_the_run_and_name_the_samples(random_bundle: Bundle, rows: Examples) -> None:
    config = replace(CONFIG, max_skipped=3)
    trainer = make_trainer(random_bundle, rows, config, change=_poison({3, 5, 7}))
    bad = trainer._loader.places(3)[1]  # the second micro-batch of the step in which it ends
    with pytest.raises(TrainingError, match="3 steps in a row were not finite, the last is step 4") as caught:
        list(trainer.run(config.steps))
    assert f"samples with such a loss: {', '.join(str(rows.row(place.row).id) for place in bad)}." in str(caught.value)


# ---- against the recorded original, through this very step


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_recorded_losses_and_gradients(
    reference_dir: Path, tmp_path: Path, is_cached: bool, micro_batch: int
) -> None:
    """Each micro-batch is cut out of the recorded batch, so padding and global means are put to the test, too."""
    sources = Sources(
        llava=reference_dir / "llava",
        clip=reference_dir / "clip",
        stable_diffusion=reference_dir / "stable-diffusion",
        mgie=reference_dir / "mgie",
    )
    bundle = convert(tmp_path / "bundle", sources)
    record = json.loads((reference_dir / "vectors.json").read_text())
    vectors = load_file(reference_dir / "vectors.safetensors")
    comparison = _Comparison(reference_dir, record, vectors, bundle)
    samples, draws = record["train_samples"], comparison._draws(vectors["train.prob_nodrop"])
    mgie = comparison.mgie
    micro_batches = []
    for start in range(0, len(samples), micro_batch):
        part = slice(start, start + micro_batch)
        words, images = comparison._batch(samples[part])
        batch = TrainingBatch(words=words, images=images)
        if is_cached:
            spec = CacheSpec(
                kind="vae_moments",
                encoder=encoder_identity(bundle, "vae_moments"),
                image_side_px=comparison.side_px,
                dtype="float32",
                shapes={name: tuple(draws.noise.shape[1:]) for name in ("source_mean", "goal_mean", "goal_logvar")},
            )
            with torch.no_grad():
                mean, logvar = mgie.vae.moments(images.goal)
                source = mgie.vae.condition_latents(images.source)
            arrays = {"source_mean": source, "goal_mean": mean, "goal_logvar": logvar}
            ids = np.arange(start, start + len(words.input_ids))
            write_shard(open_folder(tmp_path), spec, ids, {name: value.numpy() for name, value in arrays.items()})
            finish_cache(open_folder(tmp_path), spec, list_shards(open_folder(tmp_path), spec))
            cache = LatentCache.open(
                tmp_path, kind="vae_moments", encoder=spec.encoder, image_side_px=spec.image_side_px, ids=ids
            )
            batch = replace(batch, images=cache.moments(ids.tolist()))
        fields = ("noise", "posterior_noise", "timesteps", "dropout_u")
        micro_batches.append(
            MicroBatch(
                batch=batch,
                draws=replace(draws, **{name: getattr(draws, name)[part] for name in fields}),
                ids=tuple(range(start, start + len(words.input_ids))),
                num_label_tokens=len(words.label_ids),
                num_tokens=int(words.mask.sum()),
            )
        )
    assert len(micro_batches) == -(-len(samples) // micro_batch)
    sums, _ = accumulate_gradients(
        Alone(mgie),
        micro_batches,
        device=torch.device("cpu"),
        dtype="float32",
        num_label_tokens=sum(m.num_label_tokens for m in micro_batches),
        num_samples=len(samples),
    )
    expected = [float(vectors[f"train.{name}"]) for name in ("loss_ce", "loss_edit", "loss")]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    norms = record["gradient_norms"]
    gradients = [p.grad for p in mgie.parameters() if p.grad is not None]
    total = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert float(total) == pytest.approx(norms["groups"]["all"], rel=2e-5)
    worst = 0.0
    for name, parameter in mgie.named_parameters():
        recorded = vectors.get(f"grad.{name.removeprefix('mllm.llm.')}")
        if recorded is not None and parameter.grad is not None:
            worst = max(worst, float((parameter.grad - recorded).abs().max() / recorded.abs().max()))
    assert 0 < worst < 5e-5


# ---- several workers


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["e2e", "ft"])
def test_whatever_trains_is_sharded_and_in_float32(rows: Examples, variant: Variant, one_worker: None) -> None:
    """With the language model or the text encoder, too."""
    optimizer = replace(CONFIG.optimizer, lr_llm=1e-3, lr_text_encoder=1e-3)
    config = replace(CONFIG, steps=2, variant=variant, optimizer=optimizer, dtype="bfloat16")
    bundle = Bundle(ensure_bundle("random-ip2p" if variant == "ft" else "random"))
    parameters = dict(load_training_model(bundle, config, device="cpu").model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert any(name.startswith(("mllm.llm.model.layers.1.", "text_encoder.")) for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    config = replace(config, dtype="float64")
    whole, alone = _run(bundle, rows, config)
    records, sharded = _run(bundle, rows, config, change=Sharded)
    assert all(isinstance(p, DTensor) for p in sharded.model.parameters() if p.requires_grad)
    _close(records, whole, rel=1e-9)
    reached, expected = sharded.state().weights, alone.state().weights
    assert all(torch.allclose(reached[name], expected[name], rtol=1e-7, atol=1e-9) for name in expected)


def _work(rank: int, world_size: int, meeting: str, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    bundle, rows = Bundle(ensure_bundle("random")), open_rows(folder)
    found = {}
    for sharding in ("ddp", "fully_shard"):
        config = replace(CONFIG, dtype="float64", steps=4, sharding=sharding)
        records: list[StepRecord] = []
        resumed: list[StepRecord] = []
        trainer = make_trainer(bundle, rows, config, rank=rank, world_size=world_size, on_step=records.append)
        list(trainer.run(2))
        state = trainer.state()
        list(trainer.run(4))
        again = make_trainer(bundle, rows, config, rank=rank, world_size=world_size, on_step=resumed.append)
        states = [None] if rank else [state]
        dist.broadcast_object_list(states, src=0)
        again.restore(states[0])  # type: ignore[arg-type]
        list(again.run(4))
        weights, same = trainer.state().weights, again.state().weights  # all workers must ask
        assert (len(weights) == 0) == (rank > 0)
        is_bitwise = _losses(resumed) == _losses(records)[2:] and all(torch.equal(weights[n], same[n]) for n in weights)
        found[sharding] = _losses(records), {name: value.numpy() for name, value in weights.items()}, is_bitwise
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_workers_and_sharded_weights_compute_what_one_worker_does(
    random_bundle: Bundle, folder: Path, rows: Examples, tmp_path: Path
) -> None:
    """Three: with two, sums cannot depend on how gradients are grouped."""
    config = replace(CONFIG, dtype="float64", steps=4)
    alone, trainer = _run(random_bundle, rows, config)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_work, args=(rank, 3, str(tmp_path / "meeting"), folder, results), daemon=True)
        for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    found = None
    while found is None:
        assert all(worker.exitcode in (None, 0) for worker in workers)
        with contextlib.suppress(queue.Empty):
            found = results.get(timeout=1)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    weights = trainer.state().weights
    for kind in ("ddp", "fully_shard"):
        losses, reached, is_bitwise = found[kind]
        assert len(losses) == len(alone)
        for a, b in zip(losses, _losses(alone), strict=True):
            assert a == pytest.approx(b, rel=1e-9)
        assert reached.keys() == weights.keys()
        assert all(np.allclose(reached[name], weights[name].numpy(), rtol=1e-7, atol=1e-9) for name in weights)
        assert is_bitwise, f"{kind}: a resumed run differs"
