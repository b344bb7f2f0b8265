"""Flan-T5 with the published prompt."""

import re
from collections.abc import Sequence

import torch

from mgie.bundle.bundle import open_bundle
from mgie.model.prompts import SUMMARIZE
from pipelines.stages.summarize import Preset

_SUMMARIZER_TOKENS = 512  # T5 was trained on inputs of this length


class Summarizer:
    """Flan-T5 with the published prompt.

    Args:
        bundle: One with the part `summarizer`. dtype: float32 or bfloat16; T5 overflows in float16.
    """

    def __init__(self, bundle: str, preset: Preset, *, device: str = "auto", dtype: str = "auto") -> None:
        opened = open_bundle(bundle)
        self._model, self._tokenizer = opened.load_summarizer(device=device, dtype=dtype)
        self._preset = preset
        # Splits between the first and second character of every control token.
        control = sorted(self._tokenizer.all_special_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control))
        self.model, self.revision = opened.config.name, opened.identity

    @torch.inference_mode()
    def summarize(self, texts: Sequence[str]) -> list[tuple[str, int, int]]:
        """Summary, tokens read and tokens written for each text."""
        prompts = [self._ids(SUMMARIZE.format(text=text)) for text in texts]
        batch = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)
        out = self._model.generate(
            **batch,
            do_sample=False,
            num_beams=self._preset.num_beams,
            min_length=self._preset.min_length,
            max_length=self._preset.max_length,
            no_repeat_ngram_size=self._preset.no_repeat_ngram_size,
        )
        num_read = batch["attention_mask"].sum(1).tolist()
        num_written = (out != self._tokenizer.pad_token_id).sum(1).tolist()
        summaries = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        return list(zip([summary.strip() for summary in summaries], num_read, num_written, strict=True))

    def _ids(self, text: str) -> list[int]:
        """Ids of a prompt; too long a one is cut, as in the published run.

        What LLaVA wrote is text, whatever it looks like. T5's tokenizer finds `</s>` and its like even when
        told not to (they are ordinary pieces of its vocabulary), so such a string is encoded in two halves.
        """
        ids: list[int] = []
        for part in self._control.split(text):
            if part:
                ids += self._tokenizer(part, add_special_tokens=False)["input_ids"]
        return [*ids[: _SUMMARIZER_TOKENS - 1], self._tokenizer.eos_token_id]
