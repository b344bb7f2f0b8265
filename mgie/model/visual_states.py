"""Which states of the LLM go to the edit head: those that predict the visual tokens, or the published fallback.

Axes: B samples, T positions, D hidden width, N visual tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def select_start(num_states: int, visual_start: int | None, num_visual_tokens: int, *, complete: bool = True) -> int:
    """First of the N consecutive states that go to the edit head.

    These are the states that *predict* `[IMG0]`..`[IMG<N-1>]`: they begin one before `[IMG0]`. Without
    `[IMG0]`, or with too little after it, the published rule falls back to `num_states - (N + 1)`.

    Args:
        num_states: States of this row, without padding.
        complete: False for a row cut off on purpose right after its visual tokens: nothing follows yet,
            so the fallback's bound does not apply.
    """
    last = max(num_states - (num_visual_tokens + 1), 0)
    if visual_start is None:
        return last
    return min(visual_start - 1, last) if complete else visual_start - 1


def gather_states(
    hidden: Float[Tensor, "B T D"], starts: Int[Tensor, " B"], num_visual_tokens: int
) -> Float[Tensor, "B N D"]:
    """Rows `starts[b]` .. `starts[b] + N - 1` of each sample."""
    places = starts[:, None] + torch.arange(num_visual_tokens, device=starts.device)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Right-padded ids and the mask of real tokens."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
    mask = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask
