"""Repositories of the Hugging Face hub as a file system of pyarrow's, to read from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfFileSystem
from pyarrow.fs import FSSpecHandler


class HubHandler(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """Files of the hub; what its HTTP library raises becomes an OSError, as from every other store."""

    def __init__(self) -> None:
        super().__init__(HfFileSystem())

    def get_file_info(self, paths: Any) -> Any:
        """What is at these paths."""
        with _as_os_error():
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        """What is in a folder."""
        with _as_os_error():
            return super().get_file_info_selector(selector)

    def open_input_stream(self, path: str) -> Any:
        """A file, to be read from its beginning."""
        with _as_os_error():
            return super().open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        """A file, to be read anywhere."""
        with _as_os_error():
            return super().open_input_file(path)


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # the hub's HTTP library changes with its version
        raise OSError(f"Hub Error: {error}") from error
