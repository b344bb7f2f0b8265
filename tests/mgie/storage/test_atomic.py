"""Files and folders that appear complete or not at all."""

from pathlib import Path

import pytest

from mgie.storage.atomic import atomic_file, atomic_folder


def test_a_file_gets_its_name_in_place_of_an_older_one_when_the_block_ends(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_file(tmp_path / "deep" / "x.json") as partial:
            partial.write_text(content)
            assert partial.suffix == ".tmp"
            assert partial.name.startswith(".x.json.")
        assert (tmp_path / "deep" / "x.json").read_text() == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_a_folder_gets_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("before")

    def fail(kind: str) -> None:
        if kind == "file":
            with atomic_file(tmp_path / kind) as partial:
                partial.write_text("half")
                raise RuntimeError(kind)
        with atomic_folder(tmp_path / kind, replace=True) as partial:
            (partial / "x").write_text("half")
            raise RuntimeError(kind)

    for kind in ("file", "folder"):
        with pytest.raises(RuntimeError, match=kind):
            fail(kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "before"


def test_a_full_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "b", replace=content == "new") as partial:
            (partial / content).write_text("")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]

    def fill() -> None:
        with atomic_folder(tmp_path / "b"):
            pass

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "new"]


def test_a_folder_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "b") as partial:
        (partial / "old").write_text("")
    replace = Path.replace

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise OSError("no room for a name")
        return replace(path, target)

    def fill() -> None:
        with atomic_folder(tmp_path / "b", replace=True) as partial:
            (partial / "new").write_text("")

    monkeypatch.setattr(Path, "replace", fail_for_the_new)
    with pytest.raises(OSError, match="no room"):
        fill()
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "old"]
