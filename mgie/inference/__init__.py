"""One edit with a loaded model: words and image -> condition -> edited image.

words.py            what the model made of the words, without tensors
conditioner.py      words (and image) -> condition
condition_cache.py  conditions that were derived before
preview.py          latents -> colours
renderer.py         condition and image -> edited image
batch_failures.py   a batch that fails is halved down to the item at fault
"""
