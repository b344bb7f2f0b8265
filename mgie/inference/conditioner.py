"""Words (and image) -> condition: the first half of an edit.

`Conditioner` and `renderer.Renderer` share nothing but an `EditCondition`, so each can run on its own machine.
Knows nothing of files, and nothing of diffusion but the shape of its condition.

Axes: B batch, T tokens, P patches, D LLM width, N visual tokens, Q queries, C condition width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mgie.config import GenerationConfig
from mgie.errors import PromptError
from mgie.images.pixels import ClipPixels
from mgie.inference.words import DerivedWords
from mgie.model.edit_head import EditHead
from mgie.model.generation import Generation, Generator, select_states
from mgie.model.mllm import MLLM
from mgie.model.prompts import (
    EncodedPrompt,
    check_text,
    clean_expressive,
    encode_answered,
    encode_question,
    generated_text,
)
from mgie.model.tokens import Tokenizer
from mgie.model.visual_states import gather_states, pad, select_start


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """What a conditioner needs of one edit."""

    image: Image.Image
    "source, RGB, any size"
    instruction: str
    "the user's words"
    expressive: str | None = None
    "an expressive instruction given by the user, used in place of a derived one"


@dataclass(frozen=True, kw_only=True)
class EditCondition(DerivedWords):
    """All that the diffusion stage needs of the words; small enough to send (about 120 KB per condition in half precision)."""

    condition: Float[Tensor, "Q C"]
    "conditioning of the UNet"
    null_condition: Float[Tensor, "Q C"]
    "conditioning that means `no words`"


@runtime_checkable
class Conditioner(Protocol):
    """Turns words (and, for an MLLM, the image) into a condition."""

    def derive(
        self,
        requests: Sequence[EditRequest],
        config: GenerationConfig | None = None,
        *,
        is_wanted: Callable[[int], bool] | None = None,
    ) -> list[EditCondition]:
        """The condition of each request, in order.

        Args:
            requests: The edits, as one batch.
            config: How the expressive instruction is written; None = the bundle's own way.
            is_wanted: Asked with a request's index before each of its tokens; false ends its part in the batch, and
                what is returned for it means nothing.

        Raises:
            PromptError: A text is blank or too long.
        """
        ...

    def num_prompt_tokens(self, request: EditRequest) -> int:
        """Length that the request has in a batch before anything is generated; equal lengths need no padding.

        Raises:
            PromptError: A text is blank or too long for the model (and what the bundle lets it write).
        """
        ...


class MLLMConditioner:
    """LLaVA writes the expressive instruction; the states of its visual tokens become the condition.

    Args:
        clip_pixels: None for an LLM that does not see the image.
        generation: Defaults of the bundle. bundle: Its identity.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        clip_pixels: ClipPixels | None,
        mllm: MLLM,
        edit_head: EditHead,
        generation: GenerationConfig,
        bundle: str,
    ) -> None:
        self._tokenizer, self._clip_pixels, self._mllm, self._edit_head = tokenizer, clip_pixels, mllm, edit_head
        self._generation, self._bundle = generation, bundle
        self._num_visual = len(tokenizer.visual_ids)
        self._generator = Generator(mllm, eos_id=tokenizer.eos_id, visual_ids=tokenizer.visual_ids)

    @torch.inference_mode()
    def derive(
        self,
        requests: Sequence[EditRequest],
        config: GenerationConfig | None = None,
        *,
        is_wanted: Callable[[int], bool] | None = None,
    ) -> list[EditCondition]:
        """See `Conditioner`; an `expressive` text given is teacher-forced instead of generated."""
        for request in requests:
            _check_texts(request)
        if not requests:
            return []
        features = self._image_features(requests)
        derived: dict[int, EditCondition] = {}
        given = [i for i, request in enumerate(requests) if request.expressive is not None]
        if given:
            derived |= zip(given, self._force([requests[i] for i in given], features[given]), strict=True)
        free = [i for i, request in enumerate(requests) if request.expressive is None]
        if free:
            generation = config or self._generation
            derived |= zip(
                free,
                self._generate(
                    [requests[i] for i in free],
                    features[free],
                    generation,
                    None if is_wanted is None else lambda row: is_wanted(free[row]),
                ),
                strict=True,
            )
        return [derived[i] for i in range(len(requests))]

    def num_prompt_tokens(self, request: EditRequest) -> int:
        """See `Conditioner`."""
        _check_texts(request)
        if request.expressive is not None:
            return len(self._encode_answered(request).ids)
        num_tokens = len(self._encode_question(request))
        self._generator.check_length(num_tokens, self._generation)
        return num_tokens

    def _image_features(self, requests: Sequence[EditRequest]) -> Float[Tensor, "B P D"]:
        if self._clip_pixels is None:  # P = 0
            return torch.zeros(len(requests), 0, self._mllm.llm.config.hidden_size, device=self._mllm.device)
        return self._mllm.image_features(self._clip_pixels([request.image for request in requests]))

    def _encode_question(self, request: EditRequest) -> list[int]:
        return encode_question(self._tokenizer, request.instruction, self._mllm.num_patches)

    def _encode_answered(self, request: EditRequest) -> EncodedPrompt:
        prompt = encode_answered(self._tokenizer, request.instruction, request.expressive or "", self._mllm.num_patches)
        if len(prompt.ids) > self._mllm.max_positions:
            raise PromptError(
                f"prompt and expressive instruction have {len(prompt.ids)} tokens; "
                f"at most {self._mllm.max_positions} fit the model",
                param="expressive",
            )
        return prompt

    def _generate(
        self,
        requests: Sequence[EditRequest],
        features: Float[Tensor, "B P D"],
        config: GenerationConfig,
        is_wanted: Callable[[int], bool] | None,
    ) -> list[EditCondition]:
        prompts = [self._encode_question(request) for request in requests]
        rows = self._generator.generate(prompts, features, config, is_wanted=is_wanted)
        states = torch.stack([select_states(row, self._num_visual) for row in rows])
        texts = [clean_expressive(generated_text(self._tokenizer, row.output_ids)) for row in rows]
        return self._edit_conditions(
            states,
            texts,
            used_fallback=[used_fallback(row, self._num_visual) for row in rows],
            num_prompt=[row.num_prompt for row in rows],
            num_output=[len(row.output_ids) for row in rows],
        )

    def _force(self, requests: Sequence[EditRequest], features: Float[Tensor, "B P D"]) -> list[EditCondition]:
        prompts = [self._encode_answered(request) for request in requests]
        ids, mask = pad([prompt.ids for prompt in prompts], self._tokenizer.pad_id)
        ids, mask = ids.to(self._mllm.device), mask.to(self._mllm.device)
        hidden = self._mllm(self._mllm.embed(ids, features), mask)
        starts = torch.tensor([(prompt.visual_start or 0) - 1 for prompt in prompts])
        return self._edit_conditions(
            gather_states(hidden, starts.to(hidden.device), self._num_visual),
            [request.expressive or "" for request in requests],
            used_fallback=[False] * len(requests),
            num_prompt=[len(prompt.ids) for prompt in prompts],
            num_output=[0] * len(requests),
        )

    def _edit_conditions(
        self,
        states: Float[Tensor, "B N D"],
        texts: list[str],
        *,
        used_fallback: list[bool],
        num_prompt: list[int],
        num_output: list[int],
    ) -> list[EditCondition]:
        embeddings = self._mllm.visual_embeddings(self._num_visual)
        conditions = self._edit_head(states, embeddings).cpu()
        null_condition = self._edit_head.null_condition(embeddings)[0].cpu()
        return [
            EditCondition(
                expressive=text,
                # Cloned: a view would carry the whole batch's storage wherever it is sent.
                condition=condition.clone(),
                null_condition=null_condition,
                used_fallback=fallback,
                prompt_tokens=prompt - self._mllm.num_patches,
                image_tokens=self._mllm.num_patches,
                output_tokens=output,
                bundle=self._bundle,
            )
            for text, condition, fallback, prompt, output in zip(
                texts, conditions, used_fallback, num_prompt, num_output, strict=True
            )
        ]


