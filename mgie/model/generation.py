"""Greedy generation by the MLLM in batches, and which hidden states it hands to the edit head.

A batch gives each row the ids and states that it would get alone (up to rounding): rows are padded on the
left, stop one by one and leave the batch. Once a row has written `[IMG0]`, the other visual tokens are
almost certain, so they are fed as a draft and verified in one forward pass instead of one pass each; what
the draft got wrong is thrown away, so the outcome is that of plain greedy decoding.

Axes: B batch, T tokens, P patches, D width of the LLM, N visual tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from mgie.config import GenerationConfig
from mgie.errors import PromptError
from mgie.model.mllm import MLLM
from mgie.model.visual_states import select_start


@dataclass
class Generation:
    """One row's outcome.

    `ids` are prompt and output; `hidden` [len(ids) - 1, D] the states that predicted ids[1:];
    `visual_start` the position of `[IMG0]` in `ids`, None if it never came; `ended_early` True where the
    row stopped because its visual tokens were complete (not by `</s>` or the limit).
    """

    ids: list[int]
    num_prompt: int
    hidden: Tensor
    visual_start: int | None
    ended_early: bool

    @property
    def output_ids(self) -> list[int]:
        """The generated ids."""
        return self.ids[self.num_prompt :]


def select_states(row: Generation, num_visual_tokens: int) -> Float[Tensor, "N D"]:
    """The states of `row` that go to the edit head."""
    start = select_start(len(row.hidden), row.visual_start, num_visual_tokens, complete=not row.ended_early)
    return row.hidden[start : start + num_visual_tokens]


@dataclass(frozen=True)
class _Rules:
    """When rows end."""

    config: GenerationConfig
    is_settled: Callable[[list[int]], bool] | None
    is_wanted: Callable[[int], bool] | None


@dataclass
class _Row:
    """A row being generated."""

    index: int
    ids: list[int]
    num_prompt: int
    ngrams: "_NGrams"
    hidden: list[Tensor]  # pieces of [t, D]
    visual_start: int | None = None
    ended_early: bool = False
    is_done: bool = False


@dataclass
class _NGrams:
    """Which token would repeat an n-gram, kept up to date token by token."""

    size: int
    ids: list[int] = field(default_factory=list)
    followers: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def append(self, token_id: int) -> None:
        if self.size:
            self.ids.append(token_id)
            if len(self.ids) >= self.size:
                self.followers[tuple(self.ids[-self.size : -1])].append(token_id)

    def banned(self) -> list[int]:
        """Ids that may not come next (source: transformers' NoRepeatNGramLogitsProcessor)."""
        if not self.size or len(self.ids) + 1 < self.size:
            return []
        return self.followers.get(tuple(self.ids[len(self.ids) - self.size + 1 :]), [])


@dataclass
class _Group:
    """Rows that share a cache; every row has the same number of cached positions (padding included)."""

    rows: list[_Row]
    cache: DynamicCache
    mask: Bool[Tensor, "B L"]
    logits: Float[Tensor, "B V"]  # of each row's next token

    def select(self, indices: list[int]) -> "_Group":
        """Keeps the named rows; this group's cache must not be used afterwards."""
        if len(indices) < len(self.rows):
            self.cache.batch_select_indices(torch.tensor(indices, device=self.mask.device))
        return _Group([self.rows[i] for i in indices], self.cache, self.mask[indices], self.logits[indices])


class Generator:
    """Greedy decoding with the published rules.

    Args:
        eos_id: `</s>`. visual_ids: Ids of `[IMG0]`.. in order; empty for a plain LLaVA.
    """

    def __init__(self, mllm: MLLM, *, eos_id: int, visual_ids: Sequence[int]) -> None:
        self._mllm, self._eos_id, self._visual_ids = mllm, eos_id, list(visual_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        features: Float[Tensor, "B P D"],
        config: GenerationConfig,
        *,
        is_settled: Callable[[list[int]], bool] | None = None,
        is_wanted: Callable[[int], bool] | None = None,
    ) -> list[Generation]:
        """Continues each prompt until `config.stop`, `</s>` or `config.max_new_tokens`.

        Args:
            prompts: Ids per row, without padding. features: Projected image features per row.
            is_settled: Asked after each token with a row's output ids; true ends the row, because what
                is wanted of it cannot change any more.
            is_wanted: Asked before each token with a row's index; false ends the row with what it has, and changes
                nothing for the others. Once no row is wanted the call returns.

        Raises:
            PromptError: A prompt and its output would not fit the LLM's context.
        """
        for prompt in prompts:
            self.check_length(len(prompt), config)
        if not prompts:
            return []
        rules = _Rules(config, is_settled, is_wanted)
        group = self._prefill(prompts, features, config)
        rows = list(group.rows)
        groups = [group]
        while groups:
            groups.extend(self._advance(groups.pop(), rules))
        return [
            Generation(
                ids=row.ids,
                num_prompt=row.num_prompt,
                hidden=torch.cat(row.hidden)[: len(row.ids) - 1],
                visual_start=row.visual_start,
                ended_early=row.ended_early,
            )
            for row in rows
        ]

    def check_length(self, num_tokens: int, config: GenerationConfig) -> None:
        """Raises PromptError: so many tokens and their output would not fit the LLM's context."""
        room = self._mllm.max_positions - config.max_new_tokens
        if num_tokens > room:
            raise PromptError(
                f"prompt has {num_tokens} tokens with its image; at most {room} fit beside {config.max_new_tokens} new ones",
                param="prompt",
            )

    def _prefill(self, prompts: Sequence[list[int]], features: Tensor, config: GenerationConfig) -> _Group:
        device, longest = self._mllm.device, max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), 0)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        rows = []
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = True
            ngrams = _NGrams(config.no_repeat_ngram_size)
            for token_id in prompt:
                ngrams.append(token_id)
            rows.append(_Row(index=i, ids=list(prompt), num_prompt=len(prompt), ngrams=ngrams, hidden=[]))
        mask = mask.to(device)
        cache = DynamicCache(config=self._mllm.llm.config)
        hidden = self._mllm(self._mllm.embed(ids.to(device), features.to(device)), mask, cache=cache)
        for row in rows:
            row.hidden.append(hidden[row.index, longest - row.num_prompt :])
        return _Group(rows, cache, mask, self._mllm.logits(hidden[:, -1]))

    def _advance(self, group: _Group, rules: _Rules) -> list[_Group]:
        """Gives every row its next token and feeds it; returns the groups that go on."""
        if rules.is_wanted is not None:
            wanted = [i for i, row in enumerate(group.rows) if rules.is_wanted(row.index)]
            if not wanted:
                return []
            group = group.select(wanted)
        for row, token_id in zip(group.rows, self._choose(group), strict=True):
            self._append(row, token_id, rules)
        going = [i for i, row in enumerate(group.rows) if not row.is_done]
        if not going:
            return []
        group = group.select(going)
        drafting = [i for i, row in enumerate(group.rows) if row.visual_start == len(row.ids) - 1]
        if not drafting:
            return [self._feed_last(group)]
        if len(drafting) == len(group.rows):
            return self._verify(group, rules)
        drafted = _Group(
            [group.rows[i] for i in drafting],
            _copy_cache(group.cache, drafting),
            group.mask[drafting],
            group.logits[drafting],
        )
        rest = [i for i in range(len(group.rows)) if i not in drafting]
        return [*self._verify(drafted, rules), self._feed_last(group.select(rest))]

    def _choose(self, group: _Group) -> list[int]:
        logits = group.logits.float()
        banned = [row.ngrams.banned() for row in group.rows]
        if any(banned):
            rows = [i for i, ids in enumerate(banned) for _ in ids]
            logits = logits.clone()
            logits[rows, [token_id for ids in banned for token_id in ids]] = -torch.inf
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen

    def _append(self, row: _Row, token_id: int, rules: _Rules) -> None:
        row.ids.append(token_id)
        row.ngrams.append(token_id)
        if self._visual_ids and row.visual_start is None and token_id == self._visual_ids[0]:
            row.visual_start = len(row.ids) - 1
        at_limit = len(row.ids) - row.num_prompt >= rules.config.max_new_tokens
        row.is_done = token_id == self._eos_id or at_limit
        if not row.is_done and rules.config.stop == "visual_tokens" and row.visual_start is not None:
            # All N states are known once the last visual token is chosen; a row at its limit is not cut short.
            row.ended_early = row.is_done = len(row.ids) >= row.visual_start + len(self._visual_ids)
        if not row.is_done and rules.is_settled is not None:
            row.is_done = rules.is_settled(row.ids[row.num_prompt :])

    def _feed_last(self, group: _Group) -> _Group:
        """One forward pass over each row's newest id; appends the states."""
        hidden, mask = self._forward(group, torch.tensor([[row.ids[-1]] for row in group.rows]))
        for row, states in zip(group.rows, hidden, strict=True):
            row.hidden.append(states)
        return _Group(group.rows, group.cache, mask, self._mllm.logits(hidden[:, -1]))

    def _forward(self, group: _Group, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.cat([group.mask, group.mask.new_ones(ids.shape)], dim=1)
        embeddings = self._mllm.llm.model.embed_tokens(ids.to(self._mllm.device))
        return self._mllm(embeddings, mask, cache=group.cache), mask

    def _verify(self, group: _Group, rules: _Rules) -> list[_Group]:
        """Feeds `[IMG0]`..`[IMG<N-1>]` after rows that just wrote `[IMG0]`, keeps what greedy decoding confirms."""
        draft = self._visual_ids
        cached = group.mask.shape[1]
        hidden, mask = self._forward(group, torch.tensor([draft] * len(group.rows)))
        logits = self._mllm.logits(hidden)
        by_accepted: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(group.rows):
            accepted = 0
            while not row.is_done and accepted + 1 < len(draft):
                at = _Group([row], group.cache, mask[i : i + 1], logits[i : i + 1, accepted])
                if self._choose(at) != [draft[accepted + 1]]:
                    break
                accepted += 1
                self._append(row, draft[accepted], rules)
            row.hidden.append(hidden[i, : accepted + 1])
            if not row.is_done:
                by_accepted[accepted].append(i)
        groups = []
        for accepted, indices in by_accepted.items():
            # The rows of a group share one cache length, so rows that accepted differently part.
            cache = _copy_cache(group.cache, indices)
            if surplus := len(draft) - 1 - accepted:
                cache.crop(-surplus)
            length = cached + accepted + 1
            rows = [group.rows[i] for i in indices]
            groups.append(_Group(rows, cache, mask[indices, :length], logits[indices, accepted]))
        return groups


def _copy_cache(cache: DynamicCache, indices: list[int]) -> DynamicCache:
    """A cache of the named rows that shares nothing with `cache`."""
    copied = DynamicCache()
    for i, layer in enumerate(cache.layers):
        copied.update(layer.keys[indices], layer.values[indices], i)
    return copied
