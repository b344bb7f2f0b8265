"""Edit head: shapes, published key names, the null condition."""

import pytest
import torch

from mgie.errors import BundleError
from mgie.model.edit_head import EditHead

SIZES = {
    "llm_dim": 12,
    "condition_dim": 6,
    "width": 16,
    "num_queries": 5,
    "num_heads": 4,
    "num_layers": 2,
    "feedforward_dim": 24,
}


def _head() -> EditHead:
    torch.manual_seed(0)
    return EditHead(**SIZES)


def test_null_condition_is_the_head_of_zero_states() -> None:
    head, embeddings = _head(), torch.randn(8, 12)
    assert torch.equal(head.null_condition(embeddings), head(torch.zeros(1, 8, 12), embeddings))
    assert head.null_condition(embeddings).shape == (1, 5, 6)


def test_rows_do_not_depend_on_each_other() -> None:
    head, states, embeddings = _head(), torch.randn(3, 8, 12), torch.randn(8, 12)
    together = head(states, embeddings)
    for i in range(3):
        torch.testing.assert_close(together[i], head(states[i : i + 1], embeddings)[0], rtol=0, atol=1e-6)


def test_embeddings_are_added_to_the_states() -> None:
    head, states, embeddings = _head(), torch.randn(2, 8, 12), torch.randn(8, 12)
    torch.testing.assert_close(head(states, embeddings), head(states + embeddings, torch.zeros(8, 12)))


def test_sizes_are_read_off_the_weights() -> None:
    assert EditHead.infer_config(_head().state_dict()) == SIZES
    weights = _head().state_dict()
    del weights["hid2feat.weight"]
    with pytest.raises(BundleError, match=r"hid2feat\.weight"):
        EditHead.infer_config(weights)


def test_published_sizes_and_names_are_the_default() -> None:
    with torch.device("meta"):
        head = EditHead(llm_dim=4096, condition_dim=768)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes["query"] == (1, 77, 512)
    assert shapes["mapper.decoder.layers.3.multihead_attn.in_proj_weight"] == (1536, 512)
    assert shapes["mapper.encoder.norm.weight"] == (512,)
    assert shapes["hid2feat.weight"] == (768, 512)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(BundleError, match="width 18 is not divisible by 4 heads"):
        EditHead(**(SIZES | {"width": 18}))
