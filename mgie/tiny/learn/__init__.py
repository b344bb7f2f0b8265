"""How the embedded models learn what they do, on samples of the tiny world: one file per model.

    corpus.py   the world's samples as arrays and texts, made once     loop.py   one resumable training loop
    words.py    the tokenizers                                          vae.py    pictures <-> latents
    clip.py     pictures and captions in one space                      llava.py  the MLLM: verbose and short answers
    summarizer.py   verbose answers -> concise instructions             head.py   the edit head's first lesson
    editor.py       the bundles that the stages write                   __main__.py   one stage per call

UNet and edit head then learn by the product's own training job. Knows nothing of Ray.
"""
