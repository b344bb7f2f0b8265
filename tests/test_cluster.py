"""cluster.yaml, checked offline: Ray's own validation, and the promises that Ray does not check.

Every promise is a function from the parsed file to a list of violations; it is asserted to be empty on the
file and not to be on a broken copy of it.
"""

import ast
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
Cluster = dict[str, Any]
RESOURCES_OF_RAY = {"CPU", "GPU", "memory", "object_store_memory"}


def _cluster() -> Cluster:
    loaded: Cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def _pinned(package: str) -> str:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if requirement.name == package:
            (version,) = requirement.specifier
            return version.version
    raise LookupError(f"requirements.lock does not pin {package}")


def _workers(cluster: Cluster) -> dict[str, Any]:
    return {name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def _starts(cluster: Cluster) -> list[str]:
    """The commands that start Ray, on the head and on workers."""
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def wrong_image_tag(cluster: Cluster) -> list[str]:
    """Client, head and workers must run one Ray version, the locked one."""
    images = [value for key, value in cluster["docker"].items() if key.endswith("image")]
    version = rf"(?<![\d.]){re.escape(_pinned('ray'))}(?![\d.])"
    return [image for image in images or ["no image"] if not re.search(version, image.partition(":")[2])]


def tasks_on_the_head(cluster: Cluster) -> list[str]:
    head = cluster["available_node_types"][cluster["head_node_type"]]["resources"]
    given = [f"{name}: {amount}" for name, amount in head.items() if amount]
    return given if head.get("CPU") == 0 else [*given, "CPU is not 0"]


def reachable_dashboard(cluster: Cluster) -> list[str]:
    heads = [command for command in _starts(cluster) if "--head" in command.split()]
    hosts = [re.findall(r"--dashboard-host[= ](\S+)", command) for command in heads]
    return [str(found) for found in hosts or ["no head"] if found != ["127.0.0.1"]]


def start_without_token(cluster: Cluster) -> list[str]:
    """Without the mode `ray start` runs open; without 0600 every user of the node reads the token."""
    needs = ("RAY_AUTH_MODE=token", "test -s ~/.ray/auth_token", "chmod 600 ~/.ray/auth_token")
    kinds = {"head": cluster["head_start_ray_commands"], "worker": cluster["worker_start_ray_commands"]}
    found = [
        f"{kind} never starts Ray" for kind, commands in kinds.items() if not any("ray start" in c for c in commands)
    ]
    for command in _starts(cluster):
        before = command.partition("ray start")[0]
        found += [f"no {need!r} before {command!r}" for need in needs if need not in before]
        if ";" in before:
            found.append(f"a failed check does not stop {command!r}")
    if cluster["file_mounts"].get("~/.ray/auth_token") is None:
        found.append("the token file is not distributed")
    return found


def token_in_the_file(cluster: Cluster) -> list[str]:
    return re.findall(r"RAY_AUTH_TOKEN=\S+|\b[0-9a-f]{64}\b|AKIA[0-9A-Z]{16}", yaml.safe_dump(cluster))


def missing_pools(cluster: Cluster) -> list[str]:
    """A pool of CPU workers, and GPU pools for the two stages, all able to grow."""
    workers = _workers(cluster)
    found = [f"{name}: max_workers is 0" for name, node in workers.items() if not node.get("max_workers")]
    if not any(node["resources"].get("CPU") and not node["resources"].get("GPU") for node in workers.values()):
        found.append("no CPU pool")
    for stage in ("mllm", "diffusion"):
        pools = [node["resources"] for node in workers.values() if node["resources"].get(stage)]
        if len(pools) != 1 or not pools[0].get("GPU"):
            found.append(f"no GPU pool of its own for {stage}")
    return found


def unreachable_maximum(cluster: Cluster) -> list[str]:
    total = sum(node["max_workers"] for node in _workers(cluster).values())
    return [] if cluster["max_workers"] >= total else [f"max_workers below the pools' sum of {total}"]


def installs_at_start(cluster: Cluster) -> list[str]:
    keys = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    return [key for key in keys if cluster.get(key) != []]  # absent = Ray's defaults, which install a nightly wheel


def unsafe_instances(cluster: Cluster) -> list[str]:
    """Instance metadata v2 only, encrypted disks, S3 by an instance profile."""
    found = []
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        if config.get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append(f"{name}: instance metadata v1 is on")
        disks = config.get("BlockDeviceMappings", [])
        if not disks or not all(disk["Ebs"].get("Encrypted") is True for disk in disks):
            found.append(f"{name}: a disk is not encrypted")
        if not config.get("IamInstanceProfile"):
            found.append(f"{name}: no instance profile")
    return found


def spot_gpus(cluster: Cluster) -> list[str]:
    """A replica taken away in the middle of an edit fails it; only restartable work runs on spot."""
    return [
        name
        for name, node in cluster["available_node_types"].items()
        if "InstanceMarketOptions" in node["node_config"]
        and (node["resources"].get("GPU") or name == cluster["head_node_type"])
    ]


def _resource_keys_in_code(tree: ast.AST) -> Iterator[str]:
    """What is literally named: keys of a dictionary called `..resources` (an argument, a key, a variable or a
    field), and the default of a field called `..resource`.
    """
    for node in ast.walk(tree):
        named: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.keyword):
            named = [(node.arg or "", node.value)]
        elif isinstance(node, ast.Dict):
            named = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        elif isinstance(node, ast.AnnAssign):
            named = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.Assign):
            named = [(ast.unparse(target), node.value) for target in node.targets]
        for name, value in named:
            if value is None:
                continue
            if str(name).endswith("_resource"):
                defaults = value.args[:1] if isinstance(value, ast.Call) else [value]  # Field("mllm", ...) or "mllm"
                yield from (d.value for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, str))
            if str(name).endswith("resources"):
                for inner in ast.walk(value):
                    if isinstance(inner, ast.Dict):
                        yield from (key.value for key in inner.keys if isinstance(key, ast.Constant))


