"""Writes a bundle: whole, with the hash of every file, or not at all."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor

from mgie.bundle.record import (
    ALLOWED_SUFFIXES,
    CONFIG_FILE,
    PART_CONFIG_FILE,
    PREPROCESSOR_FILE,
    SCHEDULER_FILE,
    WEIGHTS_FILE,
    hash_file,
)
from mgie.config import BundleConfig, FileEntry, Part
from mgie.errors import BundleError
from mgie.model.tokens import Tokenizer
from mgie.storage.atomic import atomic_folder


class BundleWriter:
    """Writes a bundle next to its final place and moves it there when complete; on an error nothing is left.

        with BundleWriter(out, config) as writer:
            writer.add_pretrained("llm", llm)

    Args:
        out: The bundle's folder; must not exist, or be an older bundle if `replace`.
        config: `files` is filled in by the writer, `parts` must match what is added.

    Raises:
        BundleError: `out` is taken, or on leaving, the parts added are not those of `config`.
    """

    def __init__(self, out: Path, config: BundleConfig, *, replace: bool = False) -> None:
        self._out, self._config, self._replace = out, config, replace
        if out.exists() and not (replace and ((out / CONFIG_FILE).exists() or not any(out.iterdir()))):
            raise BundleError(f"{out} exists{' and is not a bundle' if replace else ''}; choose another output folder")

    def __enter__(self) -> "BundleWriter":  # noqa: PYI034  # the tests' type checker sees functions without their class
        self._stack = contextlib.ExitStack()
        self._staging = self._stack.enter_context(atomic_folder(self._out, replace=self._replace))
        self._stack.push(lambda kind, *_: self._finish() if kind is None else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        except OSError as failure:  # another process wrote it in the meantime: what it finished is not taken away
            raise BundleError(f"{self._out} cannot be put in place: {failure.strerror}") from failure

    def folder(self, part: Part) -> Path:
        """The part's folder, for callers that write its files themselves."""
        folder = self._staging / part
        folder.mkdir(exist_ok=True)
        return folder

    def add_pretrained(self, part: Part, model: Any, *, tokenizer: Any = None) -> None:
        """A transformers or diffusers model in its own layout, with its transformers tokenizer beside it."""
        with quiet():
            model.save_pretrained(self.folder(part), safe_serialization=True)
            config = json.loads((self.folder(part) / PART_CONFIG_FILE).read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None):  # a folder of the machine that wrote it
                _write_json(self.folder(part) / PART_CONFIG_FILE, config)
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder(part))

    def add_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The `tokenizer` part."""
        tokenizer.save(self.folder("tokenizer"))

    def add_clip_pixels(self, config: Mapping[str, Any]) -> None:
        """The preprocessing of the `vision` part."""
        _write_json(self.folder("vision") / PREPROCESSOR_FILE, config)

    def add_projector(self, weights: Mapping[str, Tensor]) -> None:
        """The `projector` part: `weight` and `bias`."""
        save_file(_contiguous(weights), self.folder("projector") / WEIGHTS_FILE)

    def add_edit_head(self, config: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
        """The `edit_head` part."""
        _write_json(self.folder("edit_head") / PART_CONFIG_FILE, config)
        save_file(_contiguous(weights), self.folder("edit_head") / WEIGHTS_FILE)

    def add_scheduler(self, config: Mapping[str, Any]) -> None:
        """The `scheduler` part."""
        _write_json(self.folder("scheduler") / SCHEDULER_FILE, config)

    def _finish(self) -> None:
        added = sorted(path.name for path in self._staging.iterdir())
        if added != sorted(self._config.parts):
            raise BundleError(f"parts written are {added}; the configuration says {sorted(self._config.parts)}")
        paths = sorted(path for path in self._staging.rglob("*") if path.is_file())
        files = {
            path.relative_to(self._staging).as_posix(): FileEntry(sha256=hash_file(path), size=path.stat().st_size)
            for path in paths
        }
        if bad := [name for name in files if not name.endswith(ALLOWED_SUFFIXES)]:
            raise BundleError(f"{bad[0]} cannot be part of a bundle; only {', '.join(ALLOWED_SUFFIXES)} files are read")
        config = dataclasses.replace(self._config, files=files)
        _write_json(self._staging / CONFIG_FILE, dataclasses.asdict(config))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in weights.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars off: a library does not draw on its caller's terminal."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