def _check_texts(request: EditRequest) -> None:
    check_text(request.instruction, "prompt")
    if request.expressive is not None:
        check_text(request.expressive, "expressive")


def used_fallback(row: Generation, num_visual_tokens: int) -> bool:
    """Whether the states of `row` are not those of its own `[IMG0]`: it never came, or came too late."""
    if row.visual_start is None:
        return True
    start = select_start(len(row.hidden), row.visual_start, num_visual_tokens, complete=not row.ended_early)
    return start != row.visual_start - 1


class TextConditioner:
    """CLIP's text encoder on the words alone: plain InstructPix2Pix, also fed with a given expressive instruction."""

    def __init__(self, *, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, bundle: str) -> None:
        self._tokenizer, self._encoder, self._bundle = tokenizer, encoder, bundle
        self._length = int(encoder.config.max_position_embeddings)

    @torch.inference_mode()
    def derive(
        self,
        requests: Sequence[EditRequest],
        config: GenerationConfig | None = None,  # noqa: ARG002  # the Protocol's
        *,
        is_wanted: Callable[[int], bool] | None = None,  # noqa: ARG002  # the Protocol's
    ) -> list[EditCondition]:
        """See `Conditioner`; nothing is generated: only the words matter, and all of them end together."""
        if not requests:
            return []
        texts = [request.instruction if request.expressive is None else request.expressive for request in requests]
        ids = [self._encode(""), *map(self._encode_request, requests)]
        padded = torch.tensor([row + [self._tokenizer.pad_token_id] * (self._length - len(row)) for row in ids])
        states = self._encoder(input_ids=padded.to(self._encoder.device)).last_hidden_state.cpu()
        return [
            EditCondition(
                expressive=text if request.expressive is not None else "",
                condition=condition.clone(),
                null_condition=states[0].clone(),
                used_fallback=False,
                prompt_tokens=len(row),
                image_tokens=0,
                output_tokens=0,
                bundle=self._bundle,
            )
            for request, text, row, condition in zip(requests, texts, ids[1:], states[1:], strict=True)
        ]

    def num_prompt_tokens(self, request: EditRequest) -> int:
        """See `Conditioner`: every text is padded to the encoder's length."""
        self._encode_request(request)
        return self._length

    def _encode_request(self, request: EditRequest) -> list[int]:
        _check_texts(request)
        ids = self._encode(request.instruction if request.expressive is None else request.expressive)
        if len(ids) > self._length:
            raise PromptError(
                f"text has {len(ids)} tokens; the text encoder takes at most {self._length}",
                param="prompt" if request.expressive is None else "expressive",
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        # split_special_tokens: a user's "<|endoftext|>" stays text.
        ids: list[int] = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        return ids
