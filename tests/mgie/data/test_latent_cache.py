"""The format of caches and its reader; what is written stands in for what encoders make (see tests/pipelines)."""

import dataclasses
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs

from mgie.bundle.bundle import Bundle
from mgie.bundle.record import encoder_identity
from mgie.config import FileEntry
from mgie.data.latent_cache import (
    STAMP_FILE,
    CacheSpec,
    Ids,
    cached_ids,
    fetch_cache,
    finish_cache,
    list_shards,
    write_shard,
)
from mgie.data.latent_reader import LatentCache
from mgie.errors import BundleError, DataError
from mgie.storage.folder import open_folder

LOCAL = pafs.LocalFileSystem()
SHAPES = {"source_mean": (4, 3, 5), "goal_mean": (4, 3, 5), "goal_logvar": (4, 3, 5)}
SPEC = CacheSpec(kind="vae_moments", encoder="e1", image_side_px=40, dtype="float32", shapes=SHAPES)
Rows = dict[int, dict[str, np.ndarray]]


def _rows(num_rows: int, *, seed: int = 0, spec: CacheSpec = SPEC) -> Rows:
    rng = np.random.default_rng(seed)
    ids = rng.choice(2**63 - 1, num_rows, replace=False)
    return {
        int(number): {name: rng.standard_normal(shape).astype(np.float32) for name, shape in spec.shapes.items()}
        for number in ids
    }


def _write(folder: Path, rows: Rows, *, spec: CacheSpec = SPEC, per_shard: int = 7) -> None:
    ids = list(rows)
    for start in range(0, len(ids), per_shard):
        some = ids[start : start + per_shard]
        arrays = {name: np.stack([rows[number][name] for number in some]) for name in spec.shapes}
        write_shard(open_folder(folder), spec, np.array(some), arrays)


def _finish(folder: Path, spec: CacheSpec = SPEC) -> None:
    finish_cache(open_folder(folder), spec, list_shards(open_folder(folder), spec))


def _ids(rows: Rows) -> Ids:
    return np.array(list(rows), dtype=np.int64)


def _open(folder: Path, ids: Ids, spec: CacheSpec = SPEC) -> LatentCache:
    return LatentCache.open(folder, kind=spec.kind, encoder=spec.encoder, image_side_px=spec.image_side_px, ids=ids)


@pytest.fixture
def rows() -> Rows:
    return _rows(40)


@pytest.fixture
def folder(tmp_path: Path, rows: Rows) -> Path:
    _write(tmp_path / "cache", rows)
    _finish(tmp_path / "cache")
    return tmp_path / "cache"


def _shard_file(folder: Path, suffix: str) -> Path:
    return sorted((folder / "vae_moments").glob(f"part-*{suffix}"))[2]


# ---- what is written is read


def test_any_rows_in_any_order_are_what_was_written(folder: Path, rows: Rows) -> None:
    cache, rng = _open(folder, _ids(rows)), np.random.default_rng(1)
    for num_rows in (1, 2, 17, 60):
        wanted = [int(number) for number in rng.choice(_ids(rows), num_rows)]  # some more than once
        moments = cache.moments(wanted)
        for name in SHAPES:
            expected = torch.from_numpy(np.stack([rows[number][name] for number in wanted]))
            found = getattr(moments, name)
            assert torch.equal(found, expected)
            assert found.is_contiguous()
            found.zero_()  # memory of its own: a map of the file could not be written to
    assert torch.equal(
        cache.moments(wanted).goal_mean, torch.from_numpy(np.stack([rows[i]["goal_mean"] for i in wanted]))
    )


def test_features_are_the_rows_of_their_own_kind(tmp_path: Path) -> None:
    spec = CacheSpec(kind="clip_features", encoder="v", image_side_px=512, dtype="float32", shapes={"features": (9, 6)})
    rows = _rows(10, spec=spec)
    _write(tmp_path, rows, spec=spec)
    _finish(tmp_path, spec)
    cache = _open(tmp_path, _ids(rows), spec)
    expected = np.stack([row["features"] for row in rows.values()])
    assert torch.equal(cache.features(list(rows)), torch.from_numpy(expected))
    with pytest.raises(DataError, match="vae_moments"):
        _open(tmp_path, _ids(rows))


