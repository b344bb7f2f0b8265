"""The editing stage of bulk jobs: batches of photos and instructions -> encoded edited images. Plain Python, no Ray.

Rows pass through as in `describe.py`: one that cannot be edited leaves with a reason.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from mgie.bundle.bundle import open_bundle
from mgie.data.ledger import rejection, to_table
from mgie.editor import CheckedEdit, Editor, EditResult
from mgie.errors import MGIEError
from mgie.images.files import OutputFormat, write_image
from mgie.images.pixels import from_work
from mgie.inference.batch_failures import one_line
from pipelines.stages.fetch import EDIT_ROW_SCHEMA


class EditImages:
    """An `Editor` in an actor; rows of one working size share batches.

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
        self._editor = Editor.load(opened, device=device, dtype=dtype)
        self.use(settings)
        self._identity, self._format, self._batch_size = opened.identity, output_format, batch_size

    def use(self, settings: Mapping[str, Any]) -> None:
        """Changes the settings of the edits that follow. Raises ConfigError."""
        self._settings = self._editor.bundle.defaults.override(**settings)

    def reconstruct(self, image: Image.Image) -> Image.Image:
        """The image through the VAE and back: as near as an edit by this bundle can come to it."""
        renderer = self._editor.renderer
        framing = renderer.framing(image.size, self._settings)
        with torch.inference_mode():
            latents = renderer.encode(image, framing) * renderer.vae.scaling_factor
            return from_work(renderer.decode(latents), framing)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds the encoded results (`data`) and settles each row's status; the pixels end here."""
        rows = table.to_pylist()
        good = [row for row in rows if row["reason"] is None]
        for row, result in self._editor.stream(self._checked(good), batch_size=self._batch_size):
            with _rejecting(row):
                row.update(self._columns(result))
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

    def _checked(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], CheckedEdit]]:
        for row in rows:
            with _rejecting(row):
                image = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
                words = {"instruction": row["instruction"], "expressive": row["given"]}
                [edit] = self._editor.check(image, settings=self._settings, seed=row["seed"], **words)
                yield row, edit

    def _columns(self, result: EditResult | Exception) -> dict[str, Any]:
        if isinstance(result, Exception):
            raise result
        return {
            "data": write_image(result.image, format=self._format, metadata=result.metadata()),
            "expressive": result.expressive,
            "used_fallback": result.used_fallback,
            "seconds": sum(result.timings_s.values()),
        }


@contextlib.contextmanager
def _rejecting(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (MGIEError, torch.OutOfMemoryError) as error:
        row["reason"] = rejection("edit_failed", one_line(error))
