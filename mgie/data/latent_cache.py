"""Caches of what the frozen encoders make of training images: their format, writing and fetching them (`latent_reader.py` reads).

    <folder>/<kind>/cache.json        `CacheStamp`, written last: without it the cache is not finished
    <folder>/<kind>/part-<hash>.bin   rows back to back; a row is its arrays one after the other
    <folder>/<kind>/part-<hash>.ids   their ids, int64, ascending; written after the rows, so a shard with ids is whole

Numbers are little-endian. A row's id is a hash of its images (`ledger.row_id`), so a cache serves every ledger all
of whose ids it holds, and grows by those of another. Shards that the stamp does not list are not part of it.

Knows nothing of how images are read or encoded.

Axes: B batch, c latent channels, h w latent sides, P image patches, d width of the vision tower.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt

from mgie.config import CacheKind
from mgie.errors import DataError
from mgie.storage.folder import Folder

CacheDtype = Literal["float32", "float16"]
Ids = npt.NDArray[np.int64]
Result = TypeVar("Result")

STAMP_FILE = "cache.json"
CACHE_FORMAT = 1
PREPROCESSING = "published training chain"
"How images became squares of `image_side_px`: `geometry.training_pixels`; the vision tower's go through CLIP's on top."
ROWS_SUFFIX, IDS_SUFFIX = ".bin", ".ids"
_ID_DTYPE = np.dtype("<i8")
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_THREADS = 16  # that wait for a store
NAMED_IDS = 5


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What the rows of a cache are."""

    kind: CacheKind
    "vae_moments: of source and goal, unscaled; clip_features: of the source, before the projector"
    encoder: str
    "`encoder_identity` of the bundle that encoded"
    image_side_px: int
    "side of the square images"
    dtype: CacheDtype
    "number format in the files"
    shapes: Mapping[str, tuple[int, ...]]
    "the arrays of a row, in their order"
    preprocessing: str = PREPROCESSING
    "what made the squares"

    @property
    def row_values(self) -> int:
        """Numbers in a row."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def row_bytes(self) -> int:
        """Size of a row in its file."""
        return self.row_values * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard, as its index describes it."""

    ids: Ids
    "ids of its rows, ascending"
    sha256: str
    "hash of the index"


@dataclass(frozen=True, kw_only=True)
class CacheStamp:
    """`cache.json`."""

    spec: CacheSpec
    num_rows: int
    shards: Mapping[str, tuple[int, str]]
    "number of rows and sha256 of the index, by name"


# ---- writing


def write_shard(
    folder: Folder,
    spec: CacheSpec,
    ids: Ids,
    arrays: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """Writes a shard, whole or not at all, under a name that follows from its ids.

    Args:
        arrays: Arrays of `spec.shapes`, each with as many rows as there are ids.

    Raises:
        DataError: A value is not finite, or not in the cache's dtype; its row is named.
        OSError: The folder cannot be written to.
    """
    order = np.argsort(ids)
    ids = ids[order]
    values = np.concatenate([arrays[name].reshape(len(ids), -1) for name in spec.shapes], axis=1)[order]
    assert values.shape[1] == spec.row_values
    with np.errstate(over="ignore"):  # told below, with the row
        values = values.astype(DTYPES[spec.dtype])
    if len(bad := ids[~np.isfinite(values).all(axis=1)]):
        raise DataError(f"{spec.kind} of row {bad[0]} are not all finite {spec.dtype} numbers")
    index = ids.astype(_ID_DTYPE).tobytes()
    name = f"{spec.kind}/part-{hashlib.sha256(index).hexdigest()[:20]}"
    folder.write(name + ROWS_SUFFIX, values.tobytes())
    folder.write(name + IDS_SUFFIX, index)


def list_shards(folder: Folder, spec: CacheSpec) -> dict[str, Shard]:
    """The shards that are whole, by name; none for an empty folder.

    Raises:
        DataError: An index is damaged, or the rows of a shard are not there or not as many.
        OSError: The store is in trouble.
    """
    sizes = {entry.name: entry.num_bytes for entry in folder.list(spec.kind) if entry.name.startswith("part-")}
    names = sorted(name.removesuffix(IDS_SUFFIX) for name in sizes if name.endswith(IDS_SUFFIX))

    def read(name: str) -> Shard:
        path = folder.at(f"{spec.kind}/{name}")
        shard = parse_index(path, folder.read(f"{spec.kind}/{name}{IDS_SUFFIX}"))
        check_size(path, len(shard.ids), spec, sizes.get(name + ROWS_SUFFIX))
        return shard

    return dict(zip(names, _at_once(read, names), strict=True))


def finish_cache(folder: Folder, spec: CacheSpec, shards: Mapping[str, Shard]) -> CacheStamp:
    """Stamps a cache of these shards: from now on it can be opened. Raises OSError."""
    stamp = CacheStamp(
        spec=spec,
        num_rows=len(cached_ids(shards.values())),
        shards={name: (len(shard.ids), shard.sha256) for name, shard in shards.items()},
    )
    content = {"format": CACHE_FORMAT, **dataclasses.asdict(stamp)}
    folder.write(f"{spec.kind}/{STAMP_FILE}", json.dumps(content, indent=1).encode() + b"\n")
    return stamp


def cached_ids(shards: Iterable[Shard]) -> Ids:
    """The ids of all shards, ascending, each once."""
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *(shard.ids for shard in shards)]))


