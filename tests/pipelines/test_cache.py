"""Filling caches: the stages as plain Python against direct encoding, and the job, cut off and continued."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from mgie.bundle.bundle import open_bundle
from mgie.bundle.record import encoder_identity
from mgie.config import BundleConfig, CacheKind, Provenance
from mgie.data.latent_cache import Ids, fetch_cache
from mgie.data.latent_reader import LatentCache
from mgie.data.ledger import LEDGER_SCHEMA, to_table, write_images_root
from mgie.errors import BundleError, ConfigError, DataError
from mgie.images.geometry import PUBLISHED_SIDE_PX, training_pixels
from mgie.images.pixels import to_signed
from mgie.storage.folder import Folder, open_folder
from pipelines import cache as job
from pipelines.cache import CacheConfig, cache, main
from pipelines.stages.encode import EncodeLatents
from pipelines.stages.squares import CACHED_SCHEMA, FetchSquares, cache_spec
from tests.pipelines.chaos import ROOT, Cluster
from tests.pipelines.jobs import cut_after, kill_when, leave_ray_out, run_here, stuck

pytestmark = pytest.mark.slow

KINDS: tuple[CacheKind, ...] = ("vae_moments", "clip_features")
NUM_IMAGES = 6


def _photo(number: int) -> Image.Image:
    """Noise over a slope, each of another size."""
    rng = np.random.default_rng(number)
    width, height = 90 + 30 * (number % 3), 100 + 17 * (number % 2)
    slope = np.linspace(0, 180, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((slope + rng.integers(0, 70, (height, width, 3))).astype(np.uint8))


def _rows(num_rows: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Rows that are ok."""
    return [
        {
            "id": 2**61 - 977 * i,
            "dataset": "d",
            "split": "train",
            "source": f"images/{i % NUM_IMAGES}.png",
            "goal": f"images/{(i + 1 + i // NUM_IMAGES) % NUM_IMAGES}.png",
            "instruction": f"edit {i}",
            "expressive": "It will be so.",
            "provenance": "{}",
            "status": "ok",
            "attempt": 2,
        }
        for i in range(first, first + num_rows)
    ]


def _write_ledger(folder: Folder, rows: list[dict[str, Any]]) -> None:
    """The rows, an attempt that is not the last, and one that was rejected."""
    for number in range(NUM_IMAGES):
        buffer = io.BytesIO()
        _photo(number).save(buffer, "PNG")
        folder.write(f"images/{number}.png", buffer.getvalue())
    others = [rows[0] | {"attempt": 1, "status": "rejected"}, rows[0] | {"id": 5, "status": "rejected", "source": "x"}]
    with folder.publish("ledger/part-0.parquet") as path:
        pq.write_table(to_table([*others, *rows], LEDGER_SCHEMA), path)
    write_images_root(folder.child("ledger"), "..")


def _ids(rows: list[dict[str, Any]]) -> Ids:
    return np.array([row["id"] for row in rows])


def _pixels(rows: list[dict[str, Any]], column: str, side_px: int) -> list[Image.Image]:
    return [training_pixels(_photo(int(Path(row[column]).stem)), side_px) for row in rows]


def _moments(rows: list[dict[str, Any]], side_px: int) -> dict[str, torch.Tensor]:
    """The slower reference: as a training step without a cache does it, for one batch."""
    vae = open_bundle("random").load_vae()
    source, goal = (torch.stack(list(map(to_signed, _pixels(rows, column, side_px)))) for column in ("source", "goal"))
    with torch.no_grad():
        mean, logvar = vae.moments(goal)
        return {"source_mean": vae.condition_latents(source), "goal_mean": mean, "goal_logvar": logvar}


def _features(rows: list[dict[str, Any]]) -> torch.Tensor:
    bundle = open_bundle("random")
    with torch.no_grad():
        return bundle.load_vision()(bundle.load_clip_pixels()(_pixels(rows, "source", PUBLISHED_SIDE_PX)))


def _open(out: Path, kind: CacheKind, ids: Ids, side_px: int) -> LatentCache:
    encoder = encoder_identity(open_bundle("random"), kind)
    return LatentCache.open(out, kind=kind, encoder=encoder, image_side_px=side_px, ids=ids)


# ---- the stages


