"""Scores of edits and of the model itself.

bootstrap.py      means with intervals
metrics.py        the metrics of the papers, as a table
network_files.py  where the networks are that they look through
perceptual.py     CLIP, DINO and LPIPS
scorer.py         measures them
parity.py         comparison with recorded vectors
"""
