"""LLaVA: vision tower, projector, image features spliced into the word embeddings, hidden states.

Knows nothing of prompts or decoding (`generation.py`).

Axes: B batch, T tokens, P image patches, S image side of the vision tower, D width of the LLM, V vocabulary.
"""

from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, CLIPVisionModel, DynamicCache, LlamaForCausalLM

from mgie.errors import BundleError


class VisionTower(nn.Module):
    """CLIP's patch features of one hidden layer, without the class token.

    Args:
        clip: The CLIP vision model.
        select_layer: Index into its hidden states; -2 in LLaVA-7B-v1.
    """

    def __init__(self, clip: CLIPVisionModel, select_layer: int = -2) -> None:
        super().__init__()
        num_states = clip.config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise BundleError(f"vision select layer is {select_layer}; the tower has {num_states} hidden states")
        self.clip = clip
        self.select_layer = select_layer

    @property
    def num_patches(self) -> int:
        """P: how many features an image becomes."""
        return int((self.clip.config.image_size // self.clip.config.patch_size) ** 2)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P d"]:
        """Patch features of CLIP-normalised pixels."""
        out = self.clip(pixel_values=pixels, output_hidden_states=True)
        features: Tensor = out.hidden_states[self.select_layer][:, 1:]
        return features


class MLLM(nn.Module):
    """Vision tower + linear projector + LLaMA.

    Args:
        vision, projector: None for an LLM that does not see the image; P is 0 then.
        im_patch_id: Id of the placeholder tokens that image features replace.
    """

    def __init__(
        self, vision: VisionTower | None, projector: nn.Linear | None, llm: LlamaForCausalLM, *, im_patch_id: int
    ) -> None:
        super().__init__()
        if vision is not None and projector is not None:
            width_in, width_out = vision.clip.config.hidden_size, llm.config.hidden_size
            if (projector.in_features, projector.out_features) != (width_in, width_out):
                raise BundleError(
                    f"projector maps {projector.in_features} -> {projector.out_features}; "
                    f"vision tower and LLM need {width_in} -> {width_out}"
                )
        self.vision, self.projector, self.llm = vision, projector, llm
        self.im_patch_id = im_patch_id

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.llm.model.norm.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the LLM's weights."""
        dtype: torch.dtype = self.llm.lm_head.weight.dtype
        return dtype

    @property
    def num_patches(self) -> int:
        """P: `<im_patch>` tokens per image."""
        return 0 if self.vision is None else self.vision.num_patches

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return int(self.llm.config.max_position_embeddings)

    def visual_embeddings(self, num_visual_tokens: int) -> Float[Tensor, "N D"]:
        """Input embeddings of the visual tokens: the last rows of the embedding matrix."""
        rows = self.llm.config.vocab_size
        # Looked up, not sliced off: so the module's own hooks bring the rows where its weight is sharded.
        embeddings: Tensor = self.llm.model.embed_tokens(
            torch.arange(rows - num_visual_tokens, rows, device=self.device)
        )
        return embeddings

    @overload
    def image_features(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P D"]: ...
    @overload
    def image_features(self, pixels: None) -> None: ...
    def image_features(self, pixels: Float[Tensor, "B 3 S S"] | None) -> Float[Tensor, "B P D"] | None:
        """Projected patch features; None where no image is seen."""
        if pixels is None:
            return None
        assert self.vision is not None, "an LLM that does not see the image was given one"
        return self.project(self.vision(pixels.to(self.device, self.vision.clip.dtype)))

    def project(self, features: Float[Tensor, "B P d"]) -> Float[Tensor, "B P D"]:
        """Features of the vision tower in the LLM's space."""
        assert self.projector is not None, "an LLM that does not see the image was given features"
        projected: Tensor = self.projector(features.to(self.device, self.projector.weight.dtype))
        return projected

    def embed(self, input_ids: Int[Tensor, "B T"], features: Float[Tensor, "B P D"] | None) -> Float[Tensor, "B T D"]:
        """Word embeddings with each row's `<im_patch>` embeddings replaced by its image features (None: P = 0).

        Raises:
            ValueError: A row has not exactly P placeholders (a bug: prompts are built with P of them).
        """
        embeddings: Tensor = self.llm.model.embed_tokens(input_ids)
        places = input_ids == self.im_patch_id
        self._check_placeholders(places, 0 if features is None else features.shape[1])
        # In training the embeddings may be of higher precision than the frozen blocks that read them.
        embeddings = embeddings.to(self.llm.model.norm.weight.dtype)
        if features is None:
            return embeddings
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    def _check_placeholders(self, places: Bool[Tensor, "B T"], num_patches: int) -> None:
        # On the host only: no device is waited for inside a training step.
        if places.device.type == "cpu" and not bool((places.sum(1) == num_patches).all()):
            raise ValueError(f"rows hold {places.sum(1).tolist()} image placeholders; each needs {num_patches}")

    def forward(
        self,
        embeddings: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "B L"],
        *,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm.

        Args:
            embeddings: The new positions only, where `cache` holds earlier ones.
            mask: True at real tokens, over earlier and new positions (L = cached + T); padding may be on
                either side, positions are counted over real tokens.
        """
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        out = self.llm.model(
            inputs_embeds=embeddings,
            # Ready-made: of a mask of real tokens transformers asks the device whether it is needed at all, and so
            # waits for it.
            attention_mask=_causal_mask(mask, embeddings.shape[1]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def forward_shared(
        self, embeddings: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"], num_shared: int
    ) -> Float[Tensor, "B T D"]:
        """Hidden states of rows that all begin with the same `num_shared` embeddings, which pass once.

        Attention is causal, so their keys and values are the same in every row; gradients add up over the rows.
        Padding must be on the right. Not with gradient checkpointing, which keeps no keys and values.
        """
        hidden: Tensor
        if num_shared == 0 or len(embeddings) == 1:
            hidden = self(embeddings, mask)
            return hidden
        cache = DynamicCache(config=self.llm.config)
        first = self(embeddings[:1, :num_shared], mask[:1, :num_shared], cache=cache)
        cache.batch_repeat_interleave(len(embeddings))
        rest = self(embeddings[:, num_shared:], mask, cache=cache)
        return torch.cat([first.expand(len(embeddings), -1, -1), rest], dim=1)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Scores of the next token."""
        scores: Tensor = self.llm.lm_head(hidden)
        return scores


def _causal_mask(mask: Bool[Tensor, "B L"], num_new: int) -> Bool[Tensor, "B 1 T L"]:
    """Whom each of the last `num_new` tokens sees: earlier real ones and itself (padding must see something, too)."""
    seen = torch.arange(mask.shape[1], device=mask.device)
    own = seen[-num_new:, None]
    return (mask[:, None, None, :] & (seen < own)) | (seen == own)