def _encode(rows: list[dict[str, Any]], folder: Path, kinds: tuple[CacheKind, ...], batch_size: int) -> pa.Table:
    specs = [cache_spec(open_bundle("random"), kind, image_side_px=64, dtype="float32") for kind in kinds]
    planned = to_table([{name: row[name] for name in CACHED_SCHEMA.names} for row in rows], CACHED_SCHEMA)
    squares = FetchSquares(open_folder(folder), specs)(planned)
    return EncodeLatents("random", specs, batch_size=batch_size, device="cpu")(squares)


def _column(table: pa.Table, name: str) -> torch.Tensor:
    return torch.tensor(np.stack(table.column(name).to_pylist()), dtype=torch.float32)


@pytest.mark.parametrize("kinds", [("vae_moments",), ("clip_features",), KINDS])
def test_the_stages_make_what_training_would(tmp_path: Path, kinds: tuple[CacheKind, ...]) -> None:
    rows = _rows(8)
    _write_ledger(open_folder(tmp_path), rows)
    table = _encode(rows, tmp_path, kinds, batch_size=8)
    expected = _moments(rows, 64) if "vae_moments" in kinds else {}
    if "clip_features" in kinds:
        expected["features"] = _features(rows)
    assert table.column_names == ["id", *expected]
    assert table.column("id").to_pylist() == _ids(rows).tolist()
    for name, values in expected.items():
        assert torch.equal(_column(table, name), values.flatten(1))
    # Sums are added in another order in batches of another size.
    table = _encode(rows, tmp_path, kinds, batch_size=3)
    for name, values in expected.items():
        torch.testing.assert_close(_column(table, name), values.flatten(1), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("column", "uri"), [("source", "images/none.png"), ("goal", "images/bad.png"), ("goal", "../x")]
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, column: str, uri: str) -> None:
    rows = _rows(4)
    _write_ledger(open_folder(tmp_path), rows)
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    rows[2][column] = uri
    with pytest.raises(DataError, match=rf"{column} of row {rows[2]['id']} \({uri}\) cannot be read"):
        _encode(rows, tmp_path, ("vae_moments",), batch_size=4)


def test_goals_are_not_read_for_features_alone(tmp_path: Path) -> None:
    rows = _rows(2)
    _write_ledger(open_folder(tmp_path), rows)
    rows[0]["goal"] = "images/none.png"
    assert _encode(rows, tmp_path, ("clip_features",), batch_size=4).num_rows == 2


def test_the_default_side_is_that_of_the_bundle_and_256_at_most() -> None:
    tiny = open_bundle("random").config
    assert tiny.training_side_px == 128
    large = BundleConfig(name="x", parts=("vae",), trained=False, provenance=Provenance(made_by="x"))
    assert (large.work_area_px, large.training_side_px) == (512 * 512, 256)
    assert replace(large, work_area_px=100 * 100).training_side_px == 96  # the VAE halves three times


# ---- the job, before it starts


