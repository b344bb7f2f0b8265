"""What a job may ask of a cluster; plain sizes, no Ray."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgie.errors import ConfigError
from pipelines.runs.cluster import StageSize, _address, absolute_bundle, check_size, local_bundles

STAGES = {"describe": StageSize(num_cpus=0.5), "summarize": StageSize(num_cpus=0.5)}


def test_stages_that_fill_the_cluster_exactly_fit() -> None:
    check_size(STAGES, [{"CPU": 1.35}], task_cpus=0.35)
    check_size({"describe": StageSize(num_cpus=0.1, min_actors=3, max_actors=3)}, [{"CPU": 0.3}], task_cpus=0)


def test_a_cluster_without_room_for_the_tasks_is_refused_with_what_to_do() -> None:
    message = "the job needs 1.35 CPUs at least, the cluster has 1; lower --describe.num-cpus or --summarize.num-cpus"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_size(STAGES, [{"CPU": 1.0}], task_cpus=0.35)


def test_gpus_are_counted_over_nodes() -> None:
    stages = {"describe": StageSize(num_gpus=1, min_actors=2, max_actors=2), "summarize": StageSize(num_gpus=0.5)}
    check_size(stages, [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 2}], task_cpus=0.35)
    with pytest.raises(ConfigError, match=re.escape("needs 2.5 GPUs at least, the cluster has 2")):
        check_size(stages, [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], task_cpus=0.35)


def test_an_actor_that_fits_no_single_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="one actor of stage describe needs 4 CPUs and 0 GPUs on one node"):
        check_size({"describe": StageSize(num_cpus=4)}, [{"CPU": 2}, {"CPU": 2}], task_cpus=0)


@pytest.mark.parametrize("wrong", [{"min_actors": 0}, {"min_actors": 2}, {"batch_size": 0}, {"num_cpus": -1.0}])
def test_impossible_sizes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        StageSize(**wrong)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _find(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, named: str = "", in_file: str = ""
) -> tuple[str | None, str]:
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("RAY_ADDRESS", named)
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / "ray_current_cluster").write_text(in_file)
    said: list[str] = []
    return _address(said.append), "".join(said)


def test_a_cluster_that_answers_is_left_to_ray(listening: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, in_file in (("", ""), ("", listening), (listening, ""), ("auto", listening), (f"ray://{listening}", "")):
        assert _find(monkeypatch, tmp_path, named=named, in_file=in_file) == (None, "")


def test_a_cluster_that_is_gone_is_replaced_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = _find(monkeypatch, tmp_path, in_file="127.0.0.1:9\n")
    assert found == "local"
    assert f"{tmp_path}/ray/ray_current_cluster names (127.0.0.1:9) is gone" in said
    for named, in_file in (("127.0.0.1:9", ""), ("auto", "127.0.0.1:9")):
        with pytest.raises(ConnectionError, match=rf"RAY_ADDRESS is {named}, but no cluster answers at 127\.0\.0\.1:9"):
            _find(monkeypatch, tmp_path, named=named, in_file=in_file)


def test_bundles_that_are_folders_are_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "own"):
        (tmp_path / name).mkdir()
    names = [absolute_bundle(name) for name in ("tiny", "own", "./tiny", "org/name", "s3://b/x")]
    assert names == ["tiny", f"{tmp_path}/own", f"{tmp_path}/tiny", "org/name", "s3://b/x"]
    assert [folder.path for folder in local_bundles(*names).values()] == [f"{tmp_path}/own", f"{tmp_path}/tiny"]
