"""Results that outlive their request, found again by the id of their edit.

Of each result lies a lossless PNG in the artifact store, from which the next turn goes on, and beside it the file that
the client asked for, where that is another one. Any replica finds them. Knows nothing of HTTP.
"""

import asyncio
import hashlib
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from serving.edits.backend import EditOutcome
from serving.edits.cancellation import owned_id
from serving.errors import NotFoundError, StoreError, quoted
from serving.stages.messages import EditOptions
from serving.storage.artifacts import Artifact, ArtifactStore, EditFacts

logger = logging.getLogger("serving.edits.results")

SWEEP_EVERY_S = 60.0
MAX_SWEPT = 1000  # files in one go

_PREVIOUS = re.compile(r"(.*?)(?::(\d{1,2}))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """What was kept of one edit."""

    files: Sequence[str]
    "ids of the artifacts that hold the results as the client asked for them, in the order of their seeds"
    lossless: Sequence[str]
    "ids of those that the next turn goes on from; none if nothing lossless was made"
    expires_s: int
    "Unix time"


class ResultStore:
    """Keeps results in a store. Methods block.

    Args:
        store: Where they lie.
        keeps_all: Keep also what nobody asks to keep.
    """

    def __init__(self, store: ArtifactStore, *, keeps_all: bool = False) -> None:
        self._store = store
        self.keeps_all = keeps_all

    def keep(self, edit_id: str, options: EditOptions, outcome: EditOutcome, *, owner: str = "") -> StoredResult:
        """Keeps the results of an edit whose options have `keeps_lossless`; a repeated id stands for its last edit.

        Args:
            edit_id: Only together with the owner it names the edit: clients may choose it.
            options: The edit.
            outcome: What came of it.
            owner: Name of the API key, if there are any.

        Raises:
            StoreError: The store is in trouble.
        """
        name, kept = _document_name(edit_id, owner), self.store(options, outcome)
        content = {"results": kept.lossless}
        if self._store.create("edit", name, content) is None:
            old = self._store.find("edit", name)
            if old is None or self._store.replace(old, content) is None:
                logger.warning("two edits with the same id were kept at once; one of them cannot be found by it")
        return kept

    def store(self, options: EditOptions, outcome: EditOutcome, *, is_durable: bool = False) -> StoredResult:
        """The same without a name: nobody finds them but by the ids returned.

        Args:
            is_durable: See `ArtifactStore.put`.
        """
        rendered, derived = outcome.rendered, outcome.derived
        files, lossless, expiries_s = [], [], []
        pngs: Sequence[bytes | None] = rendered.lossless or [None] * len(rendered.images)
        for i, (image, png) in enumerate(zip(rendered.images, pngs, strict=True)):
            facts = EditFacts(
                seed=options.seed + i,
                settings=asdict(rendered.settings),
                expressive=derived.expressive,
                bundle=derived.bundle,
            )
            # Of a PNG both are the same.
            contents = {} if png is None else {"image/png": png}
            contents[f"image/{options.output_format}"] = image
            for content_type, data in contents.items():
                artifact = self._store.put(
                    data,
                    content_type=content_type,
                    width=rendered.width,
                    height=rendered.height,
                    edit=facts,
                    is_durable=is_durable,
                )
                expiries_s.append(artifact.expires_s)
                if png is not None and content_type == "image/png":
                    lossless.append(artifact.id)
            files.append(artifact.id)
        return StoredResult(files=files, lossless=lossless, expires_s=min(expiries_s))

    def previous(self, name: str, *, owner: str = "") -> bytes:
        """The PNG of an earlier result of the same owner.

        Args:
            name: Id of its edit; `id:1` is the second of several results.
            owner: As when it was kept.

        Raises:
            NotFoundError: It was not kept, or is not there any more.
            StoreError: The store is in trouble.
        """
        match = _PREVIOUS.fullmatch(name)
        assert match is not None  # the pattern takes anything
        number = int(match[2] or 0)
        try:
            document = self._store.find("edit", _document_name(match[1], owner))
            if document is None:
                self._store.expiry_s(match[1])  # else it is no id of a job
                # It names its results itself, from the moment that it is done.
                document = self._store.find("job", match[1])
                if document is not None and document.content["order"]["owner"] != owner:
                    document = None
            results = document.content["results"] if document else ()
            if number < len(results):
                return self._store.read(results[number])[1]
        except NotFoundError:  # expired a moment before the document
            pass
        message = f"previous is {quoted(name)}; no such result was kept, or it has expired"
        raise NotFoundError(message, param="previous", code="previous_not_found")

    def read(self, artifact_id: str) -> tuple[Artifact, bytes]:
        """A file and its record.

        Raises:
            NotFoundError: There is none (any more).
            StoreError: The store is in trouble.
        """
        return self._store.read(artifact_id)

    def url(self, artifact_id: str, base_url: str) -> str:
        """An address of a file, that works until it expires; arguments as those of `ArtifactStore.url`."""
        return self._store.url(artifact_id, base_url)

    async def sweep(self) -> None:
        """Deletes what has expired, again and again; never returns."""
        while True:
            await asyncio.sleep(SWEEP_EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311  so that replicas take turns
            try:
                while await asyncio.to_thread(self._store.sweep, MAX_SWEPT) >= MAX_SWEPT:
                    pass
            except StoreError as error:
                logger.warning("expired results could not be deleted: %s", error)


def _document_name(edit_id: str, owner: str) -> str:
    return hashlib.sha256(owned_id(edit_id, owner).encode()).hexdigest()
