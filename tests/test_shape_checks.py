"""That shapes and types of mgie really are checked while the tests run: a silent hook would prove nothing."""

import jaxtyping
import pytest
import torch

from mgie.config import check_range
from mgie.model.guidance import GuidanceInput


def _guidance_input(**changes: object) -> GuidanceInput:
    fields = {
        "latents": torch.zeros(4, 8, 8),
        "timestep": 1.0,
        "image_latents": torch.zeros(4, 8, 8),
        "condition": torch.zeros(5, 16),
        "null_condition": torch.zeros(5, 16),
        "text_scale": 7.5,
        "image_scale": 1.5,
    }
    return GuidanceInput(**(fields | changes))


def test_a_record_of_fitting_shapes_is_accepted() -> None:
    assert _guidance_input().condition.shape == (5, 16)


def test_a_record_whose_shapes_disagree_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        _guidance_input(image_latents=torch.zeros(4, 8, 9))


def test_an_argument_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        check_range("steps", 5, "one", 10)


def test_an_int_is_accepted_where_a_float_is_asked_for() -> None:
    check_range("steps", 10, 1, 10)
