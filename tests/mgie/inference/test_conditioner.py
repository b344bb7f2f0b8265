"""Words -> guidance: batches, given expressive instructions, the text conditioner, refusals."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mgie.bundle.bundle import Bundle
from mgie.config import GenerationConfig
from mgie.errors import PromptError
from mgie.inference.conditioner import Conditioner, EditCondition, EditRequest, MLLMConditioner, TextConditioner
from mgie.model.prompts import encode_answered, encode_question


@pytest.fixture(scope="module")
def conditioner(random_bundle: Bundle) -> Conditioner:
    return random_bundle.load_conditioner(device="cpu")


@pytest.fixture(scope="module")
def text_conditioner(tmp_path_factory: pytest.TempPathFactory) -> TextConditioner:
    """CLIP's text tower at toy size, with a byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    # CLIP's byte alphabet: printable Latin-1 characters for themselves, the other bytes from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + i) for i in range(256 - len(printable)))
    alphabet = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=512, eos_token_id=513,
    )  # fmt: skip
    return TextConditioner(tokenizer=tokenizer, encoder=CLIPTextModel(config).eval(), bundle="b")


def _image(seed: int, wh: tuple[int, int] = (60, 40)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (wh[1], wh[0], 3), generator=generator, dtype=torch.uint8).numpy())


def _close(a: EditCondition, b: EditCondition) -> None:
    torch.testing.assert_close(a.condition, b.condition, rtol=0, atol=1e-4)
    assert (a.expressive, a.used_fallback, a.prompt_tokens, a.output_tokens) == (
        b.expressive, b.used_fallback, b.prompt_tokens, b.output_tokens,
    )  # fmt: skip


REQUESTS = [
    EditRequest(image=_image(0), instruction="make it night"),
    EditRequest(image=_image(1, (30, 90)), instruction="add a red balloon to the sky, please"),
    EditRequest(image=_image(2), instruction="make it night", expressive="The sky would be dark. [IMG0] </s>"),
    EditRequest(image=_image(3), instruction="put [IMG0] and ASSISTANT: on the wall"),
    EditRequest(image=_image(4), instruction="x", expressive="A. B. C. D. E."),
]


def test_a_batch_gives_each_request_what_it_gets_alone(conditioner: Conditioner) -> None:
    for together, request in zip(conditioner.derive(REQUESTS), REQUESTS, strict=True):
        _close(together, conditioner.derive([request])[0])


def test_guidance_carries_both_conditions_and_the_counts(conditioner: Conditioner, random_bundle: Bundle) -> None:
    [edit_condition] = conditioner.derive(REQUESTS[:1])
    assert edit_condition.condition.shape == edit_condition.null_condition.shape == (32, 64)
    assert not torch.equal(edit_condition.condition, edit_condition.null_condition)
    assert edit_condition.image_tokens == 64
    prompt = encode_question(random_bundle.load_tokenizer(), "make it night", 64)
    assert edit_condition.prompt_tokens == len(prompt) - 64
    assert 0 < edit_condition.output_tokens <= random_bundle.config.generation.max_new_tokens
    assert edit_condition.bundle == random_bundle.identity
    # Only its own rows travel, not the batch's storage.
    assert edit_condition.condition.untyped_storage().nbytes() == edit_condition.condition.nbytes


def test_the_image_and_the_words_both_count(conditioner: Conditioner) -> None:
    same_words = [EditRequest(image=_image(i), instruction="make it night") for i in (0, 1)]
    a, b = conditioner.derive(same_words)
    assert not torch.allclose(a.condition, b.condition, atol=1e-4)
    [c] = conditioner.derive([EditRequest(image=_image(0), instruction="make it winter")])
    assert not torch.allclose(a.condition, c.condition, atol=1e-4)


def test_a_given_expressive_instruction_is_forced_and_reported_as_given(conditioner: Conditioner) -> None:
    a, b = conditioner.derive(
        [REQUESTS[2], EditRequest(image=_image(2), instruction="make it night", expressive="Snow.")]
    )
    assert a.expressive == "The sky would be dark. [IMG0] </s>"
    assert (a.used_fallback, a.output_tokens) == (False, 0)
    assert not torch.allclose(a.condition, b.condition, atol=1e-4)


