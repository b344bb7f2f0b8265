"""One reader per data-set layout: raw folders of the world -> edits.

base.py          what a reader is                    tables.py        streaming parquet and JSON Lines
ipr2pr.py        InstructPix2Pix as folders          hub.py           parquet of the Hugging Face hub
annotations.py   GIER, MA5k-Req, EVR, MagicBrush's test folder
mgie_tsv.py      MGIE's own TSV, JSON and pickle     plain_pickle.py  pickles without unpickling
own.py           yours: parquet, JSON Lines, WebDataset
manifest_rows.py a raw edit -> a checked row         duplicates.py    exact and near duplicates
"""

from collections.abc import Callable, Mapping
from typing import Literal

from pipelines.readers.annotations import EVRReader, GIERReader, MA5kReader, MagicBrushTestReader
from pipelines.readers.base import BadRow, ImageRef, RawEdit, Reader, Shard
from pipelines.readers.hub import hq_edit, instructpix2pix, magicbrush, ultraedit
from pipelines.readers.ipr2pr import IPr2PrReader
from pipelines.readers.mgie_tsv import MGIEReader
from pipelines.readers.own import Columns, JSONLinesReader, ParquetReader, WebDatasetReader

Layout = Literal[
    "ipr2pr", "instructpix2pix", "magicbrush", "magicbrush-test", "ultraedit", "hq-edit", "gier", "ma5k", "evr",
    "mgie", "parquet", "jsonl", "webdataset",
]  # fmt: skip

_PUBLISHED: Mapping[Layout, Callable[[], Reader]] = {
    "ipr2pr": IPr2PrReader, "instructpix2pix": instructpix2pix, "magicbrush": magicbrush,
    "magicbrush-test": MagicBrushTestReader, "ultraedit": ultraedit, "hq-edit": hq_edit, "gier": GIERReader,
    "ma5k": MA5kReader, "evr": EVRReader, "mgie": MGIEReader,
}  # fmt: skip
_OWN: Mapping[Layout, Callable[[Columns], Reader]] = {
    "parquet": ParquetReader, "jsonl": JSONLinesReader, "webdataset": WebDatasetReader,
}  # fmt: skip


def make_reader(layout: Layout, columns: Columns) -> Reader:
    """The reader of a layout; `columns` matters to your own data only."""
    return _OWN[layout](columns) if layout in _OWN else _PUBLISHED[layout]()


__all__ = ["BadRow", "Columns", "ImageRef", "Layout", "RawEdit", "Reader", "Shard", "make_reader"]
