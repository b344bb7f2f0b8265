"""What a cache is made from: a ledger's images as squares of the encoders' sizes, and the shapes of what they make.

A row that cannot be read is an error, not a row left out: whoever wrote the ledger could read it. Needs no torch.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from mgie.bundle.record import BundleRecord, encoder_identity
from mgie.config import CacheKind, ImageLimits, vae_downsampling
from mgie.data.latent_cache import CacheDtype, CacheSpec
from mgie.data.ledger import LEDGER_SCHEMA, to_table
from mgie.errors import ConfigError, DataError, MGIEError
from mgie.images.files import read_image
from mgie.images.geometry import PUBLISHED_SIDE_PX, training_pixels
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent

# Of transformers' CLIPVisionConfig, where `config.json` leaves one out.
_CLIP_DEFAULTS: dict[str, Any] = {"image_size": 224, "patch_size": 32, "hidden_size": 768}

CACHED_SCHEMA = pa.schema([LEDGER_SCHEMA.field(name) for name in ("id", "source", "goal")])
"The columns of a ledger that a cache is made from."
_SQUARES_SCHEMA = pa.schema(
    [
        CACHED_SCHEMA.field("id"),
        *(pa.field(name, pa.binary()) for name in ("source", "goal", "vision")),
        pa.field("reason", pa.string()),
    ]
)


def cache_spec(bundle: BundleRecord, kind: CacheKind, *, image_side_px: int, dtype: CacheDtype) -> CacheSpec:
    """What a cache made with this bundle holds, by the configurations of its encoders.

    Args:
        image_side_px: Side of the VAE's images; the vision tower's are prepared from `PUBLISHED_SIDE_PX` always.

    Raises:
        BundleError: The bundle has no such part, or it is damaged.
        ConfigError: The side is no multiple of the VAE's downsampling.
    """
    shapes: dict[str, tuple[int, ...]]
    if kind == "vae_moments":
        vae = bundle.read_json("vae")
        downsampling = vae_downsampling(vae)
        if image_side_px < 1 or image_side_px % downsampling:
            raise ConfigError(
                f"image_side_px is {image_side_px}; it must be a multiple of {downsampling}", param="image_side_px"
            )
        side = image_side_px // downsampling
        shape = (int(vae["latent_channels"]), side, side)
        shapes = {"source_mean": shape, "goal_mean": shape, "goal_logvar": shape}
    else:
        image_side_px, vision = PUBLISHED_SIDE_PX, _CLIP_DEFAULTS | bundle.read_json("vision")
        shapes = {"features": ((vision["image_size"] // vision["patch_size"]) ** 2, vision["hidden_size"])}
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
