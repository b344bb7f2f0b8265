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

from mgie.bundle.bundle import open_bundle
from mgie.bundle.devices import resolve_device
from mgie.data.latent_cache import CacheSpec
from mgie.errors import DataError
from mgie.images.pixels import to_signed
from mgie.inference.batch_failures import bisect_failures

_Arrays = dict[str, npt.NDArray[np.float32]]  # of a row


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
            self._codec = opened.load_vae().to(target)
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
            results: list[_Arrays | Exception] = bisect_failures(self._encode, part)
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
