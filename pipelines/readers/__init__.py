"""One reader per data-set layout: raw folders of the world -> edits.

base.py          what a reader is                    tables.py        streaming parquet and JSON Lines
ipr2pr.py        InstructPix2Pix as folders          hub.py           parquet of the Hugging Face hub
annotations.py   GIER, MA5k-Req, EVR, MagicBrush's test folder
mgie_tsv.py      MGIE's own TSV, JSON and pickle     plain_pickle.py  pickles without unpickling
own.py           yours: parquet, JSON Lines, WebDataset
manifest_rows.py a raw edit -> a checked row         duplicates.py    exact and near duplicates
"""

from typing import Literal

from pipelines.readers.annotations import EVRReader, GIERReader, MA5kReader, MagicBrushTestReader
from pipelines.readers.base import BadRow, ImageRef, RawEdit, Reader, Shard
from pipelines.readers.hub import HQEditReader, InstructPix2PixReader, MagicBrushReader, UltraEditReader
from pipelines.readers.ipr2pr import IPr2PrReader
from pipelines.readers.mgie_tsv import MGIEReader
from pipelines.readers.own import Columns, JSONLinesReader, ParquetReader, WebDatasetReader

Layout = Literal[
    "ipr2pr",
    "instructpix2pix",
    "magicbrush",
    "magicbrush-test",
    "ultraedit",
    "hq-edit",
    "gier",
    "ma5k",
    "evr",
    "mgie",
    "parquet",
    "jsonl",
    "webdataset",
]


def make_reader(layout: Layout, columns: Columns) -> Reader:
    """The reader of a layout; `columns` matters to your own data only."""
    match layout:
        case "ipr2pr":
            return IPr2PrReader()
        case "instructpix2pix":
            return InstructPix2PixReader()
        case "magicbrush":
            return MagicBrushReader()
        case "magicbrush-test":
            return MagicBrushTestReader()
        case "ultraedit":
            return UltraEditReader()
        case "hq-edit":
            return HQEditReader()
        case "gier":
            return GIERReader()
        case "ma5k":
            return MA5kReader()
        case "evr":
            return EVRReader()
        case "mgie":
            return MGIEReader()
        case "parquet":
            return ParquetReader(columns)
        case "jsonl":
            return JSONLinesReader(columns)
        case "webdataset":
            return WebDatasetReader(columns)


__all__ = ["BadRow", "Columns", "ImageRef", "Layout", "RawEdit", "Reader", "Shard", "make_reader"]
