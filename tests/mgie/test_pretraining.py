"""The recipe's own parts: exact resuming, corpora that grow, latents of one size."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPTextModel

from mgie.model.diffusion import LatentVAE
from mgie.model.tokenizer_training import clip_tokenizer, llama_tokenizer
from mgie.tiny.pretraining import clip, corpus, vae
from mgie.tiny.pretraining.bundles import add_visual_tokens
from mgie.tiny.pretraining.corpus import Corpus
from mgie.tiny.pretraining.edit_head import learn_head
from mgie.tiny.pretraining.llava import new_llava
from mgie.tiny.pretraining.loop import LoopConfig, fit
from mgie.tiny.world import make_sample

pytestmark = pytest.mark.slow

TEXTS = ["make it night", "the red house would be blue", "a tree, a lamp and a green house on a meadow", "night!"] * 9


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Six samples in shards of three."""
    patch = pytest.MonkeyPatch()
    patch.setattr(corpus, "SHARD_SAMPLES", 3)
    made = Corpus(tmp_path_factory.mktemp("corpus"), 6, seed=7)
    made.make()
    return made


def test_a_corpus_holds_the_world_s_samples(samples: Corpus) -> None:
    for number in (0, 5):
        sample = make_sample(7, "train", number)
        assert np.array_equal(samples.sources(np.array([number]))[0], sample.source_pixels)
        assert np.array_equal(samples.goals(np.array([number]))[0], sample.goal_pixels)
        assert samples.words[number].expressive == sample.expressive
    assert len(samples.words) == 6


def test_a_corpus_goes_on_from_a_shorter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_SAMPLES", 1)
    Corpus(tmp_path, 1, seed=7).make()
    [first] = tmp_path.iterdir()
    written = (first / "sources.npy").stat().st_mtime_ns
    Corpus(tmp_path, 2, seed=7).make()
    assert len(list(tmp_path.iterdir())) == 2
    assert (first / "sources.npy").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="multiple"):
        Corpus(tmp_path, 0, seed=7)


class _StoppedError(Exception):
    pass


def test_a_stopped_stage_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgie.tiny.pretraining.loop._SECONDS_BETWEEN_SAVES", 0)
    loop = LoopConfig(steps=12, batch=4, lr=1e-2, seed=3)

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        made.register_parameter("unused", nn.Parameter(torch.ones(2)))  # no loss depends on it
        return made

    def run(trained: nn.Module, state: Path, stop_at: int = -1) -> dict[str, Tensor]:
        calls = 0

        def loss(rng: Generator) -> dict[str, Tensor]:
            nonlocal calls
            if calls == stop_at:
                raise _StoppedError
            calls += 1
            inputs = torch.from_numpy(rng.standard_normal((loop.batch, 3))).float() + 0.1 * torch.randn(4, 3)
            return {"loss": (trained(inputs) - inputs.sum(1, keepdim=True)).square().mean()}

        fit(trained, loop, loss, state, log=tmp_path / "log.jsonl")
        return {name: value.clone() for name, value in trained.state_dict().items()}

    whole = run(model(), tmp_path / "whole.safetensors")
    with pytest.raises(_StoppedError):
        run(model(), tmp_path / "part.safetensors", stop_at=5)
    resumed = run(model(), tmp_path / "part.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], value) for name, value in model().state_dict().items())


def test_the_vae_s_latents_have_mean_zero_and_variance_one_and_decode_as_before(samples: Corpus) -> None:
    torch.manual_seed(1)
    model = vae.new_vae().eval()
    latent_vae = LatentVAE(model)
    pixels = vae.to_signed_batch(samples.sources(np.arange(6)))
    with torch.no_grad():
        mean, logvar = latent_vae.moments(pixels)
        spread = (0.5 * logvar).exp() / mean.std(dim=(0, 2, 3), keepdim=True)
        before = latent_vae.decode(mean * latent_vae.scaling_factor)
        vae._standardize(model, mean)
        mean, logvar = latent_vae.moments(pixels)
        torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(mean.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)
        torch.testing.assert_close((0.5 * logvar).exp(), spread, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(latent_vae.decode(mean * latent_vae.scaling_factor), before, atol=1e-3, rtol=1e-3)


def test_stages_learn_from_the_corpus(samples: Corpus, tmp_path: Path) -> None:
    loop = dataclasses.replace(vae.LOOP, steps=2, batch=2)
    made = vae.learn_vae(samples, tmp_path / "vae.safetensors", loop=loop)
    torch.manual_seed(loop.seed)
    first = vae.new_vae().state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in made.state_dict().items())
    tokenizer = clip_tokenizer(TEXTS, 60)
    loop = dataclasses.replace(clip.LOOP, steps=1, batch=4)
    model = clip.learn_clip(samples, tokenizer, tmp_path / "clip.safetensors", loop=loop)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_edit_head_learns_what_the_text_encoder_says(samples: Corpus, tmp_path: Path) -> None:
    text_tokenizer, plain = clip_tokenizer(TEXTS, 60), llama_tokenizer(TEXTS, 300)
    torch.manual_seed(2)
    seen = clip.new_clip(text_tokenizer)
    encoder = CLIPTextModel(seen.config.text_config).eval()
    llava = new_llava(plain, seen)
    tokenizer, edit_head = add_visual_tokens(llava, plain)
    before = {name: value.clone() for name, value in llava.state_dict().items()}
    log = tmp_path / "log.jsonl"
    learn_head(
        samples, llava=llava, tokenizer=tokenizer, head=edit_head, text_encoder=encoder, text_tokenizer=text_tokenizer,
        state_file=tmp_path / "state.safetensors", loop=LoopConfig(steps=51, batch=2, lr=3e-3), log=log,
    )  # fmt: skip
    first, *_, last = [json.loads(line)["distance"] for line in log.read_text().splitlines()]
    assert last < 0.8 * first
    changed = {name for name, value in llava.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"llm.model.embed_tokens.weight", "llm.lm_head.weight"}
