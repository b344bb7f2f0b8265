"""Vision tower, projector and LLM: splicing, masks, recorded features."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from mgie.bundle.bundle import Bundle
from mgie.errors import BundleError
from mgie.model.mllm import MLLM, VisionTower


@pytest.fixture(scope="module")
def mllm(random_bundle: Bundle) -> MLLM:
    return random_bundle.load_mllm(random_bundle.load_tokenizer())


@torch.no_grad()
def test_image_features_replace_the_placeholders_in_order(mllm: MLLM) -> None:
    features = torch.randn(2, mllm.num_patches, 192, generator=torch.Generator().manual_seed(0))
    patch = mllm.im_patch_id
    ids = torch.tensor([[1, 5, *[patch] * mllm.num_patches, 6], [1, *[patch] * mllm.num_patches, 7, 8]])
    embedded = mllm.embed(ids, features)
    assert torch.equal(embedded[0, 2:-1], features[0])
    assert torch.equal(embedded[1, 1:-2], features[1])
    words = mllm.llm.model.embed_tokens(ids)
    assert torch.equal(embedded[ids != patch], words[ids != patch])


def test_a_row_with_another_number_of_placeholders_is_refused(mllm: MLLM) -> None:
    ids = torch.tensor([[1, *[mllm.im_patch_id] * (mllm.num_patches - 1)]])
    with pytest.raises(
        ValueError, match=f"rows hold \\[{mllm.num_patches - 1}\\] image placeholders; each needs {mllm.num_patches}"
    ):
        mllm.embed(ids, torch.zeros(1, mllm.num_patches, 192))


@torch.no_grad()
def test_an_llm_without_eyes_has_word_embeddings_only(random_bundle: Bundle, mllm: MLLM) -> None:
    blind = random_bundle.without_vision().load_mllm(random_bundle.load_tokenizer())
    assert (blind.num_patches, blind.vision, blind.projector) == (0, None, None)
    assert blind.image_features(None) is None
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    words = mllm.llm.model.embed_tokens(ids)
    assert torch.equal(blind.embed(ids, None), words)
    assert torch.equal(blind.embed(ids, torch.zeros(2, 0, 192)), words)
    for features in (None, torch.zeros(1, 0, 192)):
        with pytest.raises(ValueError, match=r"rows hold \[1\] image placeholders; each needs 0"):
            blind.embed(torch.tensor([[1, mllm.im_patch_id]]), features)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_leaves_real_positions_as_they_are(mllm: MLLM, side: str) -> None:
    embeddings = torch.randn(1, 9, 192, generator=torch.Generator().manual_seed(1))
    alone = mllm(embeddings, torch.ones(1, 9, dtype=torch.bool))
    garbage = 50 * torch.randn(1, 4, 192, generator=torch.Generator().manual_seed(2))
    parts = [garbage, embeddings] if side == "left" else [embeddings, garbage]
    mask = torch.tensor([[False] * 4 + [True] * 9 if side == "left" else [True] * 9 + [False] * 4])
    padded = mllm(torch.cat(parts, dim=1), mask)
    torch.testing.assert_close(padded[mask], alone[0], rtol=0, atol=1e-5)


def test_vision_tower_drops_the_class_token_and_reads_the_selected_layer() -> None:
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).eval()
    pixels = torch.randn(2, 3, 28, 28)
    states = clip(pixel_values=pixels, output_hidden_states=True).hidden_states
    tower = VisionTower(clip, -2)
    assert tower.num_patches == 4
    assert torch.equal(tower(pixels), states[2][:, 1:])
    with pytest.raises(BundleError, match="select layer is -5; the tower has 4 hidden states"):
        VisionTower(clip, -5)


def test_a_projector_of_the_wrong_size_is_refused(mllm: MLLM) -> None:
    with pytest.raises(BundleError, match="projector maps 96 -> 100; vision tower and LLM need 96 -> 192"):
        MLLM(mllm.vision, torch.nn.Linear(96, 100), mllm.llm, im_patch_id=mllm.im_patch_id)


def test_visual_embeddings_are_the_last_rows(mllm: MLLM) -> None:
    assert torch.equal(mllm.visual_embeddings(8), mllm.llm.model.embed_tokens.weight[-8:])
