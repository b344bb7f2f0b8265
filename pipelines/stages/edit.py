"""The editing stage of bulk jobs: batches of photos and instructions -> encoded edited images. Plain Python, no Ray.

Rows pass through as in `describe.py`: one that cannot be edited leaves with a reason.
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from mgie.bundle.bundle import open_bundle
from mgie.config import SOFTWARE
from mgie.data.ledger import rejection, to_table
from mgie.images.files import EditMetadata, OutputFormat, write_image
from mgie.images.pixels import from_work
from mgie.inference.conditioner import EditRequest
from mgie.inference.renderer import RenderRequest
from pipelines.stages.fetch import EDIT_ROW_SCHEMA
from pipelines.stages.row_errors import bisect_failures, one_line


class EditImages:
    """Both halves of an edit in one actor; rows of one working size share batches.

    Args:
        settings: Fields of EditSettings that differ from the bundle's defaults.
        batch_size: Rows per model call.

    Raises:
        BundleError, ConfigError: The bundle cannot be used, a setting is not allowed, or the device is not there.
    """

    def __init__(
        self,
        bundle: str,
        *,
        settings: Mapping[str, Any],
        output_format: OutputFormat,
        batch_size: int,
        device: str,
        dtype: str,
    ) -> None:
        opened = open_bundle(bundle)
        self._defaults = opened.config.defaults
        self.use(settings)
        self._conditioner = opened.load_conditioner(device=device, dtype=dtype)
        self._renderer = opened.load_renderer(device=device, dtype=dtype)
        self._identity, self._format, self._batch_size = opened.identity, output_format, batch_size

    def use(self, settings: Mapping[str, Any]) -> None:
        """From now on edits with other settings in place of the given ones. Raises ConfigError."""
        self._settings = self._defaults.override(**settings)

    def reconstruct(self, image: Image.Image) -> Image.Image:
        """The image through the VAE and back: as near as an edit by this bundle can come to it."""
        framing = self._renderer.framing(image.size, self._settings)
        with torch.inference_mode():
            latents = self._renderer.encode(image, framing) * self._renderer.vae.scaling_factor
            return from_work(self._renderer.decode(latents), framing)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the encoded results (`data`) and settles each row's status; the pixels end here."""
        rows = table.to_pylist()
        sizes: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["reason"] is None:
                sizes[self._renderer.work_size((row["width"], row["height"]), self._settings)].append(row)
        for alike in sizes.values():
            for start in range(0, len(alike), self._batch_size):
                self._edit(alike[start : start + self._batch_size])
        settings = json.dumps(dataclasses.asdict(self._settings))
        for row in rows:
            row |= {
                "pixels": None,
                "width": None,
                "height": None,
                "settings": settings,
                "bundle": self._identity,
                "status": "ok" if row["reason"] is None else "rejected",
            }
        return to_table(rows, EDIT_ROW_SCHEMA)

    def _edit(self, rows: Sequence[dict[str, Any]]) -> None:
        started = time.perf_counter()
        results = bisect_failures(self._results, rows)
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Exception):
                row["reason"] = rejection("edit_failed", one_line(result))
            else:
                row.update(result, seconds=(time.perf_counter() - started) / len(rows))

    def _results(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        images = [Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"]) for row in rows]
        edit_conditions = self._conditioner.derive(
            [
                EditRequest(image=image, instruction=row["instruction"], expressive=row["given"])
                for image, row in zip(images, rows, strict=True)
            ]
        )
        requests = [
            RenderRequest(image=image, edit_condition=edit_condition, settings=self._settings, seed=row["seed"])
            for image, edit_condition, row in zip(images, edit_conditions, rows, strict=True)
        ]
        edited = dict(self._renderer.render(requests))
        return [
            {
                "data": write_image(edited[i], format=self._format, metadata=self._metadata(row["seed"])),
                "expressive": edit_condition.expressive,
                "used_fallback": edit_condition.used_fallback,
            }
            for i, (row, edit_condition) in enumerate(zip(rows, edit_conditions, strict=True))
        ]

    def _metadata(self, seed: int) -> EditMetadata:
        return EditMetadata(seed=seed, bundle=self._identity, software=SOFTWARE)
