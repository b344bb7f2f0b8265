import dataclasses
from pathlib import Path

import pytest

from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Folder, open_folder
from pipelines.runs.run_record import RunRecord, claim, fingerprint, read_run


def _run(**config: object) -> RunRecord:
    return RunRecord(job="prepare", fingerprint=fingerprint(config), config=config)


def test_a_run_is_begun_and_continued_by_the_same_settings(folder: Folder) -> None:
    run = _run(layout="gier", limits={"max_bytes": 3})
    assert read_run(folder) is None
    assert claim(folder, run) == run
    assert claim(folder, run) == run
    assert not claim(folder, run).is_finished
    RunRecord(job="prepare", fingerprint=run.fingerprint, config=run.config, is_finished=True, report={"n": 1}).write(
        folder
    )
    assert claim(folder, run).report == {"n": 1}


def test_another_run_is_refused_and_what_differs_is_named(folder: Folder) -> None:
    claim(folder, _run(layout="gier", dataset="x"))
    with pytest.raises(ConfigError, match=r'holds another run: layout was "gier", is "evr". Give the old values'):
        claim(folder, _run(layout="evr", dataset="x"))
    with pytest.raises(ConfigError, match="job prepare, not summarize"):
        claim(folder, RunRecord(job="summarize", fingerprint="x", config={}))
    assert (read_run(folder) or _run()).config["layout"] == "gier"


def test_a_folder_with_something_else_is_refused(folder: Folder) -> None:
    folder.write("my thesis.txt", b"x")
    with pytest.raises(ConfigError, match=r"not empty .*my thesis"):
        claim(folder, _run())
    assert not folder.exists("run.json")


def test_only_what_decides_the_result_is_told_leaf_by_leaf(folder: Folder) -> None:
    old, new = ({"steps": steps, "optimizer": {"rate": rate, "beta": 1}} for steps, rate in ((2, 0.1), (2, 0.2)))
    for out, config, decides in (("a", old, {"training": old}), ("b", new, {"training": new})):
        run = RunRecord(
            job="train", fingerprint=fingerprint(decides), config={"out": out, **decides}, decides=frozenset(decides)
        )
        if config is old:
            claim(folder, run)
        else:
            with pytest.raises(ConfigError, match=r"another run: training\.optimizer\.rate was 0\.1, is 0\.2\. Give"):
                claim(folder, run)


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_number_that_may_grow_is_taken_over_and_may_not_shrink(folder: Folder, is_finished: bool) -> None:
    few, many, other = (_run(training={"steps": steps}, seed=seed) for steps, seed in ((2, 0), (3, 0), (4, 1)))
    claim(folder, few)
    dataclasses.replace(few, is_finished=is_finished).write(folder)
    with pytest.raises(ConfigError, match=r"training\.steps was 2, is 3"):
        claim(folder, many)
    assert claim(folder, many, may_grow="training.steps") == many
    assert read_run(folder) == many
    for wrong in (few, other):
        with pytest.raises(ConfigError, match=r"training\.steps was 3"):
            claim(folder, wrong, may_grow="training.steps")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 9}', b'{"format": 1, "job": "x"}'])
def test_a_damaged_record_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError, match=r"run\.json"):
        claim(open_folder(tmp_path), _run())


def test_fingerprints_do_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2, {"c": 3}]}) == fingerprint({"b": [2, {"c": 3}], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
