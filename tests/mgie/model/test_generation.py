"""Batched greedy generation against a slow reference: one row, no cache, no draft, no early stop."""

import copy

import pytest
import torch
from torch import Tensor

from mgie.bundle.bundle import Bundle
from mgie.config import GenerationConfig
from mgie.errors import PromptError
from mgie.model.generation import Generator, select_states
from mgie.model.mllm import MLLM
from mgie.model.tokens import Tokenizer
from mgie.model.visual_states import gather_states, pad, select_start

pytestmark = pytest.mark.slow

NUM_VISUAL = 8


@pytest.fixture(scope="module")
def tokenizer(random_bundle: Bundle) -> Tokenizer:
    return random_bundle.load_tokenizer()


@pytest.fixture(scope="module")
def base(random_bundle: Bundle, tokenizer: Tokenizer) -> MLLM:
    return random_bundle.load_mllm(tokenizer)


def _scripted(base: MLLM, chain: dict[int, int]) -> MLLM:
    """A copy whose next token is mostly `chain[last token]`; the context still sways its states a little."""
    mllm = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        embeddings = torch.randn(mllm.llm.model.embed_tokens.weight.shape, generator=generator)
        mllm.llm.model.embed_tokens.weight.copy_(embeddings)
        mllm.llm.lm_head.weight.copy_(0.02 * torch.randn(embeddings.shape, generator=generator))
        for token_id, following in chain.items():
            mllm.llm.lm_head.weight[following] += 0.5 * embeddings[token_id]
        for layer in mllm.llm.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    return mllm


def _prompt(tokenizer: Tokenizer, mllm: MLLM, last: int, length: int, seed: int) -> list[int]:
    """<s>, random pieces, an image block, and `last`."""
    pieces = torch.randint(300, 600, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tokenizer.bos_id, *pieces, *[tokenizer.im_patch_id] * mllm.num_patches, last]


