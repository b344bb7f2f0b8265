"""Data sets of the Hugging Face hub, as the parquet files that are downloaded from there.

InstructPix2PixReader   timbrooks/instructpix2pix-clip-filtered
MagicBrushReader        osunlp/MagicBrush, train and dev: turns of sessions, masks
UltraEditReader         BleachNick/UltraEdit: the mask is null in free-form edits; every row is training data
HQEditReader            UCSC-VLAA/HQ-Edit: each row is two edits, forward and inverse
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mgie.storage.folder import Folder
from pipelines.readers.base import (
    BadRow,
    RawEdit,
    Shard,
    guarded,
    image,
    image_cell,
    kept,
    text,
    text_or_none,
    whole_or_none,
)
from pipelines.readers.tables import hub_split, parquet_rows, parquet_schema, parquet_shards

Provenance = dict[str, Any]


class _HubReader:
    """What the layouts share: where rows come from. A subclass says which columns there are, and what they mean."""

    columns: ClassVar[Sequence[str]]
    optional_columns: ClassVar[Sequence[str]] = ()

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """Yes: the images are cells of tables."""
        return True

    def shards(self, folder: Folder) -> list[Shard]:
        """Runs of row groups."""
        return parquet_shards(folder, self.columns)

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The edits of each row."""
        present = set(parquet_schema(folder).names) if self.optional_columns else set()
        columns = [*self.columns, *(name for name in self.optional_columns if name in present)]
        for found in parquet_rows(folder, shard, columns):
            if isinstance(found, BadRow):
                yield found
                continue
            number, row = found
            provenance = {"file": shard.file, "row": number, "hub_split": hub_split(shard.file)}
            yield from guarded(
                lambda row=row, provenance=provenance: self.edits(row, shard.split, provenance),  # type: ignore[misc]
                split=shard.split,
                provenance=provenance,
            )

    def edits(self, row: Mapping[str, Any], split: str, provenance: Provenance) -> Iterator[RawEdit]:
        """The edits of one row. Raises DataError for fields that are not as they should be."""
        raise NotImplementedError


class InstructPix2PixReader(_HubReader):
    """See the module."""

    columns = ("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image")

    def edits(self, row: Mapping[str, Any], split: str, provenance: Provenance) -> Iterator[RawEdit]:
        """One edit."""
        yield RawEdit(
            split=split,
            source=image(row, "original_image"),
            goal=image(row, "edited_image"),
            instruction=text(row, "edit_prompt"),
            source_caption=text_or_none(row, "original_prompt"),
            goal_caption=text_or_none(row, "edited_prompt"),
            provenance=provenance,
        )


class MagicBrushReader(_HubReader):
    """See the module."""

    columns = ("img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img")

    def edits(self, row: Mapping[str, Any], split: str, provenance: Provenance) -> Iterator[RawEdit]:
        """One turn of the session `img_id`."""
        yield RawEdit(
            split=split,
            source=image(row, "source_img"),
            goal=image(row, "target_img"),
            mask=image_cell(row, "mask_img"),
            instruction=text(row, "instruction"),
            turn=whole_or_none(row, "turn_index"),
            session=None if row["img_id"] is None else str(row["img_id"]),
            provenance=provenance,
        )


class UltraEditReader(_HubReader):
    """See the module."""

    columns = ("source_caption", "target_caption", "edit_prompt", "source_image", "edited_image")
    optional_columns = (
        "mask_image", "edit_object", "idx", "clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image",
        "dinov2_sim", "ssim",
    )  # fmt: skip

    def edits(self, row: Mapping[str, Any], split: str, provenance: Provenance) -> Iterator[RawEdit]:  # noqa: ARG002
        """One edit."""
        scores = [name for name in self.optional_columns if name != "mask_image"]
        yield RawEdit(
            split="train",  # FreeForm_0, FreeForm_1, ... are parts, not splits
            source=image(row, "source_image"),
            goal=image(row, "edited_image"),
            mask=image_cell(row, "mask_image"),
            instruction=text(row, "edit_prompt"),
            source_caption=text_or_none(row, "source_caption"),
            goal_caption=text_or_none(row, "target_caption"),
            provenance={**provenance, **kept(row, *scores)},
        )


class HQEditReader(_HubReader):
    """See the module."""

    columns = ("input", "input_image", "edit", "inverse_edit", "output", "output_image")

    def edits(self, row: Mapping[str, Any], split: str, provenance: Provenance) -> Iterator[RawEdit]:
        """The edit and its inverse."""
        source, goal = image(row, "input_image"), image(row, "output_image")
        captions = text_or_none(row, "input"), text_or_none(row, "output")
        yield RawEdit(
            split=split,
            source=source,
            goal=goal,
            instruction=text(row, "edit"),
            source_caption=captions[0],
            goal_caption=captions[1],
            provenance=provenance,
        )
        yield RawEdit(
            split=split,
            source=goal,
            goal=source,
            instruction=text(row, "inverse_edit"),
            source_caption=captions[1],
            goal_caption=captions[0],
            direction="inverse",
            provenance=provenance,
        )