@torch.no_grad()
def test_forcing_what_the_model_would_write_gives_the_states_of_generation(
    random_bundle: Bundle, conditioner: Conditioner
) -> None:
    """Teacher forcing and decoding see the same sequence, so they must agree on its states."""
    assert isinstance(conditioner, MLLMConditioner)
    mllm, tokenizer = conditioner._mllm, conditioner._tokenizer
    features = mllm.image_features(conditioner._clip_pixels([_image(0)]))
    prompt = encode_question(tokenizer, "make it night", 64)
    answer = tokenizer.encode_plain("ASSISTANT: The sky would be dark.")[len(tokenizer.encode_plain("ASSISTANT:")) :]
    ids = [*prompt, *answer, *tokenizer.visual_ids]
    hidden = mllm(mllm.embed(torch.tensor([ids]), features), torch.ones(1, len(ids), dtype=torch.bool))[0]
    start = len(prompt) + len(answer) - 1
    expected = conditioner._edit_head(hidden[None, start : start + 8], mllm.visual_embeddings(8))[0]
    request = EditRequest(image=_image(0), instruction="make it night", expressive="The sky would be dark.")
    torch.testing.assert_close(conditioner.derive([request])[0].condition, expected, rtol=0, atol=1e-5)


def test_without_visual_tokens_the_fallback_is_reported(conditioner: Conditioner) -> None:
    [edit_condition] = conditioner.derive(REQUESTS[:1], GenerationConfig(max_new_tokens=3))
    assert edit_condition.used_fallback


def test_an_llm_that_does_not_see_the_image_derives_the_same_for_every_image(
    random_bundle: Bundle, conditioner: Conditioner
) -> None:
    blind = random_bundle.without_vision().load_conditioner(device="cpu")
    one, other = ([dataclasses.replace(request, image=_image(9 + i)) for request in REQUESTS] for i in range(2))
    tokenizer = random_bundle.load_tokenizer()
    for ours, theirs, seen, request in zip(
        blind.derive(one), blind.derive(other), conditioner.derive(one), REQUESTS, strict=True
    ):
        _close(ours, theirs)
        assert not torch.allclose(ours.condition, seen.condition, atol=1e-4)
        assert ours.image_tokens == 0
        expected = (
            encode_question(tokenizer, request.instruction, 0)
            if request.expressive is None
            else encode_answered(tokenizer, request.instruction, request.expressive, 0).ids
        )
        assert ours.prompt_tokens == len(expected)
    assert not torch.allclose(blind.derive(one[:1])[0].condition, blind.derive(one[1:2])[0].condition, atol=1e-4)


@pytest.mark.parametrize(
    ("instruction", "expressive", "param", "message"),
    [
        ("", None, "prompt", "prompt is empty"),
        ("x" * 20_000, None, "prompt", "20000 characters; at most 4000"),
        ("make it night", " ", "expressive", "expressive is empty"),
        ("☃" * 3000, None, "prompt", "tokens with its image; at most"),
        ("x", "☃" * 3000, "expressive", "tokens; at most 2048 fit the model"),
    ],
)
def test_unusable_text_is_refused(
    conditioner: Conditioner, instruction: str, expressive: str | None, param: str, message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        conditioner.derive([EditRequest(image=_image(0), instruction=instruction, expressive=expressive)])
    assert caught.value.param == param


def _texts(conditioner: TextConditioner, texts: Sequence[str]) -> list[EditCondition]:
    return conditioner.derive([EditRequest(image=_image(0), instruction=text) for text in texts])


def test_text_conditioner_takes_the_words_alone(text_conditioner: TextConditioner) -> None:
    a, b = _texts(text_conditioner, ["make it night", "snow"])
    assert a.condition.shape == (40, 16)
    assert not torch.allclose(a.condition, b.condition)
    torch.testing.assert_close(a.condition, _texts(text_conditioner, ["make it night"])[0].condition, rtol=0, atol=1e-5)
    [empty] = text_conditioner.derive([EditRequest(image=_image(0), instruction="x", expressive="y")])
    assert empty.expressive == "y"
    ids = torch.tensor([[512, 513, *[513] * 38]])
    expected = text_conditioner._encoder(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(a.null_condition, expected, rtol=0, atol=1e-5)


def test_text_conditioner_prefers_a_given_expressive_instruction(text_conditioner: TextConditioner) -> None:
    [given] = text_conditioner.derive([EditRequest(image=_image(0), instruction="x", expressive="a dark sky")])
    [plain] = _texts(text_conditioner, ["a dark sky"])
    torch.testing.assert_close(given.condition, plain.condition)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|startoftext|> b", "<|endoftext|><|endoftext|>"])
def test_text_conditioner_never_reads_control_tokens_from_user_text(
    text_conditioner: TextConditioner, text: str
) -> None:
    ids = text_conditioner._tokenizer(text, split_special_tokens=True)["input_ids"]
    assert [ids[0], ids[-1]] == [512, 513]
    assert not {512, 513} & set(ids[1:-1])
    [edit_condition] = _texts(text_conditioner, [text])
    assert edit_condition.prompt_tokens == len(ids)


def test_text_longer_than_the_encoder_is_refused_not_cut(text_conditioner: TextConditioner) -> None:
    with pytest.raises(PromptError, match="text has 52 tokens; the text encoder takes at most 40"):
        _texts(text_conditioner, ["x" * 50])