def _resource_keys_in_yaml(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "resources" and isinstance(inner, dict):
                yield from inner
            if str(key).endswith("_resource") and isinstance(inner, str):
                yield inner
            yield from _resource_keys_in_yaml(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _resource_keys_in_yaml(inner)


def _resources_asked_for() -> set[str]:
    """Custom resources that the serving code or a Serve configuration file names."""
    asked: set[str] = set()
    for path in (ROOT / "serving").rglob("*.py"):
        asked |= set(_resource_keys_in_code(ast.parse(path.read_text(encoding="utf-8"))))
    for path in (ROOT / "deploy").glob("serve*.yaml"):
        asked |= set(_resource_keys_in_yaml(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return asked - RESOURCES_OF_RAY


def unknown_resources(cluster: Cluster) -> list[str]:
    known = {name for node in cluster["available_node_types"].values() for name in node["resources"]}
    return sorted((_resources_asked_for() | {"mllm", "diffusion"}) - known)


def _node(cluster: Cluster, name: str) -> dict[str, Any]:
    node: dict[str, Any] = cluster["available_node_types"][name]
    return node


def _replace_in_starts(old: str, new: str) -> Callable[[Cluster], None]:
    def change(cluster: Cluster) -> None:
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            cluster[key] = [command.replace(old, new) for command in cluster[key]]

    return change


# rule -> ways to break it; each alone must be seen
BROKEN: list[tuple[Callable[[Cluster], list[str]], Callable[[Cluster], Any]]] = [
    (wrong_image_tag, lambda c: c["docker"].update(image="rayproject/ray:2.9.0-py311-gpu")),
    (wrong_image_tag, lambda c: c["docker"].update(image="rayproject/ray:latest")),
    (wrong_image_tag, lambda c: c["docker"].update(image=f"rayproject/ray:{_pinned('ray')}1")),
    (wrong_image_tag, lambda c: c["docker"].update(head_image="rayproject/ray:nightly")),
    (tasks_on_the_head, lambda c: _node(c, "head").update(resources={"CPU": 4})),
    (tasks_on_the_head, lambda c: _node(c, "head").update(resources={})),
    (reachable_dashboard, _replace_in_starts("127.0.0.1", "0.0.0.0")),
    (reachable_dashboard, _replace_in_starts("--dashboard-host=127.0.0.1", "")),
    (start_without_token, _replace_in_starts("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")),
    (start_without_token, lambda c: c.update(worker_start_ray_commands=["ray stop", "ray start --address=x"])),
    (start_without_token, lambda c: c.update(worker_start_ray_commands=[])),
    (start_without_token, _replace_in_starts("chmod 600", "chmod 644")),
    (start_without_token, _replace_in_starts("auth_token &&", "auth_token ;")),
    (start_without_token, lambda c: c.update(file_mounts={})),
    (token_in_the_file, lambda c: c["docker"]["run_options"].append("--env RAY_AUTH_TOKEN=secret")),
    (missing_pools, lambda c: c["available_node_types"].pop("cpu")),
    (missing_pools, lambda c: c["available_node_types"].pop("mllm")),
    (missing_pools, lambda c: _node(c, "diffusion")["resources"].pop("GPU")),
    (missing_pools, lambda c: _node(c, "diffusion").update(max_workers=0)),
    (unreachable_maximum, lambda c: c.update(max_workers=3)),
    (installs_at_start, lambda c: c.update(setup_commands=["pip install mgie"])),
    (installs_at_start, lambda c: c.pop("head_setup_commands")),
    (unsafe_instances, lambda c: _node(c, "cpu")["node_config"].pop("MetadataOptions")),
    (unsafe_instances, lambda c: _node(c, "mllm")["node_config"]["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted")),
    (unsafe_instances, lambda c: _node(c, "head")["node_config"].pop("IamInstanceProfile")),
    (spot_gpus, lambda c: _node(c, "mllm")["node_config"].update(InstanceMarketOptions={"MarketType": "spot"})),
    (unknown_resources, lambda c: _node(c, "mllm").update(resources={"CPU": 8, "GPU": 1, "llm": 1})),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN))


def test_ray_accepts_the_cluster_file() -> None:
    validate_config(prepare_config(_cluster()))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(colour="blue"),
        lambda c: c.update(head_node_type="nobody"),
        lambda c: _node(c, "mllm").update(resources={"GPU": 0.5}),
        lambda c: c.update(max_workers=0) or _node(c, "mllm").update(min_workers=1),
    ],
)
def test_ray_refuses_a_broken_cluster_file(change: Callable[[Cluster], Any]) -> None:
    cluster = _cluster()
    change(cluster)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_cluster_file_keeps_the_promise(rule: Callable[[Cluster], list[str]]) -> None:
    assert rule(_cluster()) == []


@pytest.mark.parametrize(("rule", "change"), BROKEN, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BROKEN)])
def test_a_broken_promise_is_seen(rule: Callable[[Cluster], list[str]], change: Callable[[Cluster], Any]) -> None:
    cluster = copy.deepcopy(_cluster())  # deep: YAML anchors share their value
    change(cluster)
    assert rule(cluster) != []


@pytest.mark.parametrize(
    "code",
    [
        'serve.deployment(ray_actor_options={"num_gpus": 1, "resources": {"mllm": 1}})',
        'actor.options(resources={"mllm": 0.5})',
        'class Args:\n    mllm_resources: dict[str, float] = {"mllm": 1}',
        'resources = {"mllm": 1} if gpu else {}',
        'class Args:\n    llm_resource: str | None = "mllm"',
        'class Args:\n    llm_resource: str | None = Field("mllm", description="pool")',
        'class Args:\n    resources: dict[str, float] = Field(default_factory=lambda: {"mllm": 1})',
    ],
)
def test_a_resource_in_code_is_found(code: str) -> None:
    assert set(_resource_keys_in_code(ast.parse(code))) == {"mllm"}


def test_the_running_ray_is_the_pinned_one() -> None:
    """Ray's schema differs between versions: this validation counts for the version it was made with."""
    import ray

    assert ray.__version__ == _pinned("ray")
