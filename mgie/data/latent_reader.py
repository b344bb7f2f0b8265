"""Reads a cache by random access: rows by their ids, as tensors. `latent_cache.py` has the format."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mgie.config import CacheKind
from mgie.data.latent_cache import (
    DTYPES,
    IDS_SUFFIX,
    NAMED_IDS,
    PREPROCESSING,
    ROWS_SUFFIX,
    STAMP_FILE,
    CacheStamp,
    Ids,
    Shard,
    check_size,
    parse_index,
    parse_stamp,
    read_local,
)
from mgie.errors import DataError
from mgie.model.batch import MomentPair


class LatentCache:
    """A cache on a local disk, opened for given rows. Holds about 24 bytes per row; may be sent to other processes."""

    def __init__(self, path: Path, stamp: CacheStamp, shards: Sequence[Shard]) -> None:
        self._path, self.spec, self._names = path, stamp.spec, list(stamp.shards)
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(shard.ids for shard in shards)])
        # A row that two shards hold, after a kill between the shards of two kinds, counts once.
        self._ids, first = np.unique(ids, return_index=True)
        counts = [len(shard.ids) for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)[first]
        self._row_of = np.concatenate([np.empty(0, dtype=np.int64), *map(np.arange, counts)])[first]
        self._counts = counts

    @classmethod
    def open(cls, folder: Path, *, kind: CacheKind, encoder: str, image_side_px: int, ids: Ids) -> "LatentCache":
        """The cache of one kind in `folder`, which must be of this encoder and size and hold all of `ids`.

        Args:
            encoder: `encoder_identity` of the bundle in use.
            image_side_px: Side of the pictures of training; for clip_features always `geometry.PUBLISHED_SIDE_PX`.

        Raises:
            DataError: It is not finished, differs, lacks rows, or is damaged; says what.
        """
        path = folder / kind
        stamp = parse_stamp(path, read_local(path / STAMP_FILE, "the cache was not finished, or is another folder"))
        wanted = {"kind": kind, "encoder": encoder, "image_side_px": image_side_px, "preprocessing": PREPROCESSING}
        found = dataclasses.asdict(stamp.spec)
        if problems := [
            f"{name} is {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value
        ]:
            raise DataError(f"cache {path} does not fit: {'; '.join(problems)}; make another with pipelines/cache.py")
        shards = []
        for name, (num_rows, sha256) in stamp.shards.items():
            shard = parse_index(str(path / name), read_local(path / (name + IDS_SUFFIX), f"{STAMP_FILE} lists it"))
            if (len(shard.ids), shard.sha256) != (num_rows, sha256):
                raise DataError(f"{path / (name + IDS_SUFFIX)} is damaged: it is not what {STAMP_FILE} says")
            rows = path / (name + ROWS_SUFFIX)
            check_size(str(path / name), num_rows, stamp.spec, rows.stat().st_size if rows.is_file() else None)
            shards.append(shard)
        cache = cls(path, stamp, shards)
        if len(missing := np.setdiff1d(ids, cache._ids)):
            some = ", ".join(map(str, missing[:NAMED_IDS])) + (", ..." if len(missing) > NAMED_IDS else "")
            raise DataError(
                f"cache {path} lacks {len(missing)} of {len(np.unique(ids))} rows (ids {some}); "
                "run pipelines/cache.py with this ledger and the same --out"
            )
        return cache

    def moments(self, ids: Sequence[int]) -> MomentPair:
        """What `LatentVAE.moments` gives for the rows' images, in the order of `ids`, float32.

        Raises:
            DataError: A row is not there, or its shard went away or was cut since the cache was opened.
        """
        return MomentPair(**self._arrays(ids))

    def features(self, ids: Sequence[int]) -> Float[Tensor, "B P d"]:
        """What `VisionTower` gives for the rows' source images, in the order of `ids`, float32.

        Raises:
            DataError: As `moments`.
        """
        return self._arrays(ids)["features"]

    def _arrays(self, ids: Sequence[int]) -> dict[str, Tensor]:
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        if len(unknown := wanted[self._ids[places] != wanted]):
            raise DataError(f"cache {self._path} has no row {unknown[0]}")
        dtype = DTYPES[self.spec.dtype]
        values = np.empty((len(wanted), self.spec.row_values), dtype=np.float32)
        for shard in np.unique(self._shard_of[places]):
            is_here = self._shard_of[places] == shard
            path = self._path / (self._names[shard] + ROWS_SUFFIX)
            try:
                # Mapped for this read only, about 50 us: thousands of shards would use up the process's open files.
                rows = np.memmap(path, dtype, mode="r", shape=(self._counts[shard], self.spec.row_values))
            except (OSError, ValueError) as error:  # a file shorter than the map is a ValueError
                raise DataError(f"{path} cannot be read any more: {error}") from error
            values[is_here] = rows[self._row_of[places[is_here]]]
        widths = [math.prod(shape) for shape in self.spec.shapes.values()]
        parts = torch.from_numpy(values).split(widths, dim=1)
        return {
            name: part.reshape(len(wanted), *shape).contiguous()
            for part, (name, shape) in zip(parts, self.spec.shapes.items(), strict=True)
        }
