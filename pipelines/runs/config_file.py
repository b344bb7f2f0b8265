"""Settings of a job as YAML: read where `--config` names a file, written beside what came of them.

Keys are the names of the flags, those of a group below its name:

    ledger: s3://bucket/ledger
    edit:
      num-gpus: 1
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml

from mgie.errors import ConfigError
from mgie.storage.folder import Folder

CONFIG_FILE = "config.yaml"
FLAG = "--config"


def expand(config_type: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings of the file that `--config` names before the flags, which win over them.

    Raises:
        ConfigError: The file cannot be read, or names a setting that the job does not have.
    """
    given = list(arguments)
    at = next((i for i, argument in enumerate(given) if argument.partition("=")[0] == FLAG), None)
    if at is None:
        return given
    if "=" in given[at]:
        path = given.pop(at).partition("=")[2]
    elif at + 1 < len(given):
        _, path = given.pop(at), given.pop(at)
    else:
        raise ConfigError(f"{FLAG} is given without a file", param="config")
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}", param="config") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} is no mapping of settings to values", param="config")
    types = dict(_settings(config_type))
    positional, flags = {}, []
    for name, value in _leaves(content or {}):
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(types)}"
            raise ConfigError(f"{path}: the job has no setting {name!r}{meant}", param="config")
        if tyro.conf.Positional in getattr(types[name], "__metadata__", ()):
            positional[name] = str(value)
        else:
            flags += _flag(path, name, value, types[name])
    first = list(takewhile(lambda argument: not argument.startswith("-"), given))
    return [*first, *list(positional.values())[len(first) :], *flags, *given[len(first) :]]


def write_config(folder: Folder, config: Any) -> None:
    """Writes all settings to `config.yaml`, without what a URL says of users and passwords. Raises OSError."""
    text = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    folder.write(CONFIG_FILE, re.sub(r"://[^/@\s]*@", "://", text).encode())


def _settings(config_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of each setting."""
    for name, kind in get_type_hints(config_type, include_extras=True).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _settings(kind, f"{flag}.")
        else:
            yield flag, kind


def _leaves(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = prefix + str(key).replace("_", "-")
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _flag(path: str, name: str, value: Any, kind: Any) -> list[str]:
    """A setting as arguments; whether the value is allowed is for whoever reads them to say."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is {value!r}; it must be true or false", param="config")
        group, dot, last = name.rpartition(".")
        return [f"--{group}{dot}{'' if value else 'no-'}{last}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _plain(value: Any) -> Any:
    """What YAML has words for."""
    if isinstance(value, dict):
        return {str(key).replace("_", "-"): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
