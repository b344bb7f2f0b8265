"""`python -m serving.access new NAME`: makes an API key and the entry of the keys file that lets it in."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from mgie.errors import ConfigError
from serving.access.keys import KeyRing, new_key, read_keys
from serving.schema import Priority

app = tyro.extras.SubcommandApp()


@app.command
def new(
    name: Annotated[str, tyro.conf.Positional],
    *,
    requests_per_minute: int | None = None,
    max_concurrent: int | None = None,
    pixel_steps_per_minute: int | None = None,
    priority: Priority | None = None,
    expires: str | None = None,
) -> None:
    """Makes a key. It goes to the terminal once (stderr); the entry for the keys file (stdout) holds its hash only.

    Args:
        name: Whose key it is: a-z, 0-9, _ and -.
        requests_per_minute: None: no limit.
        max_concurrent: Edits under way at a time; none: no limit.
        pixel_steps_per_minute: Pixels worked at x denoising steps x results; none: no limit.
        priority: None: interactive, and batch for jobs.
        expires: Time with its zone, as 2030-01-31T12:00:00Z; none: never.

    Raises:
        ConfigError: A value is not allowed.
    """
    key, digest = new_key()
    values: dict[str, str | int | None] = {
        "name": f'"{name}"',
        "sha256": f'"{digest}"',
        "requests_per_minute": requests_per_minute,
        "max_concurrent": max_concurrent,
        "pixel_steps_per_minute": pixel_steps_per_minute,
        "priority": priority and f'"{priority}"',
        "expires": expires,
    }
    lines = [f"{field} = {value}" for field, value in values.items() if value is not None]
    entry = "\n".join(["[[keys]]", *lines])
    read_keys(entry, where="the new key")
    print(f"key, shown this once: {key}", file=sys.stderr)  # so that `>> keys.toml` takes the entry alone
    print(entry)


@app.command
def check(file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Reads a keys file as the service does, and tells whose keys it holds.

    Args:
        file: The file.

    Raises:
        ConfigError: It is wrong, or cannot be read.
    """
    for caller in KeyRing(file).callers:
        limits = caller.key.model_dump(exclude={"name", "sha256"}, exclude_none=True)
        print(caller.key.name, *(f"{field}={value}" for field, value in limits.items()))


if __name__ == "__main__":
    try:
        app.cli(prog="python -m serving.access")
    except ConfigError as error:
        sys.exit(f"error: {error}")
