"""What a job may ask of a cluster; plain sizes, no Ray."""

import re

import pytest

from mgie.errors import ConfigError
from pipelines.runs.cluster import StageSize, check_size

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
