#!/usr/bin/env python
"""Ledger -> caches for training: what the frozen encoders make of each row's images, once. A Ray Data job.

    ray job submit --working-dir . -- python pipelines/cache.py --ledger s3://bucket/ledger --out s3://bucket/cache

Rows are worked on in blocks of `rows_per_shard`. The actor that encodes a block also writes it as a shard, whole or
not at all, under a name that follows from its rows. The same command continues an interrupted run, and with a ledger
that has grown, or another one, adds the rows that are not in the cache yet. `mgie/data/latent_cache.py` has the format.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.console import Console

from mgie.bundle.resolve import locate_bundle
from mgie.config import CacheKind, check_range
from mgie.data.latent_cache import CacheDtype, CacheSpec, cached_ids, finish_cache, list_shards, write_shard
from mgie.data.ledger import images_root, read_edits
from mgie.errors import ConfigError, DataError, MGIEError
from mgie.storage.folder import Folder, open_folder
from pipelines.runs.blocks import PendingRows, figures_table, stage_blocks, write_pending
from pipelines.runs.cluster import StageSize, absolute_bundle, local_bundles
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.runs.run import open_run
from pipelines.runs.run_record import make_record
from pipelines.runs.settings import ClusterSettings
from pipelines.stages.squares import CACHED_SCHEMA, FetchSquares, cache_spec

What = Literal["vae", "clip", "both"]

_KINDS: dict[What, tuple[CacheKind, ...]] = {
    "vae": ("vae_moments",),
    "clip": ("clip_features",),
    "both": ("vae_moments", "clip_features"),
}
_LARGE_BYTES = 20 << 30
_FETCH_CPUS = 0.5  # decodes, and waits for storage; an encoder of the same size would do it itself (Ray fuses the two)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(ClusterSettings):
    """Fills the caches that training reads instead of running the frozen encoders."""

    ledger: str = "out/ledger"
    "ledger or manifest folder, local or s3://"
    out: str = "out/cache"
    "folder for the caches, local or s3://"
    images: str | None = None
    "where the images lie, if not where the ledger says"
    bundle: str = "tiny"
    "the bundle that training begins from: embedded name, folder, hub id or s3://bucket/prefix"
    what: What = "vae"
    "vae: VAE moments of source and goal; clip: patch features of the source, which are large; or both"
    image_side_px: int = 0
    "side of the square training images; 0 = that of the bundle, at most 256"
    dtype: CacheDtype = "float32"
    "number format in the files; float32 trains exactly as without a cache, float16 halves the size"
    device: str = "auto"
    "auto, cpu or cuda"
    encode: StageSize = field(default_factory=lambda: StageSize(num_cpus=1.0, batch_size=16))
    "size of the encoding stage"
    rows_per_shard: int = 128
    "rows of one block, which is written whole or not at all"
    yes_large: bool = False
    "write CLIP features of more than 20 GiB"

    def __post_init__(self) -> None:
        check_range("rows_per_shard", self.rows_per_shard, 1, 1_000_000)


def cache(config: CacheConfig, *, console: Console | None = None) -> Ending:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds caches of another encoder, size or dtype, or has another writer, the features
            are large, or the cluster is too small.
        DataError: The ledger cannot be read, or an image of it; the row is named.
        BundleError: The bundle cannot be used.
        OSError: A store is in trouble.
    """
    say(console, f"reading {config.ledger} ...")
    config = dataclasses.replace(config, bundle=absolute_bundle(config.bundle))
    bundle = locate_bundle(config.bundle)
    side_px = config.image_side_px or bundle.config.training_side_px
    specs = [cache_spec(bundle, kind, image_side_px=side_px, dtype=config.dtype) for kind in _KINDS[config.what]]
    ledger = open_folder(config.ledger, endpoint=config.endpoint)
    out = open_folder(config.out, endpoint=config.endpoint)
    images = open_folder(images_root(ledger, moved_to=config.images), endpoint=config.endpoint)
    _check_sizes(config, specs, sum(map(len, read_edits(ledger, columns=["id"]))), console)
    # Not the ledger: a row's id says what its images are, so that a cache may serve several.
    decides = {"caches": [dataclasses.asdict(spec) for spec in specs]}
    with open_run(out, make_record("cache", config, decides), config, console) as run:
        done = functools.reduce(np.intersect1d, [cached_ids(list_shards(out, spec).values()) for spec in specs])
        batches = read_edits(ledger, columns=CACHED_SCHEMA.names)
        new = (batch.filter(pa.array(~np.isin(batch.column("id").to_numpy(), done))) for batch in batches)
        pending = write_pending(out, new, CACHED_SCHEMA, rows_per_block=config.rows_per_shard)
        run.say(f"{pending.num_rows} rows to encode; caches: {out.url}")
        shared = {"the folder of the images": images, **local_bundles(config.bundle)}
        run.work(
            pending,
            lambda: _stream(config, specs, out, images, pending),
            {"encode": config.encode},
            shared,
            task_cpus=_FETCH_CPUS,
        )
        stamps = [finish_cache(out, spec, list_shards(out, spec)) for spec in specs]
        num_bytes = sum(stamp.num_rows * stamp.spec.row_bytes for stamp in stamps)
        report = {"rows": stamps[0].num_rows, "bytes": num_bytes}
        run.finish(report)
    size = f"{stamps[0].num_rows} rows, {num_bytes / 2**20:.1f} MiB: {out.url}"
    return Ending(said=f"{pending.num_rows} rows encoded; {size}", report=report)


