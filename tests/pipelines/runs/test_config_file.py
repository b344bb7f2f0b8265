"""Settings as YAML: what comes back is what was written, and a mistake is named."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from mgie.errors import ConfigError
from mgie.storage.folder import open_folder
from pipelines.runs.config_file import CONFIG_FILE, expand, write_config


@dataclass(frozen=True)
class Size:
    num_cpus: float = 1.0
    is_large: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]
    words: Annotated[str, tyro.conf.Positional] = ""
    steps: int | None = None
    by: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    large: bool = False
    work: Path = Path("out")
    size: Size = field(default_factory=Size)


def _read(*arguments: str) -> Config:
    return tyro.cli(Config, args=expand(Config, arguments), console_outputs=False)


@pytest.mark.parametrize(
    "config",
    [
        Config(source="x"),
        Config(source="-s", words="make it: night", steps=-3, by=("a b", "c"), kind="b", large=True, work=Path("a/b")),
        Config(source="ü", size=Size(num_cpus=1e-7, is_large=True)),
    ],
)
def test_what_is_written_is_read_again(config: Config, tmp_path: Path) -> None:
    write_config(open_folder(tmp_path), config)
    if not config.source.startswith("-"):
        assert _read("--config", str(tmp_path / CONFIG_FILE)) == config
    assert _read("here", f"--config={tmp_path / CONFIG_FILE}") == dataclasses.replace(config, source="here")


def test_flags_win_and_dashes_may_be_underscores(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("source: x\nsteps: 3\nby: [a, b]\nlarge: true\nsize: {num_cpus: 2}\n")
    assert _read("--config", str(path), "--by", "c", "--no-large", "--size.num-cpus", "4") == Config(
        source="x", steps=3, by=("c",), size=Size(num_cpus=4)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3", r"no setting 'stepz'; did you mean 'steps'\?"),
        ("size: {num-cpu: 3}", r"no setting 'size\.num-cpu'; did you mean 'size\.num-cpus'\?"),
        ("quite: other", "no setting 'quite'; it has source, words, steps"),
        ("large: 3", "large is 3; it must be true or false"),
        ("- steps", "is no mapping of settings to values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        _read("x", "--config", str(tmp_path / "c.yaml"))


def test_a_file_that_is_not_there_or_not_given_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        _read("x", "--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="without a file"):
        _read("x", "--config")


def test_passwords_in_addresses_are_left_out(tmp_path: Path) -> None:
    write_config(open_folder(tmp_path), Config(source="https://me:secret@host:9/x?y=1"))
    assert (tmp_path / CONFIG_FILE).read_text().startswith("source: https://host:9/x?y=1\n")
