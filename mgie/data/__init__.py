"""What is learnt from: manifests, ledgers, caches, and the order and batches of a run.

ledger.py         schemas of manifests and ledgers, reading them
edit_list.py      lists of edits as JSON Lines
order.py          which sample comes when
randomness.py     noise, timesteps, dropout of a sample
collate.py        examples -> what the models read
examples.py       the rows of a run, frozen from a ledger
latent_cache.py   what the frozen encoders make of images
latent_reader.py  reads such a cache by random access
loader.py         micro-batches, prepared ahead of the step
"""