# ---- reading


def fetch_cache(cache: Folder, local: Path, *, kind: CacheKind) -> Path:
    """Copies a cache from a store to a local disk, unless it is there: complete or not at all.

    Of several processes one copies and the others wait; a copy that was cut off is continued. Caches of other
    stamps stay beside it.

    Args:
        cache: The caches' folder in the store.
        local: Folder for copies of caches.

    Returns:
        The folder to open.

    Raises:
        DataError: There is no finished cache, or it is damaged.
        OSError: The store or the disk is in trouble.
    """
    source = cache.at(kind)
    try:
        content = cache.read(f"{kind}/{STAMP_FILE}")
    except FileNotFoundError as error:
        raise DataError(f"{source} holds no {STAMP_FILE}: the cache was not finished, or is another folder") from error
    stamp = parse_stamp(source, content)
    folder = local / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / kind).is_dir():
            return folder
        partial = folder / f".{kind}.partial"
        partial.mkdir(exist_ok=True)

        def copy(name: str, num_bytes: int) -> None:
            target = partial / name
            if target.is_file() and target.stat().st_size == num_bytes:
                return
            cache.download(f"{kind}/{name}", target)
            if (found := target.stat().st_size) != num_bytes:
                raise DataError(f"{source}/{name} has {found} bytes; {STAMP_FILE} says {num_bytes}")

        rows = {name + ROWS_SUFFIX: count * stamp.spec.row_bytes for name, (count, _) in stamp.shards.items()}
        ids = {name + IDS_SUFFIX: count * _ID_DTYPE.itemsize for name, (count, _) in stamp.shards.items()}
        _at_once(lambda file: copy(*file), [*rows.items(), *ids.items()])
        (partial / STAMP_FILE).write_bytes(content)
        partial.replace(folder / kind)
    return folder


# ---- parts of both


def read_local(path: Path, otherwise: str) -> bytes:
    """Content of a file on this disk. Raises DataError, with what `otherwise` says, if there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {otherwise}") from error


def _at_once(work: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    """Results in order, by threads: a store answers many small requests no slower than one."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def parse_index(path: str, content: bytes) -> Shard:
    """The shard of an index. Raises DataError: it is damaged."""
    if not content or len(content) % _ID_DTYPE.itemsize:
        raise DataError(f"{path}{IDS_SUFFIX} is damaged: it has {len(content)} bytes; it must be 8 for each row")
    ids = np.frombuffer(content, _ID_DTYPE).astype(np.int64)
    if (np.diff(ids) <= 0).any():
        raise DataError(f"{path}{IDS_SUFFIX} is damaged: its ids do not ascend")
    return Shard(ids=ids, sha256=hashlib.sha256(content).hexdigest())


def check_size(path: str, num_rows: int, spec: CacheSpec, num_bytes: int | None) -> None:
    """Raises DataError unless a shard has as many bytes as its rows take; None: it is not there."""
    if num_bytes != (expected := num_rows * spec.row_bytes):
        there = "is not there" if num_bytes is None else f"has {num_bytes} bytes"
        raise DataError(
            f"{path}{ROWS_SUFFIX} {there}; {num_rows} rows of {spec.row_bytes} are {expected}: "
            f"delete it and its {IDS_SUFFIX}, and run pipelines/cache.py again"
        )


def parse_stamp(path: Path | str, content: bytes) -> CacheStamp:
    """What `cache.json` says. Raises DataError: it is damaged, or of another version."""
    where = f"{path}/{STAMP_FILE}"
    try:
        data = json.loads(content)
        if data["format"] != CACHE_FORMAT:
            raise DataError(f"{where} has format {data['format']!r}; this version reads {CACHE_FORMAT}")
        spec = data["spec"]
        for name, allowed in (("kind", get_args(CacheKind)), ("dtype", tuple(DTYPES))):
            if spec[name] not in allowed:
                raise DataError(f"{where} has {name} {spec[name]!r}; it must be one of {', '.join(allowed)}")
        shapes = {str(name): tuple(map(int, shape)) for name, shape in spec["shapes"].items()}
        return CacheStamp(
            spec=CacheSpec(
                kind=cast("CacheKind", spec["kind"]),
                encoder=str(spec["encoder"]),
                image_side_px=int(spec["image_side_px"]),
                dtype=cast("CacheDtype", spec["dtype"]),
                shapes=shapes,
                preprocessing=str(spec["preprocessing"]),
            ),
            num_rows=int(data["num_rows"]),
            shards={str(name): (int(count), str(sha256)) for name, (count, sha256) in data["shards"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {error!r}") from error