def test_float16_takes_half_the_space_and_rounds(tmp_path: Path, rows: Rows) -> None:
    half = dataclasses.replace(SPEC, dtype="float16")
    assert (SPEC.row_bytes, half.row_bytes) == (3 * 60 * 4, 3 * 60 * 2)
    _write(tmp_path, rows, spec=half)
    _finish(tmp_path, half)
    found = _open(tmp_path, _ids(rows)).moments(list(rows)).goal_mean
    expected = np.stack([row["goal_mean"] for row in rows.values()])
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected.astype(np.float16).astype(np.float32))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 40 * half.row_bytes


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float32", np.inf), ("float16", 70000.0)])
def test_a_number_that_the_cache_cannot_hold_is_refused_with_its_row(tmp_path: Path, dtype: str, value: float) -> None:
    rows = _rows(3)
    number = list(rows)[1]
    rows[number]["goal_mean"][0, 0, 0] = value
    with pytest.raises(DataError, match=f"vae_moments of row {number} are not all finite {dtype}"):
        _write(tmp_path, rows, spec=dataclasses.replace(SPEC, dtype=dtype))
    assert not list(tmp_path.rglob("*.ids"))


def test_the_same_rows_in_any_order_make_the_same_files(tmp_path: Path, rows: Rows) -> None:
    _write(tmp_path / "a", rows, per_shard=40)
    _write(tmp_path / "b", dict(reversed(rows.items())), per_shard=40)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a/vae_moments").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b/vae_moments").iterdir()}
    assert len(files) == 2


def test_a_cache_grows_and_what_its_stamp_does_not_list_is_not_part_of_it(folder: Path, rows: Rows) -> None:
    more = _rows(5, seed=9)
    before = _open(folder, _ids(rows))
    _write(folder, more)
    with pytest.raises(DataError, match="lacks 5 of 45 rows"):
        _open(folder, _ids(rows | more))
    _finish(folder)
    assert _open(folder, _ids(rows | more)).moments(list(more)).goal_mean.shape == (5, 4, 3, 5)
    number, row = next(iter(rows.items()))
    assert np.array_equal(before.moments([number]).goal_mean[0].numpy(), row["goal_mean"])


def test_a_row_in_two_shards_counts_once(folder: Path, rows: Rows) -> None:
    again = dict(list(rows.items())[3:9])
    _write(folder, again)
    shards = list_shards(open_folder(folder), SPEC)
    assert finish_cache(open_folder(folder), SPEC, shards).num_rows == 40
    assert np.array_equal(cached_ids(shards.values()), np.sort(_ids(rows)))
    found = _open(folder, _ids(rows)).moments(list(rows)).source_mean
    assert np.array_equal(found.numpy(), np.stack([row["source_mean"] for row in rows.values()]))


def test_a_cache_travels_to_other_processes(folder: Path, rows: Rows) -> None:
    cache = pickle.loads(pickle.dumps(_open(folder, _ids(rows))))
    assert np.array_equal(cache.moments([list(rows)[7]]).goal_mean[0].numpy(), list(rows.values())[7]["goal_mean"])


# ---- what does not fit is refused


def test_all_that_differs_is_named(folder: Path, rows: Rows) -> None:
    other = dataclasses.replace(SPEC, encoder="e2", image_side_px=48)
    with pytest.raises(DataError, match=r"encoder is 'e1', not 'e2'; image_side_px is 40, not 48"):
        _open(folder, _ids(rows), other)


def test_other_preprocessing_is_refused(tmp_path: Path, rows: Rows) -> None:
    _write(tmp_path, rows)
    _finish(tmp_path, dataclasses.replace(SPEC, preprocessing="letterbox"))
    with pytest.raises(DataError, match="preprocessing is 'letterbox'"):
        _open(tmp_path, _ids(rows))


