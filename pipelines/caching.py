"""The stages that fill caches: rows of a ledger -> pixels -> what the frozen encoders make of them. Plain Python, no Ray.

A row that cannot be read is an error, not a row left out: whoever wrote the ledger could read it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from mgie.bundles import open_bundle
from mgie.checkpoint import Bundle, resolve_device
from mgie.config import ImageLimits
from mgie.errors import ConfigError, DataError, MGIEError
from mgie.images import PUBLISHED_SIDE_PX, read_image, to_signed, training_pixels
from mgie.latent_cache import CacheDtype, CacheKind, CacheSpec, encoder_identity
from mgie.ledger import LEDGER_SCHEMA, to_table
from mgie.stores import is_absent
from pipelines.stages import in_halves
from pipelines.storage import Folder

_Arrays = dict[str, npt.NDArray[np.float32]]  # of a row

CACHED_SCHEMA = pa.schema([LEDGER_SCHEMA.field(name) for name in ("id", "source", "goal")])
"The columns of a ledger that a cache is made from."
_SQUARES_SCHEMA = pa.schema(
    [
        CACHED_SCHEMA.field("id"),
        *(pa.field(name, pa.binary()) for name in ("source", "goal", "vision")),
        pa.field("reason", pa.string()),
    ]
)


def cache_spec(bundle: Bundle, kind: CacheKind, *, image_side_px: int, dtype: CacheDtype) -> CacheSpec:
    """What a cache made with this bundle holds; loads the encoder on the CPU to see.

    Args:
        image_side_px: Side of the VAE's images; the vision tower's are prepared from `PUBLISHED_SIDE_PX` always.

    Raises:
        BundleError: The bundle has no such part, or it is damaged.
        ConfigError: The side is no multiple of the VAE's downsampling.
    """
    shapes: dict[str, tuple[int, ...]]
    if kind == "vae_moments":
        codec = bundle.load_codec()
        if image_side_px < 1 or image_side_px % codec.downsampling:
            raise ConfigError(
                f"image_side_px is {image_side_px}; it must be a multiple of {codec.downsampling}",
                param="image_side_px",
            )
        side = image_side_px // codec.downsampling
        shape = (int(codec.vae.config.latent_channels), side, side)
        shapes = {"source_mean": shape, "goal_mean": shape, "goal_logvar": shape}
    else:
        image_side_px, vision = PUBLISHED_SIDE_PX, bundle.load_vision()
        shapes = {"features": (vision.num_patches, int(vision.clip.config.hidden_size))}
    identity = encoder_identity(bundle, kind)
    return CacheSpec(kind=kind, encoder=identity, image_side_px=image_side_px, dtype=dtype, shapes=shapes)


class FetchSquares:
    """Reads and decodes the images of each row that the encoders need, and makes them squares of their sizes.

    Args:
        root: Folder that the rows' URIs are relative to.
    """

    def __init__(
        self,
        root: Folder,
        specs: Sequence[CacheSpec],
        *,
        limits: ImageLimits = ImageLimits(),  # noqa: B008  # frozen
    ) -> None:
        self._root, self._limits = root, limits
        self._sides = {spec.kind: spec.image_side_px for spec in specs}

    def __call__(self, table: pa.Table) -> pa.Table:
        """`id`, and RGB bytes of `source` and `goal` for the VAE and of `vision` for the vision tower, null if unused.

        Where an image cannot be read, there is a `reason` instead.

        Raises:
            OSError: The store is in trouble.
        """
        return to_table([{"id": row["id"]} | self._squares(row) for row in table.to_pylist()], _SQUARES_SCHEMA)

    def _squares(self, row: dict[str, Any]) -> dict[str, Any]:
        squares = {}
        try:
            source = self._read(row, "source")
            if (side := self._sides.get("vae_moments")) is not None:
                squares["source"] = training_pixels(source, side).tobytes()
                squares["goal"] = training_pixels(self._read(row, "goal"), side).tobytes()
            if (side := self._sides.get("clip_features")) is not None:
                squares["vision"] = training_pixels(source, side).tobytes()
        except DataError as error:
            return {"reason": str(error)}
        return squares

    def _read(self, row: dict[str, Any], column: str) -> Image.Image:
        try:
            return read_image(self._root.read(row[column]), limits=self._limits)
        except (MGIEError, OSError) as error:
            if isinstance(error, OSError) and not is_absent(error):
                raise  # the store is in trouble, not the row
            raise DataError(f"{column} of row {row['id']} ({row[column]}) cannot be read: {error}") from error


class EncodeLatents:
    """The frozen encoders, as training runs them: in float32, without gradients.

    Args:
        specs: What to make. batch_size: Rows per model call.

    Raises:
        BundleError, ConfigError: The bundle cannot be used, or the device is not there.
    """

    def __init__(self, bundle: str, specs: Sequence[CacheSpec], *, batch_size: int, device: str) -> None:
        opened, target = open_bundle(bundle), resolve_device(device)
        self._device, self._batch_size = target, batch_size
        self._sides = {spec.kind: spec.image_side_px for spec in specs}
        if "vae_moments" in self._sides:
            self._codec = opened.load_codec().to(target)
        if "clip_features" in self._sides:
            self._clip_pixels, self._vision = opened.load_clip_pixels(), opened.load_vision().to(target)

    def __call__(self, table: pa.Table) -> pa.Table:
        """`id`, and each array of the specs as a list of float32 per row.

        Raises:
            DataError: An image could not be read, or a single row does not fit into memory; names the row.
        """
        rows = table.to_pylist()
        for row in rows:
            if row["reason"] is not None:
                raise DataError(row["reason"])
        encoded: list[_Arrays] = []
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            results: list[_Arrays | Exception] = in_halves(self._encode, part)
            for row, result in zip(part, results, strict=True):
                if isinstance(result, Exception):
                    raise DataError(f"row {row['id']} cannot be encoded: {result}") from result
                encoded.append(result)
        columns = {name: np.stack([row[name].ravel() for row in encoded]) for name in encoded[0]}
        lists = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            for name, values in columns.items()
        }
        return pa.table({"id": table.column("id"), **lists})

    @torch.inference_mode()
    def _encode(self, rows: Sequence[dict[str, Any]]) -> list[_Arrays]:
        arrays: dict[str, torch.Tensor] = {}
        if (side := self._sides.get("vae_moments")) is not None:
            source, goal = (
                torch.stack([to_signed(_image(row[column], side)) for row in rows]).to(self._device)
                for column in ("source", "goal")
            )
            arrays["source_mean"] = self._codec.condition_latents(source)
            arrays["goal_mean"], arrays["goal_logvar"] = self._codec.moments(goal)
        if (side := self._sides.get("clip_features")) is not None:
            pixels = self._clip_pixels([_image(row["vision"], side) for row in rows])
            arrays["features"] = self._vision(pixels.to(self._device))
        found = {name: values.float().cpu().numpy() for name, values in arrays.items()}
        return [{name: values[i] for name, values in found.items()} for i in range(len(rows))]


def _image(pixels: bytes, side_px: int) -> Image.Image:
    return Image.frombytes("RGB", (side_px, side_px), pixels)
