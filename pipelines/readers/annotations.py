"""Data sets of image files with JSON annotations.

    GIERReader          GIER.json or splits/*.json: {input, output, request, expert_summary[], amateur_summary[],
                        operator}; images/. Each summary is an instruction; the request, as it was posted, and the
                        operators (their masks are no images but run lengths) go to the provenance
    MA5kReader          MA5k-Req: annotations/{train,val,test}_sess_1.json: {input, output, request, request_idx}; images/
    EVRReader           adobe/{train,valid,test}.json: {img0, img1, sents[], uid}; each sentence is an instruction
    MagicBrushTestReader  the test folder of MagicBrush: edit_sessions.json: {id: [{input, mask, output, instruction}]},
                        images/<id>/, local_descriptions/captions.json: {id: {file: caption}}

Many instructions for one photo are what these data sets are made of.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mgie.errors import DataError
from mgie.storage.folder import Folder
from pipelines.readers.base import (
    ROWS_PER_SHARD,
    BadRow,
    RawEdit,
    Shard,
    as_record,
    guarded,
    kept,
    ranges,
    read_json,
    read_records,
    split_name,
    text,
    text_or_none,
    texts,
)


class _ListReader:
    """What the layouts share: lists of records in files, images in files."""

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """No: the images are files."""
        return False

    def files(self, folder: Folder) -> list[tuple[str, str]]:
        """Files of records, each with its split."""
        raise NotImplementedError

    def edits(
        self, folder: Folder, record: Mapping[str, Any], shard: Shard, where: dict[str, Any]
    ) -> Iterator[RawEdit]:
        """The edits of one record. Raises DataError for fields that are not as they should be."""
        raise NotImplementedError

    def shards(self, folder: Folder) -> list[Shard]:
        """Ranges of records."""
        return [
            Shard(file=name, split=split, start=start, stop=stop, num_bytes=folder.num_bytes(name) or 0)
            for name, split in self.files(folder)
            for start, stop in ranges(len(read_records(folder, name)))
        ]

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The edits of each record."""
        for number, record in enumerate(read_records(folder, shard.file)[shard.start : shard.stop], shard.start):
            where = {"file": shard.file, "row": number}
            yield from guarded(
                lambda record=record, where=where: self.edits(folder, as_record(record), shard, where),  # type: ignore[misc]
                split=shard.split,
                provenance=where,
            )


class GIERReader(_ListReader):
    """See the module."""

    def files(self, folder: Folder) -> list[tuple[str, str]]:
        """`splits/`, else `GIER.json` (all training data)."""
        names = [entry.name for entry in folder.list("splits") if entry.name.endswith(".json")]
        return [(f"splits/{name}", split_name(name.removesuffix(".json"))) for name in names] or [
            ("GIER.json", "train")
        ]

    def edits(
        self,
        folder: Folder,  # noqa: ARG002
        record: Mapping[str, Any],
        shard: Shard,
        where: dict[str, Any],
    ) -> Iterator[RawEdit]:
        """One edit for each summary."""
        source, goal = f"images/{text(record, 'input')}", f"images/{text(record, 'output')}"
        summaries = [("expert", one) for one in texts(record, "expert_summary")]
        summaries += [("amateur", one) for one in texts(record, "amateur_summary")]
        if not summaries:
            raise DataError("there is neither an expert_summary nor an amateur_summary")
        for writer, summary in summaries:
            yield RawEdit(
                split=shard.split,
                source=source,
                goal=goal,
                instruction=summary,
                provenance={**where, "writer": writer, **kept(record, "request", "operator")},
            )


class MA5kReader(_ListReader):
    """See the module."""

    def files(self, folder: Folder) -> list[tuple[str, str]]:
        """The three annotation files, those that are there."""
        names = {f"annotations/{split}_sess_1.json": split for split in ("train", "val", "test")}
        found = [(name, split) for name, split in names.items() if folder.exists(name)]
        if not found:
            raise DataError(f"{folder.url} holds none of {list(names)}")
        return found

    def edits(
        self,
        folder: Folder,  # noqa: ARG002
        record: Mapping[str, Any],
        shard: Shard,
        where: dict[str, Any],
    ) -> Iterator[RawEdit]:
        """One edit."""
        yield RawEdit(
            split=shard.split,
            source=f"images/{text(record, 'input')}",
            goal=f"images/{text(record, 'output')}",
            instruction=text(record, "request"),
            provenance={**where, **kept(record, "request_idx")},
        )


class EVRReader(_ListReader):
    """See the module."""

    image_folders: ClassVar[tuple[str, ...]] = ("adobe/images", "images", "adobe", ".")
    "where copies of the data set have their images"

    def files(self, folder: Folder) -> list[tuple[str, str]]:
        """The three files, those that are there."""
        names = {f"adobe/{name}.json": split_name(name) for name in ("train", "valid", "test")}
        found = [(name, split) for name, split in names.items() if folder.exists(name)]
        if not found:
            raise DataError(f"{folder.url} holds none of {list(names)}")
        return found

    def edits(
        self, folder: Folder, record: Mapping[str, Any], shard: Shard, where: dict[str, Any]
    ) -> Iterator[RawEdit]:
        """One edit for each sentence."""
        source, goal = (self._located(folder, text(record, key)) for key in ("img0", "img1"))
        sentences = texts(record, "sents")
        if not sentences:
            raise DataError("there are no sents")
        for sentence in sentences:
            yield RawEdit(
                split=shard.split,
                source=source,
                goal=goal,
                instruction=sentence,
                provenance={**where, **kept(record, "uid")},
            )

    def _located(self, folder: Folder, name: str) -> str:
        candidates = [f"{place}/{name}" if place != "." else name for place in self.image_folders]
        return next((candidate for candidate in candidates if folder.exists(candidate)), candidates[0])


class MagicBrushTestReader:
    """See the module."""

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """No: the images are files."""
        return False

    def shards(self, folder: Folder) -> list[Shard]:
        """Ranges of sessions, sorted by id."""
        num_sessions = len(as_record(read_json(folder, "edit_sessions.json")))
        return [
            Shard(file="edit_sessions.json", split="test", start=start, stop=stop)
            for start, stop in ranges(num_sessions, ROWS_PER_SHARD // 2)
        ]

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The turns of each session, from 1."""
        sessions = as_record(read_json(folder, shard.file))
        captions_file = "local_descriptions/captions.json"
        captions = as_record(read_json(folder, captions_file)) if folder.exists(captions_file) else {}
        for session in sorted(sessions)[shard.start : shard.stop]:
            turns = sessions[session] if isinstance(sessions[session], list) else [sessions[session]]
            for number, turn in enumerate(turns, 1):
                where = {"file": shard.file, "session": session, "turn": number}
                yield from guarded(
                    lambda session=session, number=number, turn=turn, where=where: [  # type: ignore[misc]
                        _turn(session, number, as_record(turn), as_record(captions.get(session, {})), where)
                    ],
                    split=shard.split,
                    provenance=where,
                )


def _turn(
    session: str, number: int, record: Mapping[str, Any], captions: Mapping[str, Any], where: dict[str, Any]
) -> RawEdit:
    source, goal, mask = text(record, "input"), text(record, "output"), text_or_none(record, "mask")
    return RawEdit(
        split="test",
        source=f"images/{session}/{source}",
        goal=f"images/{session}/{goal}",
        mask=f"images/{session}/{mask}" if mask else None,
        instruction=text(record, "instruction"),
        source_caption=text_or_none(captions, source),
        goal_caption=text_or_none(captions, goal),
        turn=number,
        session=session,
        provenance=where,
    )