def _check_sizes(config: CacheConfig, specs: list[CacheSpec], num_rows: int, console: Console | None) -> None:
    for spec in specs:
        num_bytes = num_rows * spec.row_bytes
        size = f"{num_rows} rows of {spec.row_bytes / 1024:.0f} KiB {spec.dtype} are {num_bytes / 2**30:.2f} GiB"
        say(console, f"{spec.kind}, {spec.image_side_px} px: {size}")
        if spec.kind == "clip_features" and num_bytes > _LARGE_BYTES and not config.yes_large:
            raise ConfigError(
                f"{spec.kind}: {size}, above {_LARGE_BYTES / 2**30:.0f} GiB; say --yes-large, "
                "or --what vae: the vision tower is a small share of a training step",
                param="yes_large",
            )


class _EncodeAndCommit:
    """Encodes a block and writes its shards; returns its figures."""

    def __init__(self, config: CacheConfig, specs: list[CacheSpec], out: Folder) -> None:
        from pipelines.stages.encode import (
            EncodeLatents,  # here, because it needs torch, which the driver and the tasks that fetch do without
        )

        self._specs, self._out = specs, out
        self._encode = EncodeLatents(config.bundle, specs, batch_size=config.encode.batch_size, device=config.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            figures: dict[str, Any] = {"rows": self._commit(table)}
        except MGIEError as error:  # of what a worker raises Ray Data would bring back a traceback only
            figures = {"error": str(error)}
        return figures_table(figures)

    def _commit(self, table: pa.Table) -> int:
        encoded = self._encode(table)
        ids = encoded.column("id").to_numpy()
        arrays = {
            name: encoded.column(name).combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
            for name in encoded.column_names[1:]
        }
        for spec in self._specs:
            write_shard(self._out, spec, ids, arrays)
        return len(ids)


def _stream(
    config: CacheConfig, specs: list[CacheSpec], out: Folder, images: Folder, pending: PendingRows
) -> Iterator[dict[str, Any]]:
    """Runs the blocks; yields the figures of each when it is written. Raises DataError for a row at fault."""
    stage = (FetchSquares(images, specs), _EncodeAndCommit, config, specs, out)
    for figures in stage_blocks(pending, *stage, size=config.encode, num_cpus=_FETCH_CPUS):
        if "error" in figures:
            raise DataError(figures["error"])
        yield figures


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(CacheConfig, cache, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
