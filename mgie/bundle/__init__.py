"""Bundles: one folder that holds one model, or parts of one; where they come from and how they are made.

devices.py    device and dtype by name
weights.py    weight files: hashing, reading safely, loading strictly
record.py     what a bundle says of itself, without loading it
bundle.py     a bundle: its record, its parts on demand
writer.py     writing one
convert.py    published checkpoints -> bundle
untrained.py  random bundles for tests (+ corpus.txt)
shipped.py    the trained ones, packed (+ shipped/)
embedded.py   the bundles that need no download
resolve.py    name, folder, hub id, s3:// -> bundle
__main__.py   `python -m mgie.bundle`: makes the embedded ones now
"""
