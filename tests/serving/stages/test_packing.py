import pickle

import pytest
import torch

from mgie.inference.conditioner import EditCondition
from serving.stages.packing import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_condition_that_travelled_is_the_same_bit_by_bit(dtype: torch.dtype) -> None:
    tensors = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    condition = EditCondition(
        expressive="a dark sky", condition=tensors[0], null_condition=tensors[1].T.contiguous().T, used_fallback=True,
        prompt_tokens=1, image_tokens=2, output_tokens=3, bundle="b",
    )  # fmt: skip
    derived = pickle.loads(pickle.dumps(pack(condition, replica="r", run=None)))
    back = unpack(derived)
    assert (derived.replica, derived.run) == ("r", None)
    for name, value in vars(condition).items():
        found = getattr(back, name)
        if isinstance(value, torch.Tensor):
            assert found.dtype == dtype
            assert torch.equal(found, value)
        else:
            assert found == value
