"""Special tokens of MGIE's vocabulary, and text -> ids -> text.

The vocabulary is a sentencepiece model plus added tokens: `<im_patch>`, `<im_start>`, `<im_end>` (LLaVA)
and the visual tokens `[IMG0]`..`[IMG<N-1>]` (MGIE). No other file knows an id. Text is encoded by
sentencepiece alone, which cannot produce a control token; only a `Control` in a list of segments becomes
one. So whatever a user writes stays plain text. Knows nothing of prompts.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from mgie.errors import BundleError

IM_PATCH, IM_START, IM_END = "<im_patch>", "<im_start>", "<im_end>"
IMAGE_TOKENS = (IM_PATCH, IM_START, IM_END)
MODEL_FILE, ADDED_FILE = "tokenizer.model", "added_tokens.json"


def visual_token(index: int) -> str:
    """The `index`-th visual token, `[IMG0]` first."""
    return f"[IMG{index}]"


@dataclass(frozen=True)
class Control:
    """A special token in a list of segments; a plain `str` segment is never parsed for them."""

    token: str


Segment = str | Control


class Tokenizer:
    """Text and special tokens <-> ids, exactly as the published weights were trained.

    Args:
        model_proto: A serialised sentencepiece model.
        added: Ids of the added tokens; `<im_patch>`, `<im_start>`, `<im_end>` are required, visual
            tokens optional (a plain LLaVA has none).

    Raises:
        BundleError: The model cannot be read, or the added tokens are incomplete or clash.
    """

    def __init__(self, model_proto: bytes, added: Mapping[str, int]) -> None:
        self._model_proto = model_proto
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model_proto)
        except RuntimeError as error:
            raise BundleError(f"the sentencepiece model cannot be read: {error}") from error
        self.unk_id: int = self._pieces.unk_id()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        if min(self.unk_id, self.bos_id, self.eos_id) < 0:
            raise BundleError("the sentencepiece model lacks <unk>, <s> or </s>")
        self.pad_id = self.unk_id  # as in the published training: pad = unk, masked everywhere
        self.num_pieces: int = self._pieces.get_piece_size()
        self.added = dict(sorted(added.items(), key=lambda item: item[1]))
        missing = [token for token in IMAGE_TOKENS if token not in added]
        if missing:
            raise BundleError(
                f"the tokenizer lacks {', '.join(missing)}; added tokens: {', '.join(self.added) or 'none'}"
            )
        if list(self.added.values()) != list(range(self.num_pieces, self.num_pieces + len(added))):
            raise BundleError(
                f"ids of added tokens are {list(self.added.values())}; they must follow the {self.num_pieces} pieces without a gap"
            )
        visual = [token for token in self.added if token not in IMAGE_TOKENS]
        if visual != [visual_token(i) for i in range(len(visual))]:
            raise BundleError(f"added tokens {visual} are not [IMG0], [IMG1], ... in order")
        self.visual_ids: tuple[int, ...] = tuple(self.added[token] for token in visual)
        self._control_ids = {"<unk>": self.unk_id, "<s>": self.bos_id, "</s>": self.eos_id, **self.added}
        self._control_pattern = re.compile(
            "(" + "|".join(re.escape(token) for token in sorted(self._control_ids, key=len, reverse=True)) + ")"
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids: pieces and added tokens."""
        return self.num_pieces + len(self.added)

    @property
    def im_patch_id(self) -> int:
        """Id of the placeholder that image features replace."""
        return self.added[IM_PATCH]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every string that `parse` recognises."""
        return tuple(self._control_ids)

    def with_visual_tokens(self, num_visual_tokens: int) -> "Tokenizer":
        """A tokenizer that has exactly `[IMG0]`..`[IMG<num_visual_tokens-1>]` after the image tokens."""
        added = {token: self.added[token] for token in IMAGE_TOKENS}
        first = max(added.values()) + 1
        return Tokenizer(self._model_proto, added | {visual_token(i): first + i for i in range(num_visual_tokens)})

    def parse(self, template: str) -> list[Segment]:
        """Cuts a template of ours at its special tokens. Never call it on text that a user wrote."""
        return [
            Control(part) if part in self._control_ids else part
            for part in self._control_pattern.split(template)
            if part
        ]

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of `segments`, `<s>` first.

        Neighbouring strings are joined and encoded as one piece, each piece alone by sentencepiece (so
        each gets its own dummy-prefix space). White space next to an image or visual token vanishes,
        next to `<s>`, `</s>` and `<unk>` it stays: the published checkpoint was trained so.

        Raises:
            KeyError: A `Control` that this vocabulary does not have (a bug of the caller).
        """
        ids = [self.bos_id]
        merged = _merge_strings(segments)
        for i, segment in enumerate(merged):
            if isinstance(segment, Control):
                ids.append(self._control_ids[segment.token])
                continue
            text = segment
            if i > 0 and self._strips_neighbours(merged[i - 1]):
                text = text.lstrip()
            if i + 1 < len(merged) and self._strips_neighbours(merged[i + 1]):
                text = text.rstrip()
            ids.extend(self.encode_plain(text))
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Sentencepiece ids of `text`, no `<s>`; never a control token, whatever the text."""
        ids: list[int] = self._pieces.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, the runs between them joined by one space."""
        runs: list[list[int]] = [[]]
        special = set(self._control_ids.values())
        for token_id in ids:
            if token_id in special:
                runs.append([])
            else:
                runs[-1].append(token_id)
        return " ".join(self._pieces.decode(run) for run in runs if run)

    def _strips_neighbours(self, segment: Segment) -> bool:
        return isinstance(segment, Control) and segment.token in self.added

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.model` and `added_tokens.json`.

        Raises:
            BundleError: A file is missing or damaged.
        """
        try:
            return cls(
                (folder / MODEL_FILE).read_bytes(), json.loads((folder / ADDED_FILE).read_text(encoding="utf-8"))
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(f"the tokenizer in {folder} cannot be read: {error}") from error

    def save(self, folder: Path) -> None:
        """Writes the files that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model_proto)
        (folder / ADDED_FILE).write_text(json.dumps(self.added, indent=2) + "\n", encoding="utf-8")


def _merge_strings(segments: Iterable[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and merged and isinstance(merged[-1], str):
            merged[-1] += segment
        else:
            merged.append(segment)
    return [segment for segment in merged if segment != ""]
