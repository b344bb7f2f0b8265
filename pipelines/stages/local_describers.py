"""Describers that run their model in this process: LLaVA as a bundle, or any LLaVA of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

from mgie.bundle.bundle import open_bundle
from mgie.bundle.devices import resolve_device, resolve_dtype
from mgie.config import GenerationConfig
from mgie.errors import ConfigError
from mgie.images.pixels import ClipPixels
from mgie.model.generation import Generator
from mgie.model.prompts import DATA_SUFFIX, QUESTION, clean_expressive, encode_question, generated_text, is_settled
from pipelines.stages.describers import Description


class BundleDescriber:
    """A LLaVA (or MGIE) bundle with the published prompt: greedy, no n-gram rule.

    Args:
        stop_early: End a row at its second sentence; the rest would be cut anyway, the text is the same.
    """

    def __init__(self, bundle: str, *, max_new_tokens: int, stop_early: bool, device: str, dtype: str) -> None:
        opened = open_bundle(bundle)
        target = resolve_device(device)
        self._tokenizer = opened.load_tokenizer()
        self._clip_pixels = opened.load_clip_pixels()
        self._mllm = opened.load_mllm(self._tokenizer, resolve_dtype(dtype, target)).to(target)
        # No visual ids: in data generation [IMG*] tokens have no part to play.
        self._generator = Generator(self._mllm, eos_id=self._tokenizer.eos_id, visual_ids=())
        self._config = GenerationConfig(max_new_tokens=max_new_tokens, no_repeat_ngram_size=0, stop="eos")
        self._stop_early = stop_early
        self.model, self.revision = opened.config.name, opened.identity

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        """See `Describer`."""
        prompts = [
            encode_question(self._tokenizer, instruction, self._mllm.num_patches, for_data=True)
            for instruction in instructions
        ]
        features = self._mllm.image_features(self._clip_pixels(images))
        rows = self._generator.generate(
            prompts,
            features,
            self._config,
            is_settled=(lambda ids: is_settled(self._text(ids))) if self._stop_early else None,
        )
        return [
            Description(
                text=clean_expressive(self._text(row.output_ids)),
                prompt_tokens=row.num_prompt,
                output_tokens=len(row.output_ids),
            )
            for row in rows
        ]

    def _text(self, output_ids: list[int]) -> str:
        return generated_text(self._tokenizer, output_ids)


class TransformersDescriber:
    """A LLaVA 1.5 of transformers (`llava-hf/...`), with its own prompt and the same question.

    Args:
        model: Hub id or folder. revision: Of the hub id.
    """

    def __init__(self, model: str, *, revision: str | None, max_new_tokens: int, device: str, dtype: str) -> None:
        target = resolve_device(device)
        where = {"revision": revision} if revision else {}
        try:
            self._model = LlavaForConditionalGeneration.from_pretrained(
                model, dtype=resolve_dtype(dtype, target), use_safetensors=True, **where
            ).to(target)
            self._tokenizer = AutoTokenizer.from_pretrained(model, **where)
            self._clip_pixels = ClipPixels(_preprocessor_config(model, revision))
        except (OSError, ValueError) as error:
            raise ConfigError(f"LLaVA model {model!r} cannot be loaded: {error}", param="describe_model") from error
        self._model.eval()
        self._max_new_tokens = max_new_tokens
        vision = self._model.config.vision_config
        self._num_patches = (vision.image_size // vision.patch_size) ** 2
        if self._model.config.vision_feature_select_strategy == "full":
            self._num_patches += 1  # the class token stays
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.model = model
        self.revision = revision or getattr(self._model.config, "_commit_hash", None) or "local"

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        """See `Describer`."""
        prompts = [self._prompt(instruction) for instruction in instructions]
        batch = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)
        pixels = self._clip_pixels(images).to(self._model.device, self._model.dtype)
        out = self._model.generate(
            **batch, pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=self._max_new_tokens
        )
        answers = out[:, batch["input_ids"].shape[1] :].tolist()
        eos = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        descriptions = []
        for prompt, answer in zip(prompts, answers, strict=True):
            end = next((i for i, token_id in enumerate(answer) if token_id in eos), len(answer))
            text = self._tokenizer.decode(answer[:end], skip_special_tokens=True)
            descriptions.append(
                Description(
                    text=clean_expressive(text), prompt_tokens=len(prompt), output_tokens=min(end + 1, len(answer))
                )
            )
        return descriptions

    def _prompt(self, instruction: str) -> list[int]:
        """Ids of `USER: `, P times `<image>`, a newline, the question, ` ASSISTANT:`; the instruction is never parsed for special tokens."""
        before = self._tokenizer("USER: ")["input_ids"]
        asked = "\n" + QUESTION.format(instruction=instruction) + DATA_SUFFIX + " ASSISTANT:"
        after = self._tokenizer(asked, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*before, *[self._model.config.image_token_id] * self._num_patches, *after]


def _preprocessor_config(model: str, revision: str | None) -> dict[str, Any]:

    config, _ = ImageProcessingMixin.get_image_processor_dict(model, revision=revision or "main")
    # A processor saved as a whole keeps the image part under its own key.
    inner: dict[str, Any] = config.get("image_processor", config)
    return inner
