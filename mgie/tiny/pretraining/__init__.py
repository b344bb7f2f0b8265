"""How the embedded models learn what they do, on samples of the tiny world: one file per model.

    corpus.py    the world's samples on disk, made once       clip.py        pictures and captions in one space
    patches.py   what each patch of a picture shows           llava.py       the MLLM: verbose and concise answers
    loop.py      one resumable training loop                  summarizer.py  verbose answers -> concise instructions
    vae.py       pictures <-> latents                         edit_head.py   the edit head's first lesson
    bundles.py   the bundles that the stages write

UNet and edit head then learn by the product's own training job. Knows nothing of Ray.
"""
