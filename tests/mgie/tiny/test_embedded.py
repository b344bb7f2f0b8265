import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from mgie.bundle.bundle import Bundle
from mgie.bundle.embedded import UNTRAINED, UntrainedName, cache_folder, ensure_bundle, recipe_hash
from mgie.bundle.record import CONFIG_FILE
from mgie.bundle.shipped import SHIPPED, ShippedName
from mgie.bundle.untrained import build
from mgie.editor import Editor
from mgie.errors import BundleError


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def summarizer_bundle() -> Bundle:
    return Bundle(ensure_bundle("random-summarizer"))


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_rebuilt_bundle_has_the_same_bytes(name: UntrainedName, tmp_path: Path) -> None:
    torch.manual_seed(1)  # the recipe does not depend on the state of the generator
    build(name, tmp_path / "again")
    rebuilt = _digests(tmp_path / "again")
    assert rebuilt == _digests(ensure_bundle(name))
    assert len(rebuilt) > 2


def test_building_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    build("random-summarizer", tmp_path / "b")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_bundles_are_whole_trained_and_unpacked_once(name: ShippedName) -> None:
    bundle = Bundle(ensure_bundle(name))
    bundle.verify()
    assert (bundle.config.name, bundle.config.trained) == (name, True)
    before = (bundle.root / CONFIG_FILE).stat().st_mtime_ns
    assert (ensure_bundle(name) / CONFIG_FILE).stat().st_mtime_ns == before


def test_random_bundles_say_that_they_are_untrained(random_bundle: Bundle, summarizer_bundle: Bundle) -> None:
    assert random_bundle.config.trained is False
    assert summarizer_bundle.config.trained is False
    random_bundle.verify()
    summarizer_bundle.verify()


def test_the_random_bundle_has_every_part_of_an_editor_and_a_few_million_parameters(random_bundle: Bundle) -> None:
    mgie = random_bundle.load_mgie(device="cpu")
    num_parameters = sum(p.numel() for p in mgie.parameters())
    assert 1e6 < num_parameters < 2e7
    assert mgie.num_visual_tokens == 8
    assert mgie.unet.config.in_channels == 8


def test_the_random_text_editor_edits_by_the_words_alone() -> None:
    bundle = Bundle(ensure_bundle("random-ip2p"))
    bundle.verify()
    assert bundle.config.trained is False
    assert bundle.config.parts == ("text_encoder", "unet", "vae", "scheduler")
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    editor = Editor.load(bundle, device="cpu")
    night, winter = (editor.edit(picture, words, seed=1, steps=2) for words in ("make it night", "make it winter"))
    assert night.image.size == (64, 48)
    assert night.edit_condition.condition.shape == (77, 64)
    assert not torch.allclose(night.edit_condition.condition, winter.edit_condition.condition)
    assert (night.edit_condition.image_tokens, night.edit_condition.output_tokens, night.expressive) == (0, 0, "")


def test_the_random_text_tokenizer_is_a_real_one() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ensure_bundle("random-ip2p") / "text_encoder", local_files_only=True)
    words = tokenizer("make it night", split_special_tokens=True)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in words[1:-1]] == ["make</w>", "it</w>", "night</w>"]
    assert (words[0], words[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    strange = tokenizer("a ☃ <|endoftext|>", split_special_tokens=True)["input_ids"]
    assert strange.count(tokenizer.eos_token_id) == 1  # every byte is known, and text never becomes a control token


def test_both_random_editors_have_the_same_diffusion_model(random_bundle: Bundle) -> None:
    files = Bundle(ensure_bundle("random-ip2p")).config.files
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert files[name] == random_bundle.config.files[name]


def test_the_random_summarizer_generates(summarizer_bundle: Bundle) -> None:
    model, tokenizer = summarizer_bundle.load_summarizer(device="cpu")
    inputs = tokenizer("summarize the following paragraph in 32 words:\n\nA red house by the sea.", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, min_new_tokens=6, num_beams=2, do_sample=False)
    assert 6 <= output.shape[1] - 1 <= 12
    assert isinstance(tokenizer.decode(output[0], skip_special_tokens=True), str)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    # "A red house" survives a round trip: the tokenizer is a real one, not one that knows nothing.
    assert tokenizer.decode(tokenizer("A red house")["input_ids"], skip_special_tokens=True).strip() == "A red house"


def test_the_cache_is_where_mgie_cache_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MGIE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    folder = ensure_bundle("random-summarizer")
    assert folder == tmp_path / "here" / f"random-summarizer-{recipe_hash()}"
    Bundle(folder).verify()
    before = (folder / CONFIG_FILE).stat().st_mtime_ns
    assert ensure_bundle("random-summarizer") == folder
    assert (folder / CONFIG_FILE).stat().st_mtime_ns == before  # not built again


def test_a_cache_that_cannot_be_written_is_a_bundle_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A file where the folder should be: permissions would not stop root.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MGIE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BundleError, match="set MGIE_CACHE to a writable folder"):
        ensure_bundle("random-summarizer")


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    # Both wait for the same file, so that neither finds a finished bundle when it starts.
    program = """
import sys, time
from pathlib import Path
from mgie.bundle.bundle import Bundle
from mgie.bundle.embedded import cache_folder, ensure_bundle
cache = cache_folder()
(cache / sys.argv[1]).touch()
while len(list(cache.glob("ready-*"))) < 2:
    time.sleep(0.01)
folder = ensure_bundle("random-summarizer")
Bundle(folder).load_summarizer(device="cpu")
print(folder.stat().st_ino)
"""
    env = os.environ | {"MGIE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"ready-{i}"],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    outcomes = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]  # the same folder: what one finished was not replaced by the other
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("ready-")) == [
        f"random-summarizer-{recipe_hash()}"
    ]
    Bundle(tmp_path / f"random-summarizer-{recipe_hash()}").verify()
