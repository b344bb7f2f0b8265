"""The edit head's first lesson: to say in the UNet's language what the text encoder says.

The UNet that an MGIE begins with was trained on the text encoder of an InstructPix2Pix. Before both are trained end to
end, the edit head learns to give, from the visual tokens, the embedding that the text encoder has of the instruction, and
the LLM to write the visual tokens. So training end to end begins where InstructPix2Pix ended.

Source: Koh et al., NeurIPS 2023 (GILL), section 3.1, "learning to produce images".
"""

from pathlib import Path

import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mgie.data.collate import ConversationCollator, EncoderCollator
from mgie.model.edit_head import EditHead
from mgie.model.loss import language_loss
from mgie.model.mllm import MLLM
from mgie.model.tokens import Tokenizer
from mgie.model.visual_states import gather_states
from mgie.tiny.pretraining.clip import TEXT_LENGTH, clip_batch
from mgie.tiny.pretraining.corpus import Corpus
from mgie.tiny.pretraining.loop import LoopConfig, fit

LOOP = LoopConfig(steps=600, batch=32, lr=1.5e-3, seed=16)


def learn_head(
    corpus: Corpus,
    *,
    llava: MLLM,
    tokenizer: Tokenizer,
    head: EditHead,
    text_encoder: CLIPTextModel,
    text_tokenizer: CLIPTokenizer,
    state_file: Path,
    loop: LoopConfig = LOOP,
    log: Path | None = None,
) -> None:
    """Trains edit head, word embeddings and LM head, in place; the rest stays as it is."""
    num_visual = len(tokenizer.visual_ids)
    trained = nn.ModuleList([head, llava.llm.model.embed_tokens, llava.llm.lm_head])
    llava.requires_grad_(requires_grad=False)
    trained.requires_grad_(requires_grad=True)
    collate = ConversationCollator(tokenizer, num_patches=llava.num_patches)
    encode = EncoderCollator(text_tokenizer, length=TEXT_LENGTH, which="instruction").encode

    def loss(rng: Generator) -> dict[str, Tensor]:
        numbers = rng.integers(corpus.num_samples, size=loop.batch)
        words = [corpus.words[n] for n in numbers]
        batch = collate([(one.instruction, one.expressive) for one in words])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = llava.image_features(clip_batch(corpus.sources(numbers)))
                ids = encode([*(one.instruction for one in words), ""]).input_ids
                wanted: Tensor = text_encoder(input_ids=ids).last_hidden_state
            hidden = llava.forward_shared(llava.embed(batch.input_ids, features), batch.mask, batch.num_shared)
            logits = llava.logits(hidden.flatten(0, 1)[batch.label_positions])
            states = gather_states(hidden, batch.state_starts, num_visual)
            # The last row is the null condition, which stands for empty words.
            given = head(torch.cat([states, torch.zeros_like(states[:1])]), llava.visual_embeddings(num_visual))
        wanted = wanted.float()
        distance = (given.float() - wanted).square().mean() / wanted.var()
        language = language_loss(logits, batch.label_ids)
        return {"loss": language + distance, "distance": distance, "language": language}

    fit(trained, loop, loss, state_file, log=log)
