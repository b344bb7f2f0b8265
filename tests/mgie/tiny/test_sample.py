import json
from pathlib import Path

import pytest

from mgie.errors import ConfigError
from mgie.images.files import read_image
from mgie.tiny.sample import SIDE_PX, write_sample


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_sample_has_the_same_bytes_each_time_and_others_for_another_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sample(tmp_path / name, 4, seed)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert _files(tmp_path / "a") != _files(tmp_path / "c")


@pytest.mark.parametrize("num_rows", [1, 5, 24])
def test_the_sample_has_as_many_different_pairs_as_asked_for(num_rows: int, tmp_path: Path) -> None:
    write_sample(tmp_path, num_rows)
    listed = json.loads((tmp_path / "seeds.json").read_text())
    pairs = [
        (tmp_path / name / f"{one}_0.jpg", tmp_path / name / f"{one}_1.jpg") for name, seeds in listed for one in seeds
    ]
    assert len(pairs) == num_rows
    assert len({source.read_bytes() for source, _ in pairs}) == num_rows
    for source, goal in pairs:
        assert read_image(source.read_bytes()).size == read_image(goal.read_bytes()).size == (SIDE_PX, SIDE_PX)
        assert source.read_bytes() != goal.read_bytes()
    prompts = [json.loads((tmp_path / name / "prompt.json").read_text()) for name, _ in listed]
    assert len({prompt["edit"] for prompt in prompts}) == min(12, len(listed))


def test_a_sample_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_rows"):
        write_sample(tmp_path, 0)
