"""Near duplicates: both images of two edits look the same, and both ask for the same.

Images are compared by their signatures: an image shrunk to 8 x 8 cells, each the mean colour of its area. Two are
near if no value of 192 differs by more than `NEAR_LEVELS` of 255. Saving again as JPEG, resizing or a change of
format stays far below that; an object of a hundredth of the area, another colour or a brighter exposure does not.
That is on purpose: a repeat that is kept costs a little training time, an edit lost is lost.

Only edits with the same normalised instruction are compared, so many requests for one photo are never duplicates.
The first of several is kept. Knows nothing of files.
"""

import hashlib
import itertools
import unicodedata
from collections import defaultdict

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 8
NEAR_LEVELS = 6
SIGNATURE_BYTES = SIDE * SIDE * 3
PAIR_BYTES = 2 * SIGNATURE_BYTES


def signature(image: Image.Image) -> bytes:
    """Mean colours of 8 x 8 equal areas of an RGB image, row by row: 192 bytes."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def normalized(instruction: str) -> str:
    """An instruction without what does not change its meaning: case, white space, punctuation at the ends, Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", instruction).casefold().split()).strip(" .,;:!?\"'`")


def instruction_key(instruction: str) -> int:
    """63-bit hash of the normalised instruction."""
    return int.from_bytes(hashlib.sha256(normalized(instruction).encode()).digest()[:8], "big") & (2**63 - 1)


def find_duplicates(
    ids: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], signatures: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.int64]:
    """For each edit the index of the earlier, kept edit that it repeats; -1 = it is kept itself.

    Args:
        ids: Ids of N edits in order; equal ids are the same edit. keys: Their `instruction_key`s.
        signatures: N x 384, source then goal; None = only equal ids are duplicates.
    """
    repeats = np.full(len(ids), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    for group in np.split(order, borders):
        if len(group) > 1:
            repeats[group] = _within_group(group, ids, signatures)
    return repeats


def _within_group(
    group: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], signatures: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.int64]:
    """As `find_duplicates`, for edits of one instruction.

    Kept edits lie in the cells of a grid over four coarse brightnesses, each cell twice as wide as the tolerance.
    What is near differs by at most the tolerance in each, so it lies in one of at most 16 cells: a group of a
    million edits is not compared pair by pair.
    """
    found = np.full(len(group), -1, dtype=np.int64)
    kept_by_id: dict[int, int] = {}
    kept_by_cell: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    width = 2 * NEAR_LEVELS
    for place, index in enumerate(group):
        earlier = kept_by_id.get(int(ids[index]))
        if earlier is None and signatures is not None:
            pair = signatures[index].astype(np.int16)
            coarse = _coarse(pair)
            low, high = np.floor((coarse - NEAR_LEVELS) / width), np.floor((coarse + NEAR_LEVELS) / width)
            for cell in itertools.product(*({int(a), int(b)} for a, b in zip(low, high, strict=True))):
                if candidates := kept_by_cell.get(cell):
                    differences = np.abs(signatures[candidates].astype(np.int16) - pair).max(axis=1)
                    near = [one for one, d in zip(candidates, differences, strict=True) if d <= NEAR_LEVELS]
                    earlier = min([*near, *([] if earlier is None else [earlier])], default=None)
            if earlier is None:
                kept_by_cell[tuple(int(c) for c in np.floor(coarse / width))].append(int(index))
        kept_by_id.setdefault(int(ids[index]), int(index) if earlier is None else earlier)
        if earlier is not None:
            found[place] = earlier
    return found


def _coarse(pair: npt.NDArray[np.int16]) -> npt.NDArray[np.float64]:
    """Mean brightness of the upper and lower half of source and goal: four numbers, 0 to 255."""
    return np.asarray(pair.reshape(4, -1).mean(axis=1), dtype=np.float64)