def test_missing_rows_are_counted_and_named(folder: Path, rows: Rows) -> None:
    with pytest.raises(DataError, match=r"lacks 7 of 9 rows \(ids 1, 2, 3, 4, 5, \.\.\.\)"):
        _open(folder, np.array([7, 6, 5, 4, 3, 2, 1, *list(rows)[:2], 7]))
    cache = _open(folder, _ids(rows))
    for unknown in (0, 2**63 - 1):  # before the first, behind the last
        with pytest.raises(DataError, match=f"has no row {unknown}"):
            cache.moments([*rows, unknown])


def test_a_cache_that_was_not_finished_is_refused(tmp_path: Path, rows: Rows) -> None:
    _write(tmp_path, rows)
    with pytest.raises(DataError, match=r"cache\.json cannot be read .*not finished"):
        _open(tmp_path, _ids(rows))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _swap_ids(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[8:16] + content[:8] + content[16:])


def _change_an_id(path: Path) -> None:
    ids = np.fromfile(path, "<i8")
    ids[0] -= 1
    ids.tofile(path)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", _cut, r"\.bin has 5032 bytes; 7 rows of 720 are 5040"),
        (".bin", Path.unlink, r"\.bin is not there; 7 rows"),
        (".ids", Path.unlink, r"\.ids cannot be read .*cache\.json lists it"),
        (".ids", _cut, r"\.ids is damaged: it is not what"),
        (".ids", lambda path: path.write_bytes(b"123"), r"\.ids is damaged: it has 3 bytes"),
        (".ids", lambda path: path.write_bytes(b""), r"\.ids is damaged: it has 0 bytes"),
        (".ids", _swap_ids, r"\.ids is damaged: its ids do not ascend"),
        (".ids", _change_an_id, r"\.ids is damaged: it is not what"),
    ],
)
def test_a_damaged_shard_is_refused(
    folder: Path, rows: Rows, suffix: str, damage: Callable[[Path], object], message: str
) -> None:
    path = _shard_file(folder, suffix)
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        _open(folder, _ids(rows))
    assert path.stem in str(caught.value)


def test_a_shard_cut_while_the_cache_is_open_is_an_error_not_a_crash(folder: Path, rows: Rows) -> None:
    cache = _open(folder, _ids(rows))
    path = _shard_file(folder, ".bin")
    _cut(path)
    with pytest.raises(DataError, match=rf"{path.name} cannot be read any more"):
        cache.moments(list(rows))
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} cannot be read any more"):
        cache.moments(list(rows))


def test_a_writer_refuses_to_go_on_beside_a_cut_shard(folder: Path) -> None:
    _cut(_shard_file(folder, ".bin"))
    with pytest.raises(DataError, match=r"delete it and its \.ids"):
        list_shards(open_folder(folder), SPEC)


def test_rows_whose_index_was_not_written_do_not_count(tmp_path: Path, rows: Rows) -> None:
    _write(tmp_path, rows)
    _shard_file(tmp_path, ".ids").unlink()
    assert len(cached_ids(list_shards(open_folder(tmp_path), SPEC).values())) == 33
    assert list_shards(open_folder(tmp_path / "none"), SPEC) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stamp: stamp.pop("shards"), "damaged: KeyError"),
        (lambda stamp: stamp.update(shards=[1]), "damaged"),
        (lambda stamp: stamp["spec"].update(shapes=None), "damaged"),
        (lambda stamp: stamp.update(format=2), "format 2; this version reads 1"),
        (lambda stamp: stamp["spec"].update(dtype="int8"), "dtype 'int8'; it must be one of float32, float16"),
        (lambda stamp: stamp["spec"].update(dtype="float16"), r"7 rows of 360"),
        (lambda stamp: stamp["spec"].update(kind="x"), "kind 'x'"),
    ],
)
def test_a_stamp_that_cannot_be_used_is_refused(
    folder: Path, rows: Rows, change: Callable[[dict], object], message: str
) -> None:
    path = folder / "vae_moments" / STAMP_FILE
    stamp = json.loads(path.read_text())
    change(stamp)
    path.write_text(json.dumps(stamp))
    with pytest.raises(DataError, match=message):
        _open(folder, _ids(rows))
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        _open(folder, _ids(rows))


