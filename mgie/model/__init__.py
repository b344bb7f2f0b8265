"""The networks and the mathematics of MGIE, from tokens to losses. Knows no files.

tokens.py              special tokens; user text never becomes one
prompts.py             every prompt template, cleaning of generated text
mllm.py                LLaVA: vision tower, projector, LLM
visual_states.py       which states go to the edit head
generation.py          batched greedy decoding
edit_head.py           states of the visual tokens -> condition
diffusion.py           VAE scaling, noise schedule, UNet
guidance.py            guidance by text and image around a denoiser
sampler.py             one denoising step over many samples
loss.py                language and diffusion loss, condition dropout
batch.py               typed records of a training batch
mgie.py                MGIE and InstructPix2Pix whole, for training
tokenizer_training.py  LLaMA's, T5's and CLIP's tokenizers from texts
"""
