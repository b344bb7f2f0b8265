import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from pipelines.readers.duplicates import (
    NEAR_LEVELS,
    PAIR_BYTES,
    find_duplicates,
    instruction_key,
    normalized,
    signature,
)


def _photo(seed: int, wh: tuple[int, int] = (192, 128)) -> Image.Image:
    """Smooth shapes with some texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(wh, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 8, (wh[1], wh[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "jpeg", quality=quality)
    return Image.open(out).convert("RGB")


def _difference(first: Image.Image, second: Image.Image) -> int:
    a, b = (np.frombuffer(signature(image), np.uint8).astype(int) for image in (first, second))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("seed", range(5))
def test_the_same_picture_saved_or_scaled_again_is_near(seed: int) -> None:
    photo = _photo(seed)
    assert _difference(photo, _as_jpeg(photo, 60)) <= NEAR_LEVELS
    assert _difference(photo, photo.resize((96, 64), Image.Resampling.BICUBIC)) <= NEAR_LEVELS
    assert _difference(photo, _as_jpeg(photo.resize((230, 150)), 75)) <= NEAR_LEVELS


@pytest.mark.parametrize("seed", range(5))
def test_small_edits_are_not_near(seed: int) -> None:
    photo = _photo(seed)
    spot = photo.copy()
    middle = np.asarray(photo)[60, 90].astype(int)
    ImageDraw.Draw(spot).ellipse((84, 54, 100, 70), fill=tuple(int(v) for v in (middle + 120) % 256))
    assert _difference(photo, spot) > NEAR_LEVELS  # a spot of less than a hundredth of the area
    assert _difference(photo, ImageEnhance.Brightness(photo).enhance(1.1)) > NEAR_LEVELS
    assert _difference(photo, photo.convert("L").convert("RGB")) > NEAR_LEVELS
    assert _difference(photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > NEAR_LEVELS


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("Make it night.", "  make   it NIGHT!", True),
        ("make it \uff4eight", "make it night", True),  # a wide letter
        ('"add a cat"', "add a cat", True),
        ("add a cat", "add cat", False),
        ("make it 2x brighter", "make it 3x brighter", False),
    ],
)
def test_instructions_are_normalised(one: str, other: str, is_same: bool) -> None:
    assert (normalized(one) == normalized(other)) == is_same
    assert (instruction_key(one) == instruction_key(other)) == is_same


def _slow(ids: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], signatures: npt.NDArray[np.uint8]) -> list[int]:
    """The definition, pair by pair."""
    found: list[int] = []
    for i in range(len(ids)):
        repeats = -1
        for j in range(i):
            if ids[j] == ids[i]:
                repeats = j if found[j] < 0 else found[j]
                break
        else:
            for j in range(i):
                far = np.abs(signatures[j].astype(int) - signatures[i]).max() > NEAR_LEVELS
                if found[j] < 0 and keys[j] == keys[i] and not far:
                    repeats = j
                    break
        found.append(repeats)
    return found


@given(data=st.data(), count=st.integers(0, 40))
def test_duplicates_equal_the_definition_pair_by_pair(data: st.DataObject, count: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bases = rng.integers(0, 256, (3, PAIR_BYTES))
    picked = rng.integers(0, 3, count)
    # Differences around the tolerance, in few places or in all, so that both sides of the border are met.
    noise = rng.integers(-NEAR_LEVELS, NEAR_LEVELS + 1, (count, 1)) + rng.integers(-2, 3, (count, PAIR_BYTES)) * (
        rng.random((count, 1)) < 0.5
    )
    signatures = np.clip(bases[picked] + noise, 0, 255).astype(np.uint8)
    keys = rng.integers(0, 2, count)
    ids = keys * 1000 + rng.integers(0, 30, count)  # the same edit has the same instruction
    for i, number in enumerate(ids):  # ... and the same images
        signatures[i] = signatures[np.flatnonzero(ids == number)[0]]
    assert find_duplicates(ids, keys, signatures).tolist() == _slow(ids, keys, signatures)


def test_many_requests_for_one_photo_are_no_duplicates() -> None:
    count = 200
    signatures = np.zeros((count, PAIR_BYTES), np.uint8)
    keys = np.array([instruction_key(f"request {i}") for i in range(count)])
    assert (find_duplicates(np.arange(count), keys, signatures) == -1).all()


def test_one_request_for_many_photos_is_no_duplicate_and_takes_no_quadratic_time() -> None:
    count = 4000
    values = np.random.default_rng(0).integers(0, 256, (count, 6)).repeat(PAIR_BYTES // 6, axis=1)
    signatures = values.astype(np.uint8).view(_Counted)
    _Counted.num_read = 0
    repeats = find_duplicates(np.arange(count), np.zeros(count, np.int64), signatures)
    assert (repeats == -1).sum() > count * 0.95
    assert count <= _Counted.num_read < count * 20  # pair by pair would be 8 million


class _Counted(np.ndarray[Any, np.dtype[np.uint8]]):
    """Signatures that count how many rows of them are read."""

    num_read = 0

    def __getitem__(self, index: object) -> npt.NDArray[np.uint8]:
        found = np.asarray(super().__getitem__(index))
        _Counted.num_read += found.size // PAIR_BYTES
        return found


def test_a_near_goal_alone_is_no_duplicate() -> None:
    signatures = np.zeros((2, PAIR_BYTES), np.uint8)
    signatures[1, : PAIR_BYTES // 2] = 100
    assert find_duplicates(np.array([1, 2]), np.array([5, 5]), signatures).tolist() == [-1, -1]


def test_the_first_is_kept_and_chains_lead_to_it() -> None:
    signatures = np.zeros((4, PAIR_BYTES), np.uint8)
    signatures[1], signatures[2] = 5, 10  # 0 ~ 1 and 1 ~ 2, but not 0 ~ 2
    repeats = find_duplicates(np.array([10, 11, 12, 11]), np.zeros(4, np.int64), signatures)
    assert repeats.tolist() == [-1, 0, -1, 0]


def test_without_signatures_only_equal_ids_are_duplicates() -> None:
    assert find_duplicates(np.array([7, 8, 7, 7]), np.zeros(4, np.int64), None).tolist() == [-1, -1, 0, 0]


def test_no_edits_have_no_duplicates() -> None:
    empty = np.zeros(0, np.int64)
    assert len(find_duplicates(empty, empty, np.zeros((0, PAIR_BYTES), np.uint8))) == 0