def _config(folder: Path, **given: Any) -> CacheConfig:
    return CacheConfig(**{"ledger": str(folder / "ledger"), "out": str(folder / "out"), "bundle": "random"} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_side_px": 60}, "image_side_px is 60; it must be a multiple of 8"),
        ({"image_side_px": -8}, "image_side_px is -8"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
    ],
)
def test_settings_are_checked(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    _write_ledger(open_folder(tmp_path), _rows(2))
    with pytest.raises(ConfigError, match=message):
        cache(_config(tmp_path, **given))
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_the_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no vae"):
        cache(_config(tmp_path, bundle="random-summarizer"))


def test_large_features_must_be_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_ledger(open_folder(tmp_path), _rows(40))
    monkeypatch.setattr(job, "_LARGE_BYTES", 40 * 1024)
    said = io.StringIO()
    with pytest.raises(ConfigError, match=r"clip_features: 40 rows of .* say --yes-large"):
        cache(_config(tmp_path, what="both"), console=Console(file=said, width=200))
    assert "vae_moments, 128 px: 40 rows of 12 KiB float32" in said.getvalue()


# ---- the job


def _flags(folder: str | Path, out: str | Path, *more: str) -> list[str]:
    flags = ["--bundle", "random", "--ledger", f"{folder}/ledger", "--out", str(out), "--device", "cpu"]
    # Of two CPUs there is room for one process that reads, beside the one that encodes.
    flags += ["--encode.num-cpus", "1.5", "--encode.batch-size", "4"]
    return [*flags, "--image-side-px", "64", "--rows-per-shard", "4", *more]


def _shards(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(out.glob("vae_moments/part-*.ids"))}


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.endure)])
def test_a_job_that_was_cut_off_is_continued_and_the_cache_is_what_training_would_encode(
    cluster: Cluster, tmp_path: Path, is_killed: bool
) -> None:
    num_rows, out = 160 if is_killed else 20, tmp_path / "out"
    rows = _rows(num_rows)
    _write_ledger(open_folder(tmp_path), rows)
    flags = _flags(tmp_path, out)
    if is_killed:
        # Each image is one of many rows, so the last row gets one of its own.
        rows[-1]["goal"] = "images/last.png"
        _photo(NUM_IMAGES).save(tmp_path / "images" / "last.png")
        _write_ledger(open_folder(tmp_path), rows)
        with stuck(tmp_path / "images" / "last.png"):
            kill_when(flags, cluster, ROOT / "pipelines" / "cache.py", tmp_path, lambda: bool(_shards(out)))
    else:
        with pytest.MonkeyPatch.context() as patch, cut_after(2):
            leave_ray_out(patch)
            run_here(main, flags)
    before = _shards(out)
    num_left = num_rows - sum(len(content) for content in before.values()) // 8
    assert 0 < num_left < num_rows
    with pytest.raises(DataError, match="not finished"):
        _open(out, "vae_moments", _ids(rows), 64)

    status, text = run_here(main, flags)
    assert status == 0, text
    assert f"{num_left} rows to encode" in text
    after = _shards(out)
    assert {path: after[path] for path in before} == before
    assert sum(len(content) for content in after.values()) // 8 == num_rows  # none twice
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "run.json", "vae_moments"]

    opened = _open(out, "vae_moments", _ids(rows), 64)
    for some in (rows[:4], rows[num_rows - 7 : num_rows - 3]):
        found, expected = opened.moments(_ids(some).tolist()), _moments(some, 64)
        for name, values in expected.items():
            torch.testing.assert_close(getattr(found, name), values, rtol=0, atol=5e-6)

    status, text = run_here(main, flags)
    assert status == 0, text
    assert "0 rows to encode" in text
    assert _shards(out) == after
    same = {"image_side_px": 64, "rows_per_shard": 4}  # refused before Ray is joined
    for other in ({"image_side_px": 72}, {"dtype": "float16"}, {"what": "both"}):
        with pytest.raises(ConfigError, match=r"holds another run: .*caches"):
            cache(_config(tmp_path, **same | other))


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_or_not")
def test_a_cache_in_an_object_store_grows_with_another_ledger_and_is_copied(
    s3: str, s3_server: str, tmp_path: Path
) -> None:
    first, second = _rows(10), _rows(15, first=5)
    _write_ledger(open_folder(f"{s3}/first"), first)
    _write_ledger(open_folder(f"{s3}/second"), second)
    flags = ("--what", "both", "--dtype", "float16", "--endpoint", s3_server)
    for name, num_rows in (("first", 10), ("second", 10)):
        status, text = run_here(main, _flags(f"{s3}/{name}", f"{s3}/out", *flags))
        assert status == 0, text
        assert f"{num_rows} rows to encode" in text
    out = open_folder(f"{s3}/out")
    ids = _ids(_rows(20))
    for kind, side_px in (("vae_moments", 64), ("clip_features", PUBLISHED_SIDE_PX)):
        local = fetch_cache(out, tmp_path / "local", kind=kind)
        opened = _open(local, kind, ids, side_px)
        if kind == "clip_features":
            found, expected = opened.features(ids.tolist()), _features(_rows(20))
        else:
            found, expected = opened.moments(ids.tolist()).goal_mean, _moments(_rows(20), 64)["goal_mean"]
        torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-5)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_or_not")
def test_an_image_that_cannot_be_read_ends_the_job_and_names_its_row(tmp_path: Path) -> None:
    rows = _rows(12)
    rows[7]["goal"] = "images/none.png"
    _write_ledger(open_folder(tmp_path), rows)
    status, text = run_here(main, _flags(tmp_path, tmp_path / "out"))
    assert status == 2
    assert f"error: goal of row {rows[7]['id']} (images/none.png) cannot be read" in text
    assert not list((tmp_path / "out").rglob("cache.json"))
