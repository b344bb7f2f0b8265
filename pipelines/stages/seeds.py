"""The seed of a row, which follows from the run's and the row's id, whatever else is edited."""

import hashlib


def row_seed(seed: int, number: int) -> int:
    """The seed of the row with id `number` in a run with `seed`, 0 to 2**32 - 1: whatever else is edited."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")
