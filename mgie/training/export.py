"""A training run -> what can be used: a bundle, or files in the layout of the published weights.

A checkpoint holds only what trained. The bundle that training began from gives the rest: files of parts that did
not train are copied as they are, of parts that did, the trained tensors are laid over the others, each in the dtype
in which the base holds it. Knows nothing of training.
"""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.bundle.record import required_parts
from mgie.bundle.weights import TensorPlan, Weights, cast_in_range, list_misfits, write_safetensors
from mgie.bundle.writer import BundleWriter
from mgie.config import Part, Provenance, WeightKind
from mgie.errors import BundleError, ConfigError, DataError
from mgie.storage.atomic import atomic_folder
from mgie.storage.folder import open_folder
from mgie.training.checkpoint import (
    SNAPSHOT_FILE,
    Snapshot,
    TensorSet,
    newest,
    parse_snapshot,
    read_snapshot,
    snapshot_name,
    tensor_file,
)

CHECKPOINTS = "checkpoints"  # of a run folder: where its snapshots lie
PUBLISHED_FILES = ("mllm.pt", "unet.pt")

_EMBEDDINGS, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LLM_BLOCKS = "mllm.llm.model.layers."
# Parts that train, and where their tensors are in a training module.
_PREFIXES: dict[Part, str] = {
    "llm": "mllm.llm.",
    "edit_head": "edit_head.",
    "unet": "unet.",
    "text_encoder": "text_encoder.",
}
_TENSORS: dict[WeightKind, TensorSet] = {"ema": "ema", "raw": "trainable"}
_MAX_LISTED = 20  # problems named in one message
_SEEING_SIZES = ("image_patches", "vision_side_px")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run has trained."""

    snapshot: Snapshot
    kind: WeightKind
    "running averages, or the weights of the last step"
    tensors: Mapping[str, Tensor]
    "weights, by the training module's parameter names"


def read_trained(run: str | Path, *, step: int | None = None, weights: WeightKind | None = None) -> Trained:
    """The trained weights of a run.

    Args:
        run: A run's folder, or the folder of one checkpoint; local or in a store (`s3://bucket/prefix`).
        step: Which checkpoint of the run; None = the newest that is complete.
        weights: None = `ema` where it was kept, else `raw`.

    Raises:
        DataError: There is no such checkpoint, or it is damaged.
        ConfigError: `weights` is `ema`, which this run did not keep.
    """
    with tempfile.TemporaryDirectory(prefix="mgie-") as scratch:
        is_remote = "://" in str(run)
        snapshot = _fetch(str(run), step, weights, Path(scratch)) if is_remote else _find(Path(run), step)
        if step is not None and snapshot.step != step:
            raise DataError(f"{run} is the checkpoint of step {snapshot.step}, not of step {step}")
        kind = _choose(snapshot, weights)
        return Trained(snapshot=snapshot, kind=kind, tensors=snapshot.load(_TENSORS[kind]))


def open_base(snapshot: Snapshot, where: str | Path | None = None) -> Bundle:
    """The bundle that training began from.

    Args:
        where: Where it lies now; None = where it did then.

    Raises:
        BundleError: It is not there, or is another one.
    """
    where = snapshot.base_bundle if where is None else where
    wanted = f"the run began from {snapshot.base}, then at {snapshot.base_bundle!r}: say by --base where that lies now"
    try:
        bundle = open_bundle(where)
    except BundleError as error:
        raise BundleError(f"{error}; {wanted}") from error
    if bundle.identity != snapshot.base:
        raise BundleError(f"bundle {str(where)!r} has identity {bundle.identity}; {wanted}")
    return bundle


def export_bundle(
    trained: Trained, base: Bundle, out: Path, *, name: str | None = None, replace: bool = False
) -> Bundle:
    """Writes `base` with the trained weights in it to `out`. On an error nothing is left there.

    Args:
        base: See `open_base`.
        out: The bundle's folder; must not exist, unless `replace` and it is a bundle.
        name: Short name of the bundle; None = the name of `out`.

    Raises:
        BundleError: `out` is taken, the base is damaged, or the trained weights do not fit it.
    """
    snapshot = trained.snapshot
    sees_image = base.config.sees_image and snapshot.variant != "lgie"
    seen = base if sees_image else base.without_vision()
    unused = set(required_parts(base.config)) - set(required_parts(seen.config))
    parts = tuple(part for part in base.config.parts if part not in unused)
    base.verify(parts)
    is_trained = snapshot.step > 0 and snapshot.variant != "fz"
    config = dataclasses.replace(
        seen.config,
        name=name or out.resolve().name,
        parts=parts,
        trained=is_trained or base.config.trained,
        dimensions={
            key: size for key, size in base.config.dimensions.items() if sees_image or key not in _SEEING_SIZES
        },
        provenance=_provenance(trained, base, is_trained=is_trained),
    )
    plans = _plan(trained, base) if is_trained else {}
    with BundleWriter(out, config, replace=replace) as writer:
        for part in parts:
            for file in base.files([part]):
                source, target = base.root / file, writer.folder(part).parent / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if source in plans:
                    write_safetensors(target, plans[source], lambda _num_bytes: None)
                else:
                    shutil.copyfile(source, target)
    return Bundle(out)


def export_published(trained: Trained, base: Bundle, out: Path, *, replace: bool = False) -> None:
    """Writes `mllm.pt` and `unet.pt` to `out`, in float16, as `mgie convert --mgie` reads them.

    Args:
        base: See `open_base`.
        out: A folder that does not exist, unless `replace` and it holds such files only.

    Raises:
        ConfigError: The run trained something that this layout has no place for.
        BundleError: `out` is taken, or the weights do not fit the base or float16.
    """
    if trained.snapshot.variant != "e2e" or not base.config.sees_image:
        raise ConfigError(
            f"the run's variant is {trained.snapshot.variant}; the published layout holds an MGIE that sees the image (e2e)",
            param="published",
        )
    if any(name.startswith(_LLM_BLOCKS) for name in trained.tensors):
        raise ConfigError(
            "the run trained the language model (lr_llm above 0); the published layout has no place for it",
            param="published",
        )
    if out.exists() and not (replace and out.is_dir() and {path.name for path in out.iterdir()} <= {*PUBLISHED_FILES}):
        raise BundleError(f"{out} exists{' and holds other files' if replace else ''}; choose another output folder")
    _plan(trained, base)  # refuses what does not fit
    half = {
        name.removeprefix(_PREFIXES["llm"]): cast_in_range(name, tensor, torch.float16)
        for name, tensor in trained.tensors.items()
    }
    unet = {name.removeprefix("unet."): half.pop(name) for name in list(half) if name.startswith("unet.")}
    half["emb"] = half[_EMBEDDINGS][-base.config.num_visual_tokens :].clone()  # a view would bring all rows along
    with atomic_folder(out, replace=replace) as staging:
        for file, tensors in zip(PUBLISHED_FILES, (half, unet), strict=True):
            torch.save(tensors, staging / file)


# ---- checkpoints


def _choose(snapshot: Snapshot, weights: WeightKind | None) -> WeightKind:
    has_ema = tensor_file("ema") in snapshot.files
    if weights == "ema" and not has_ema:
        raise ConfigError("the run kept no running averages (EMA): give --weights raw", param="weights")
    return weights or ("ema" if has_ema else "raw")


def _find(run: Path, step: int | None) -> Snapshot:
    if (run / SNAPSHOT_FILE).exists():
        return read_snapshot(run)
    if step is not None:
        return read_snapshot(run / CHECKPOINTS / snapshot_name(step))
    if (snapshot := newest((run / CHECKPOINTS).glob("step-*"))) is None:
        raise DataError(f"{run} holds no complete checkpoint; looked for {CHECKPOINTS}/step-*/{SNAPSHOT_FILE}")
    return snapshot


def _fetch(url: str, step: int | None, weights: WeightKind | None, scratch: Path) -> Snapshot:
    """The same from a store; of the tensors, only those of `weights` come to `scratch`."""
    wanted = f"{CHECKPOINTS}/{'step-*' if step is None else snapshot_name(step)}/{SNAPSHOT_FILE}"
    try:
        run = open_folder(url)
        sizes = {entry.name: entry.num_bytes for entry in run.list(is_recursive=True) if not entry.is_folder}
        records = [name for name in sizes if name == SNAPSHOT_FILE or fnmatch(name, wanted)]
        for record in sorted(records, reverse=True):
            folder = (scratch / record).parent
            folder.mkdir(parents=True, exist_ok=True)
            snapshot = parse_snapshot(run.read(record), folder)
            names = {file: record.replace(SNAPSHOT_FILE, file) for file in snapshot.files}
            if all(sizes.get(names[file]) == entry.size for file, entry in snapshot.files.items()):
                file = tensor_file(_TENSORS[_choose(snapshot, weights)])
                run.download(names[file], folder / file)
                return snapshot
    except (ConfigError, OSError) as error:
        raise DataError(f"{url} cannot be read: {error}") from error
    raise DataError(f"{url} holds no complete checkpoint; looked for {wanted}")


# ---- weights


def _plan(trained: Trained, base: Bundle) -> dict[Path, list[TensorPlan]]:
    """For each of the base's files in which something trained, all its tensors.

    Raises:
        BundleError: The trained tensors are not those that its variant trains in this base.
    """
    parts: tuple[Part, ...] = ("llm", "edit_head", "unet") if base.config.conditioner == "mllm" else ("unet",)
    if any(name.startswith(_PREFIXES["text_encoder"]) for name in trained.tensors):
        parts = (*parts, "text_encoder")
    trains_llm = any(name.startswith(_LLM_BLOCKS) for name in trained.tensors)
    base.verify(parts, hashes=False)
    plans: dict[Path, list[TensorPlan]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for part in parts:
        files = [base.root / file for file in base.files([part]) if file.endswith(".safetensors")]
        for key, spec in Weights(files).specs.items():
            name = _PREFIXES[part] + key
            plan = TensorPlan(key, key, spec.file, spec.shape, spec.dtype)
            if part != "llm" or trains_llm or key in (_EMBEDDINGS, _LM_HEAD):
                expected[name] = spec.shape
                if name in trained.tensors:
                    plan = dataclasses.replace(plan, change=functools.partial(_put, trained.tensors[name]))
            plans.setdefault(spec.file, []).append(plan)
    problems = list_misfits(expected, {name: tuple(tensor.shape) for name, tensor in trained.tensors.items()})
    if problems:
        raise BundleError(
            f"trained weights do not fit bundle {base.config.name!r}: {'; '.join(problems[:_MAX_LISTED])}"
        )
    return {file: tensors for file, tensors in plans.items() if any(tensor.change for tensor in tensors)}


def _put(trained: Tensor, _base: Tensor) -> Tensor:
    return trained


def _provenance(trained: Trained, base: Bundle, *, is_trained: bool) -> Provenance:
    snapshot, origin = trained.snapshot, base.config.provenance
    earlier = [origin.data] if base.config.trained and origin.data else []
    return Provenance(
        made_by="mgie export",
        sources=(
            f"base: {base.config.name} ({base.identity})",
            f"run: {snapshot.variant}, {snapshot.step} steps, {trained.kind} weights",
        ),
        data=", ".join([*earlier, *snapshot.data_names]) if is_trained else origin.data,
        licences=origin.licences,
    )
