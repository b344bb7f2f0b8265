"""Data sets of the Hugging Face hub, as the parquet files that are downloaded from there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mgie.storage.folder import Folder
from pipelines.readers.base import BadRow, RawEdit, Shard
from pipelines.readers.own import Columns, edit_of, edits_of
from pipelines.readers.tables import hub_split, parquet_rows, parquet_schema, parquet_shards


class HubReader:
    """Tables whose columns are known.

    Args:
        columns: Which column is what.
        inverse: The same for the inverse edit that each row holds, too.
        optional: Columns that some versions of the data set lack.
        split: Of all rows; none: as the files are named.
    """

    def __init__(
        self, columns: Columns, *, inverse: Columns | None = None, optional: Sequence[str] = (), split: str = ""
    ) -> None:
        self._columns, self._inverse, self._optional, self._split = columns, inverse, optional, split
        names = [*columns.names(), *(inverse.names() if inverse else ())]
        self._required = [name for name in dict.fromkeys(names) if name not in optional]

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """Yes: the images are cells of tables."""
        return True

    def shards(self, folder: Folder) -> list[Shard]:
        """Runs of row groups."""
        return parquet_shards(folder, self._required)

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The edits of each row."""
        present = set(parquet_schema(folder).names) if self._optional else set()
        columns = [*self._required, *(name for name in self._optional if name in present)]
        split = self._split or shard.split

        def make(row: Mapping[str, Any], where: dict[str, Any]) -> Iterator[RawEdit]:
            yield edit_of(row, self._columns, split, where)
            if self._inverse:
                yield replace(edit_of(row, self._inverse, split, where), direction="inverse")

        yield from edits_of(parquet_rows(folder, shard, columns), shard, make, hub_split=hub_split(shard.file))


def instructpix2pix() -> HubReader:
    """Reader of timbrooks/instructpix2pix-clip-filtered."""
    return HubReader(
        Columns(
            source="original_image", goal="edited_image", instruction="edit_prompt",
            source_caption="original_prompt", goal_caption="edited_prompt",
        )
    )  # fmt: skip


def magicbrush() -> HubReader:
    """Reader of osunlp/MagicBrush, train and dev: turns of sessions, masks."""
    return HubReader(
        Columns(source="source_img", goal="target_img", mask="mask_img", turn="turn_index", session="img_id")
    )


def ultraedit() -> HubReader:
    """Reader of BleachNick/UltraEdit: the mask is null in free-form edits.

    Every row is training data: FreeForm_0, FreeForm_1, ... are parts, not splits.
    """
    scores = ("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim")
    notes = ("edit_object", "idx", *scores)
    columns = Columns(
        source="source_image", goal="edited_image", mask="mask_image", instruction="edit_prompt",
        source_caption="source_caption", goal_caption="target_caption", keep=notes,
    )  # fmt: skip
    return HubReader(columns, optional=("mask_image", *notes), split="train")


def hq_edit() -> HubReader:
    """Reader of UCSC-VLAA/HQ-Edit: each row is two edits, forward and inverse."""
    forward = Columns(
        source="input_image", goal="output_image", instruction="edit", source_caption="input", goal_caption="output"
    )
    backward = Columns(
        source="output_image",
        goal="input_image",
        instruction="inverse_edit",
        source_caption="output",
        goal_caption="input",
    )
    return HubReader(forward, inverse=backward)