def _features(mllm: MLLM, num: int) -> Tensor:
    pixels = torch.randn(num, 3, 112, 112, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return mllm.image_features(pixels)


@torch.no_grad()
def _reference(
    mllm: MLLM, tokenizer: Tokenizer, prompt: list[int], features: Tensor, config: GenerationConfig
) -> tuple[list[int], Tensor]:
    """Ids and states of plain greedy decoding: the whole sequence is computed anew for each token."""
    ids, n = list(prompt), config.no_repeat_ngram_size
    while True:
        hidden = mllm(mllm.embed(torch.tensor([ids]), features[None]), torch.ones(1, len(ids), dtype=torch.bool))[0]
        scores = mllm.logits(hidden[-1])
        for i in range(len(ids) - n + 1 if n else 0):
            if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
                scores[ids[i + n - 1]] = -torch.inf
        if len(ids) - len(prompt) == config.max_new_tokens or ids[len(prompt) :][-1:] == [tokenizer.eos_id]:
            return ids, hidden[: len(ids) - 1]
        ids.append(int(scores.argmax()))


def _published_selection(ids: list[int], num_prompt: int, hidden: Tensor, img0: int) -> Tensor:
    """The rule of the original, searched in the output only (F4)."""
    output = ids[num_prompt:]
    p = num_prompt + output.index(img0) - 1 if img0 in output else len(hidden) - (NUM_VISUAL + 1)
    p = min(p, len(hidden) - (NUM_VISUAL + 1))
    return hidden[p : p + NUM_VISUAL]


def _chains(tokenizer: Tokenizer) -> dict[str, tuple[dict[int, int], int]]:
    """Scenario -> (chain, last prompt token)."""
    v, eos, a, b, c, d = tokenizer.visual_ids, tokenizer.eos_id, 300, 301, 302, 303
    visual = {v[i]: v[i + 1] for i in range(7)}
    return {
        "canonical": ({a: b, b: v[0], **visual, v[7]: eos}, a),
        "goes on after the last visual token": ({a: v[0], **visual, v[7]: c, c: d, d: 304, 304: 305, 305: eos}, a),
        "breaks off after the third": ({a: b, b: v[0], **visual, v[2]: c, c: d, d: 304}, a),
        "eos among the visual tokens": ({a: v[0], **visual, v[4]: eos}, a),
        "never a visual token": ({a: b, b: c, c: d, d: 304, 304: 305}, a),
        "at once": ({a: v[0], **visual, v[7]: eos}, a),
        "ends at once": ({a: eos}, a),
    }


SCENARIOS = [
    "canonical", "goes on after the last visual token", "breaks off after the third", "eos among the visual tokens",
    "never a visual token", "at once", "ends at once",
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_early_stop_and_drafts_change_neither_ids_nor_states(base: MLLM, tokenizer: Tokenizer, scenario: str) -> None:
    chain, last = _chains(tokenizer)[scenario]
    mllm = _scripted(base, chain)
    prompt, features = _prompt(tokenizer, mllm, last, 12, seed=1), _features(mllm, 1)
    generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    longest = GenerationConfig(max_new_tokens=24, stop="eos")
    all_ids, all_hidden = _reference(mllm, tokenizer, prompt, features[0], longest)
    for max_new_tokens in (1, 9, 10, 11, 24):
        ids = all_ids[: len(prompt) + max_new_tokens]
        hidden = all_hidden[: len(ids) - 1]  # what follows does not change what was
        expected = _published_selection(ids, len(prompt), hidden, tokenizer.visual_ids[0])

        [row] = generator.generate([prompt], features, GenerationConfig(max_new_tokens=max_new_tokens, stop="eos"))
        assert row.ids == ids
        torch.testing.assert_close(row.hidden, hidden, rtol=0, atol=1e-4)
        torch.testing.assert_close(select_states(row, NUM_VISUAL), expected, rtol=0, atol=1e-4)

        [early] = generator.generate([prompt], features, GenerationConfig(max_new_tokens=max_new_tokens))
        assert early.ids == ids[: len(early.ids)]
        torch.testing.assert_close(select_states(early, NUM_VISUAL), expected, rtol=0, atol=1e-4)


def test_early_stop_ends_right_after_the_last_visual_token(base: MLLM, tokenizer: Tokenizer) -> None:
    chain, last = _chains(tokenizer)["goes on after the last visual token"]
    mllm = _scripted(base, chain)
    generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    [row] = generator.generate([_prompt(tokenizer, mllm, last, 5, seed=2)], _features(mllm, 1), GenerationConfig())
    assert row.output_ids == list(tokenizer.visual_ids)
    assert row.ended_early


def test_a_drafted_row_takes_one_forward_pass_for_all_visual_tokens(base: MLLM, tokenizer: Tokenizer) -> None:
    chain, last = _chains(tokenizer)["canonical"]
    mllm = _scripted(base, chain)
    calls: list[int] = []
    mllm.llm.model.register_forward_hook(lambda module, args, output: calls.append(output.last_hidden_state.shape[1]))
    generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    prompt = _prompt(tokenizer, mllm, last, 5, seed=2)
    generator.generate([prompt], _features(mllm, 1), GenerationConfig())
    assert calls == [len(prompt), 1, 8]  # prompt, one piece of text, the draft


@pytest.mark.parametrize("stop", ["eos", "visual_tokens"])
@pytest.mark.parametrize("ngram", [0, 2, 3])
def test_a_batch_gives_each_row_what_it_gets_alone(base: MLLM, tokenizer: Tokenizer, stop: str, ngram: int) -> None:
    """Rows of unequal lengths that write [IMG0] at different times, break off, end, or never come to it."""
    v, eos = tokenizer.visual_ids, tokenizer.eos_id
    chain = {v[i]: v[i + 1] for i in range(7)} | {v[7]: 310, 300: 301, 301: 302, 302: v[0], 310: 311, 311: eos}
    chain |= {320: 321, 321: 322, 322: 323, 323: 324, 324: 320, 330: 331, 331: eos}
    mllm = _scripted(base, chain)
    generator = Generator(mllm, eos_id=eos, visual_ids=v)
    config = GenerationConfig(max_new_tokens=20, no_repeat_ngram_size=ngram, stop=stop)  # type: ignore[arg-type]
    lasts = [300, 320, 302, 330, 301, v[3], 400]
    prompts = [_prompt(tokenizer, mllm, last, 3 + 5 * i % 17, seed=i) for i, last in enumerate(lasts)]
    features = _features(mllm, len(prompts))
    together = generator.generate(prompts, features, config)
    for i, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        [alone] = generator.generate([prompt], features[i : i + 1], config)
        assert (row.ids, row.visual_start, row.ended_early) == (alone.ids, alone.visual_start, alone.ended_early)
        torch.testing.assert_close(row.hidden, alone.hidden, rtol=0, atol=1e-4)
        if stop == "eos":
            assert row.ids == _reference(mllm, tokenizer, prompt, features[i], config)[0]
    assert {row.visual_start is None for row in together} == {True, False}


def test_ngrams_are_counted_over_the_prompt_too(base: MLLM, tokenizer: Tokenizer) -> None:
    mllm = _scripted(base, {300: 301, 301: 302, 302: 303})
    generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    patches = [tokenizer.im_patch_id] * mllm.num_patches
    prompt = [1, 300, 301, 302, *patches, 300]
    [free] = generator.generate(
        [prompt], _features(mllm, 1), GenerationConfig(max_new_tokens=2, no_repeat_ngram_size=0)
    )
    [held] = generator.generate([prompt], _features(mllm, 1), GenerationConfig(max_new_tokens=2))
    assert free.output_ids == [301, 302]
    assert held.output_ids[0] == 301
    assert held.output_ids[1] != 302


def test_random_weights_give_equal_ids_in_batches_of_any_size(base: MLLM, tokenizer: Tokenizer) -> None:
    generator = Generator(base, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    config = GenerationConfig(max_new_tokens=16)
    prompts = [_prompt(tokenizer, base, 600 + i, 2 + 3 * i, seed=i) for i in range(6)]
    features = _features(base, 6)
    together = [row.ids for row in generator.generate(prompts, features, config)]
    alone = [generator.generate([p], features[i : i + 1], config)[0].ids for i, p in enumerate(prompts)]
    assert together == alone
    assert together[0] == _reference(base, tokenizer, prompts[0], features[0], config)[0]


def test_a_prompt_that_does_not_fit_the_context_is_refused(base: MLLM, tokenizer: Tokenizer) -> None:
    generator = Generator(base, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    prompt = _prompt(tokenizer, base, 300, base.max_positions, seed=0)
    with pytest.raises(
        PromptError, match=f"prompt has {len(prompt)} tokens with its image; at most {base.max_positions - 96}"
    ):
        generator.generate([prompt], _features(base, 1), GenerationConfig())


def test_no_rows_give_no_rows(base: MLLM, tokenizer: Tokenizer) -> None:
    generator = Generator(base, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)
    assert generator.generate([], torch.zeros(0, base.num_patches, 192), GenerationConfig()) == []


@pytest.mark.parametrize(
    ("num_states", "visual_start", "complete", "expected"),
    [
        (30, 20, True, 19),
        (30, 22, True, 21),
        (30, 23, True, 21),
        (30, None, True, 21),
        (27, 20, False, 19),
        (5, None, True, 0),
    ],
)
def test_selected_states_begin_one_before_img0_or_fall_back(
    num_states: int, visual_start: int | None, complete: bool, expected: int
) -> None:
    assert select_start(num_states, visual_start, NUM_VISUAL, complete=complete) == expected


def test_gather_states_takes_consecutive_rows() -> None:
    hidden = torch.arange(2 * 10 * 3, dtype=torch.float32).reshape(2, 10, 3)
    states = gather_states(hidden, torch.tensor([1, 6]), 4)
    assert torch.equal(states, torch.stack([hidden[0, 1:5], hidden[1, 6:10]]))


def test_pad_marks_real_tokens() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_a_settled_row_ends_and_the_others_go_on(base: MLLM, tokenizer: Tokenizer) -> None:
    generator = Generator(base, eos_id=tokenizer.eos_id, visual_ids=())
    config = GenerationConfig(max_new_tokens=12, stop="eos", no_repeat_ngram_size=0)
    prompts = [_prompt(tokenizer, base, 600 + i, 4, seed=i) for i in range(3)]
    features = _features(base, 3)
    free = [row.output_ids for row in generator.generate(prompts, features, config)]
    marker = free[1][4]
    held = generator.generate(prompts, features, config, is_settled=lambda ids: marker in ids)
    for row, unlimited in zip(held, free, strict=True):
        end = unlimited.index(marker) + 1 if marker in unlimited else len(unlimited)
        assert row.output_ids == unlimited[:end]
    assert len(held[1].output_ids) <= 5


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_a_row_that_is_not_wanted_any_more_leaves_within_a_token_and_changes_nothing_for_the_others(
    base: MLLM, tokenizer: Tokenizer, num_tokens: int
) -> None:
    generator = Generator(base, eos_id=tokenizer.eos_id, visual_ids=())
    config = GenerationConfig(max_new_tokens=12, stop="eos", no_repeat_ngram_size=0)
    prompts = [_prompt(tokenizer, base, 600 + i, 4 + i, seed=i) for i in range(3)]
    features = _features(base, 3)
    alone = [generator.generate([prompt], features[i : i + 1], config)[0] for i, prompt in enumerate(prompts)]
    assert min(len(row.output_ids) for row in alone) > 3
    asked = [0, 0, 0]

    def is_wanted(row: int) -> bool:
        asked[row] += 1
        return row != 1 or asked[row] <= num_tokens

    together = generator.generate(prompts, features, config, is_wanted=is_wanted)
    assert together[1].output_ids == alone[1].output_ids[:num_tokens]
    assert asked[1] == num_tokens + 1
    for i in (0, 2):
        assert together[i].ids == alone[i].ids
        torch.testing.assert_close(together[i].hidden, alone[i].hidden, rtol=0, atol=1e-4)


def test_a_batch_that_nobody_wants_ends_at_once(base: MLLM, tokenizer: Tokenizer) -> None:
    mllm = copy.deepcopy(base)
    calls: list[int] = []
    mllm.llm.model.register_forward_hook(lambda module, args, output: calls.append(output.last_hidden_state.shape[1]))
    generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=())
    prompts = [_prompt(tokenizer, mllm, 600 + i, 4, seed=i) for i in range(2)]
    features = _features(mllm, 2)
    generator.generate(prompts, features, GenerationConfig(stop="eos"), is_wanted=lambda row: len(calls) < 3)
    assert calls == [len(prompts[0]), 1, 1]
