"""Reads and decodes the image of each row; the columns of rows on their way."""

from typing import Any

import pyarrow as pa

from mgie.config import ImageLimits
from mgie.data.ledger import EDITS_SCHEMA, LEDGER_SCHEMA, rejection, to_table
from mgie.errors import DataError, MGIEError
from mgie.images.files import read_image
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent

PIXEL_FIELDS = [pa.field("pixels", pa.binary()), pa.field("width", pa.int32()), pa.field("height", pa.int32())]
DESCRIBE_ROW_SCHEMA = pa.schema([*LEDGER_SCHEMA, *PIXEL_FIELDS, pa.field("times", pa.string())])
EDIT_ROW_SCHEMA = pa.schema([*EDITS_SCHEMA, *PIXEL_FIELDS, pa.field("data", pa.binary())])


class FetchSources:
    """Reads and decodes the image of each row.

    Args:
        root: Folder that the rows' URIs are relative to.
        column: Which column holds the URI. schema: Of the rows on their way.
    """

    def __init__(
        self,
        root: Folder,
        *,
        column: str = "source",
        schema: pa.Schema = DESCRIBE_ROW_SCHEMA,
        limits: ImageLimits = ImageLimits(),  # noqa: B008  # frozen
    ) -> None:
        self._root, self._column, self._schema, self._limits = root, column, schema, limits

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds pixels, or a reason."""
        return to_table([row | self._fetch(row[self._column]) for row in table.to_pylist()], self._schema)

    def _fetch(self, uri: str) -> dict[str, Any]:
        try:
            image = read_image(self._root.read(uri), limits=self._limits)
        except DataError as error:
            return {"reason": rejection("bad_row", str(error))}
        except MGIEError as error:
            return {"reason": rejection("bad_image", str(error))}
        except OSError as error:
            if not is_absent(error):
                raise  # the store is in trouble, not the row: the task fails and is tried again
            return {"reason": rejection("missing_file", uri)}
        return {"pixels": image.tobytes(), "width": image.width, "height": image.height}