# ---- who encoded


def test_bundles_with_the_same_encoder_share_caches(random_folder: Path) -> None:
    bundle, other = Bundle(random_folder), Bundle(random_folder)

    def change(name: str) -> None:
        files = {**bundle.config.files, name: FileEntry(sha256="0" * 64, size=1)}
        other.config = dataclasses.replace(bundle.config, name="other", files=files)

    def same() -> tuple[bool, bool]:
        vae, clip = (
            encoder_identity(bundle, kind) == encoder_identity(other, kind) for kind in ("vae_moments", "clip_features")
        )
        return vae, clip

    change("unet/diffusion_pytorch_model.safetensors")
    assert same() == (True, True)
    change("vae/diffusion_pytorch_model.safetensors")
    assert same() == (False, True)
    change("vision/preprocessor_config.json")
    assert same() == (True, False)
    other.config = dataclasses.replace(bundle.config, vision_select_layer=-1)
    assert same() == (True, False)
    other.config = dataclasses.replace(bundle.config, parts=("unet",))
    with pytest.raises(BundleError, match="has no vae"):
        encoder_identity(other, "vae_moments")


# ---- copying to a local disk


def _fetch(folder: Path, local: Path) -> Path:
    return fetch_cache(open_folder(folder), local, kind="vae_moments")


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("part-*")}


def test_a_cache_is_copied_once(folder: Path, rows: Rows, tmp_path: Path) -> None:
    copied = _fetch(folder, tmp_path / "local")
    expected = _open(folder, _ids(rows)).moments(list(rows))
    assert torch.equal(_open(copied, _ids(rows)).moments(list(rows)).goal_logvar, expected.goal_logvar)
    before = _state(copied)
    assert _fetch(folder, tmp_path / "local") == copied
    assert _state(copied) == before
    assert len(before) == 12


def test_a_copy_that_was_cut_off_is_continued(folder: Path, rows: Rows, tmp_path: Path) -> None:
    copied = _fetch(folder, tmp_path / "local")
    partial = (copied / "vae_moments").rename(copied / ".vae_moments.partial")
    (partial / STAMP_FILE).unlink()
    cut, gone = sorted(partial.glob("*.bin"))[:2]
    _cut(cut)
    gone.unlink()
    kept = {path.name: state for path, state in _state(partial).items() if path != cut}
    assert _fetch(folder, tmp_path / "local") == copied
    _open(copied, _ids(rows)).moments(list(rows))
    after = {path.name: state for path, state in _state(copied).items()}
    assert {name: after[name] for name in kept} == kept
    assert len(kept) == 10


def test_copies_of_a_cache_that_grew_lie_side_by_side(folder: Path, rows: Rows, tmp_path: Path) -> None:
    first = _fetch(folder, tmp_path / "local")
    more = _rows(3, seed=5)
    _write(folder, more)
    _finish(folder)
    second = _fetch(folder, tmp_path / "local")
    assert first != second
    _open(first, _ids(rows))
    _open(second, _ids(rows | more))


def test_of_several_processes_one_copies(folder: Path, rows: Rows, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(_fetch(folder, tmp_path / "local"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    _open(found[0], _ids(rows)).moments(list(rows))


def test_only_a_whole_cache_is_copied(folder: Path, tmp_path: Path) -> None:
    _cut(_shard_file(folder, ".bin"))
    with pytest.raises(DataError, match=r"has 5032 bytes; cache\.json says 5040"):
        _fetch(folder, tmp_path / "local")
    assert not list((tmp_path / "local").rglob(STAMP_FILE))
    (folder / "vae_moments" / STAMP_FILE).unlink()
    with pytest.raises(DataError, match="not finished"):
        _fetch(folder, tmp_path / "local")
