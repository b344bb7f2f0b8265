"""Samples of the procedural world: determinism, exactness, splits, words, and what words alone tell."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mgie.config import ImageLimits
from mgie.errors import ConfigError, DataError
from mgie.model.prompts import clean_expressive
from mgie.tiny.world import make_sample
from mgie.tiny.world.ambiguities import AMBIGUITIES, sample_ambiguous
from mgie.tiny.world.answers import describe, express, parse_answers, states_change
from mgie.tiny.world.draw import draw_scene
from mgie.tiny.world.edits import Edit
from mgie.tiny.world.filters import apply_filter
from mgie.tiny.world.instructions import instruct, wordings
from mgie.tiny.world.operations import OPERATIONS
from mgie.tiny.world.samples import Sample, draw_picture, is_held_out
from mgie.tiny.world.scene import Scene
from mgie.tiny.world.wordings import parse_wordings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(11, "train", number) for number in range(160)]


def _edits(name: str, *, is_ambiguous: bool, count: int) -> list[Edit]:
    rng = np.random.default_rng(3)
    made = (sample_ambiguous(rng, name) if is_ambiguous else OPERATIONS[name].make(rng) for _ in range(count * 20))
    return [edit for edit in made if edit is not None][:count]


EVERY_KIND = [(name, False) for name in OPERATIONS] + [(name, True) for name in AMBIGUITIES]


def test_a_sample_is_the_same_whatever_was_made_before(samples: list[Sample]) -> None:
    again = make_sample(11, "train", 7)
    assert again.instruction == samples[7].instruction
    assert again.edit == samples[7].edit
    np.testing.assert_array_equal(again.goal_pixels, samples[7].goal_pixels)


def test_seed_split_and_number_make_different_samples(samples: list[Sample]) -> None:
    others = [make_sample(12, "train", 7), make_sample(11, "val", 7), make_sample(11, "train", 8)]
    assert len({sample.edit.source for sample in (*others, samples[7])}) == 4


@pytest.mark.parametrize(("side_px", "number"), [(31, 0), (128, -1)])
def test_impossible_arguments_are_refused(side_px: int, number: int) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        make_sample(0, "train", number, side_px=side_px)


def test_pictures_of_a_sample_fit_its_side_and_the_mask_is_what_changed() -> None:
    sample = make_sample(11, "train", 3, side_px=96)
    assert sample.source.size == sample.goal.size == sample.mask.size == (96, 96)
    assert min(sample.source.size) <= ImageLimits().max_side_px
    differs = (np.asarray(sample.source) != np.asarray(sample.goal)).any(axis=-1)
    np.testing.assert_array_equal(np.asarray(sample.mask) == 255, differs)


def test_a_scene_looks_alike_at_any_side(samples: list[Sample]) -> None:
    scene = next(sample.edit.source for sample in samples if isinstance(sample.edit.source, Scene))
    small = draw_scene(scene, 64).astype(float)
    large = draw_scene(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 6  # of 255; grain alone, drawn per pixel, makes about 2


def test_removing_a_thing_changes_no_pixel_away_from_it(samples: list[Sample]) -> None:
    """Texture, grain, stars and all else come from places, never from what was drawn before."""
    seen = 0
    for sample in samples:
        if sample.operation != "remove" or sample.edit.source.time == "night":  # a glow reaches far
            continue
        (thing,) = set(sample.edit.source.things) - set(sample.edit.goal.things)
        _, xs = np.nonzero(sample.changed)
        reach = 0.36 * thing.size * sample.side_px
        assert abs(xs.mean() / sample.side_px - thing.x) < 0.2
        assert xs.min() > thing.x * sample.side_px - reach
        assert xs.max() < thing.x * sample.side_px + reach
        seen += 1
    assert seen >= 5


def test_a_filter_edit_is_the_exact_operation_on_the_source(samples: list[Sample]) -> None:
    filtered = [sample for sample in samples if sample.edit.filter]
    assert len(filtered) >= 10
    for sample in filtered:
        assert sample.edit.filter is not None
        np.testing.assert_array_equal(sample.goal_pixels, apply_filter(sample.source_pixels, sample.edit.filter))


def test_a_mended_picture_is_the_picture_before_it_was_spoiled() -> None:
    (edit,) = _edits("denoise", is_ambiguous=False, count=1)
    sample = Sample(edit=edit, side_px=64, instruction="", verbose="", expressive="", held_out="")
    np.testing.assert_array_equal(sample.goal_pixels, draw_picture(edit.source, 64))
    assert (sample.source_pixels != sample.goal_pixels).mean() > 0.5


def test_every_change_can_be_seen(samples: list[Sample]) -> None:
    for sample in samples:
        difference = np.abs(sample.source_pixels.astype(int) - sample.goal_pixels)[sample.changed]
        assert sample.changed.mean() >= 0.004
        assert difference.mean() >= 8


def test_there_are_at_least_25_operations_in_three_families() -> None:
    assert len(OPERATIONS) >= 25
    assert {operation.family for operation in OPERATIONS.values()} == {"modification", "optimization", "scene"}


@pytest.mark.parametrize(("name", "is_ambiguous"), EVERY_KIND)
def test_every_operation_has_15_wordings_of_which_some_are_held_out(name: str, is_ambiguous: bool) -> None:
    (edit,) = _edits(name, is_ambiguous=is_ambiguous, count=1)
    usual, held_out = (set(wordings(edit, is_held_out=held)) for held in (False, True))
    assert len(usual | held_out) >= 15
    assert len(held_out) >= 2
    assert not usual & held_out


def test_wordings_are_read_by_kind_and_name_without_comments() -> None:
    text = "# a word\n\n== operation dim\n  [dim|darken] {it}\n~ {it} is too bright\n== ambiguity dim\nless\n"
    assert parse_wordings(text) == {
        ("operation", "dim"): ("[dim|darken] {it}", "~ {it} is too bright"),
        ("ambiguity", "dim"): ("less",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim it", "line 1: 'dim it' stands before the first header"),
        ("== operation", "line 1: '== operation' is no header"),
        ("== wish dim\ndim it", "line 1: '== wish dim' is no header"),
        ("== operation a\nx\n== operation a\ny", "line 3: '== operation a' comes twice"),
        ("== operation a\n== operation b\nx", "a has no templates"),
        *[
            (f"== operation a\n{line}", "is no template")
            for line in ("[dim|] it", "[dim it", "dim]", "{it", "{}", "a|b", "~")
        ],
        ("== operation a\n[[a|b]|c]", "is no template"),
    ],
)
def test_malformed_wordings_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parse_wordings(text)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("do: a\ndo: b\nsee: c\nkey: d", "dim has {'see': 1}; it must have {'do': 2, 'see': 2, 'key': 1}"),
        ("do: a\nsay: b", "line 3: 'say: b' is no template"),
        ("do:", "line 2: 'do:' is no template"),
    ],
)
def test_malformed_answers_are_refused(lines: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parse_answers(f"== answer dim\n{lines}\n")


@pytest.mark.parametrize(("name", "is_ambiguous"), EVERY_KIND)
def test_all_texts_of_an_edit_can_be_made_and_the_answers_state_the_change(name: str, is_ambiguous: bool) -> None:
    rng = np.random.default_rng(0)
    edits = _edits(name, is_ambiguous=is_ambiguous, count=12)
    assert len(edits) == 12
    for edit in edits:
        for template in (*wordings(edit, is_held_out=False), *wordings(edit, is_held_out=True)):
            assert "{" not in template.format(**{"it": "it", "pic": "photo", **edit.slots})
        assert instruct(rng, edit)
        expressive, verbose = express(rng, edit), describe(rng, edit)
        assert states_change(expressive, edit), expressive
        assert states_change(verbose, edit), verbose
        assert len(expressive.split()) <= 32
        assert 2 <= len(re.findall(r"\.(?: |$)", verbose)) <= 4
        assert clean_expressive(expressive) == expressive


def test_a_text_about_another_thing_or_colour_does_not_state_the_change() -> None:
    edit = next(edit for edit in _edits("recolor", is_ambiguous=False, count=30) if edit.target == "car blue")
    assert states_change("Paint the car blue.", edit)
    assert not states_change("Paint the car green.", edit)
    assert not states_change("Paint the blue ball.", edit)
    assert not states_change("Make the carpet blue.", edit)


def test_most_expressive_instructions_do_not_state_another_samples_change(samples: list[Sample]) -> None:
    rng = np.random.default_rng(5)
    others = [samples[int(i)] for i in rng.permutation(len(samples))]
    pairs = [(one, other) for one, other in zip(samples, others, strict=True) if one.edit.action != other.edit.action]
    assert np.mean([states_change(other.expressive, one.edit) for one, other in pairs]) < 0.1


def test_an_ambiguous_instruction_does_not_tell_its_answer() -> None:
    """Colours to paint in, and what is meant by `it`, are seen only."""
    for edit in _edits("match_house", is_ambiguous=True, count=20):
        for template in wordings(edit, is_held_out=False):
            assert "{color}" not in template
            assert "{full}" not in template


def _words_only(count: int, *, seed: int) -> list[tuple[str, Edit]]:
    """Ambiguous instructions and their edits as `make_sample` makes them, undrawn."""
    rng = np.random.default_rng(seed)
    names, weights = tuple(AMBIGUITIES), np.array([one.weight for one in AMBIGUITIES.values()])
    out: list[tuple[str, Edit]] = []
    while len(out) < count:
        edit = sample_ambiguous(rng, str(rng.choice(names, p=weights / weights.sum())))
        if edit is not None:
            out.append((instruct(rng, edit), edit))
    return out


def test_words_alone_resolve_at_most_60_percent_of_the_ambiguous_instructions() -> None:
    """The oracle answers with what was most often right for the same words, or else for the same ambiguity."""
    by_words: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)

    def plain(words: str) -> str:
        return re.sub("please|could you|can you|i'd like you to|[,?]", "", words.lower()).strip()

    for words, edit in _words_only(1_500, seed=1):
        by_words[plain(words)][edit.action] += 1
        by_kind[edit.ambiguity][edit.action] += 1
    asked = _words_only(400, seed=2)
    right = [
        (by_words.get(plain(words)) or by_kind[edit.ambiguity]).most_common(1)[0][0] == edit.action
        for words, edit in asked
    ]
    assert 0.1 < np.mean(right) <= 0.6


def test_at_least_a_fifth_of_the_samples_is_ambiguous(samples: list[Sample]) -> None:
    assert 0.2 <= np.mean([sample.is_ambiguous for sample in samples]) <= 0.35


def test_training_has_neither_held_out_wordings_nor_held_out_combinations(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.held_out == ""
        assert not is_held_out(sample.edit.combination)


def test_test_samples_are_held_out_by_scene_wording_and_combination() -> None:
    test_samples = [make_sample(11, "test", number) for number in range(40)]
    sorts = Counter(sample.held_out for sample in test_samples)
    assert sorts == {"scene": 20, "wording": 10, "combination": 10}
    for sample in test_samples:
        assert is_held_out(sample.edit.combination) == (sample.held_out == "combination")


def test_captions_name_what_is_there(samples: list[Sample]) -> None:
    for sample in samples:
        if sample.operation == "add":
            assert sample.edit.slots["name"] in sample.goal_caption
            assert sample.source_caption != sample.goal_caption
