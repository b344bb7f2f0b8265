"""The arguments of the application builder; how it runs is tested on a cluster in test_cluster.py."""

import inspect
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from ray import serve

import serving
from mgie.errors import BundleError, ConfigError
from serving.app import app
from serving.args import ServingArgs


def test_serve_finds_a_builder_with_one_typed_argument() -> None:
    assert serving.app is app
    (argument,) = inspect.signature(app).parameters.values()
    assert issubclass(argument.annotation, BaseModel)


def test_the_builder_makes_an_application_without_a_cluster() -> None:
    assert isinstance(app(ServingArgs(bundle="random")), serve.Application)


def test_command_line_strings_become_values() -> None:
    args = ServingArgs.model_validate({"mllm_num_gpus": "0.5", "diffusion_max_replicas": "4", "device": "cpu"})
    assert (args.mllm_num_gpus, args.diffusion_max_replicas) == (0.5, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bundel": "x"}, "bundel"),
        ({"mllm_min_replicas": 3}, "mllm_min_replicas is 3; it must be at most mllm_max_replicas, 2"),
        ({"diffusion_max_replicas": 0}, "diffusion_max_replicas"),
        ({"device": "cuda"}, "mllm_num_gpus is 0"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"job_timeout_s": 100, "artifacts_ttl_s": 99}, "job_timeout_s is 100; it must be at most artifacts_ttl_s, 99"),
    ],
)
def test_bad_arguments_are_refused_by_name(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServingArgs.model_validate(given)


def test_every_argument_is_described_and_none_can_be_changed_later() -> None:
    assert all(field.description for field in ServingArgs.model_fields.values())
    with pytest.raises(ValidationError, match="frozen"):
        ServingArgs().device = "cpu"  # type: ignore[misc]


@pytest.mark.parametrize(("given", "bundles"), [("", ()), ("a", ("a",)), ("a,s3://b/c", ("a", "s3://b/c"))])
def test_bundles_are_named_in_one_word(given: str, bundles: tuple[str, ...]) -> None:
    assert ServingArgs.model_validate({"bundles": given}).bundles == bundles


def test_webhooks_without_a_secret_fail_in_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MGIE_WEBHOOK_SECRET", raising=False)
    args = ServingArgs.model_validate({"bundle": "random", "webhook_hosts": "a.example,b.example:8443"})
    assert args.webhook_hosts == ("a.example", "b.example:8443")
    with pytest.raises(ConfigError, match="webhook_hosts needs a secret"):
        app(args)


def test_the_builder_takes_several_bundles_of_different_names(random_bundle: Path, renamed_bundle: Path) -> None:
    app(ServingArgs(bundle=str(random_bundle), bundles=(str(renamed_bundle),)))
    with pytest.raises(BundleError, match="names must differ"):
        app(ServingArgs(bundle=str(random_bundle), bundles=(str(random_bundle),)))


def test_a_bundle_that_cannot_serve_fails_in_the_builder() -> None:
    with pytest.raises(BundleError, match="no tokenizer"):
        app(ServingArgs(bundle="random-summarizer"))
    with pytest.raises(BundleError, match="not a folder"):
        app(ServingArgs(bundle="./nowhere"))


def test_two_replicas_of_each_stage_fit_two_cpus_by_default() -> None:
    args = ServingArgs(bundle="random")
    assert args.mllm_max_replicas >= 2
    assert args.diffusion_max_replicas >= 2
    assert args.mllm_max_replicas * args.mllm_num_cpus + args.diffusion_max_replicas * args.diffusion_num_cpus <= 2


def test_limits_and_keys_that_cannot_hold_fail_in_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"max_steps is 1; bundle 'random' takes \d+ by default"):
        app(ServingArgs(bundle="random", max_steps=1))
    with pytest.raises(ConfigError, match=r"keys_file .*absent\.toml cannot be read"):
        app(ServingArgs(bundle="random", keys_file=str(tmp_path / "absent.toml")))
    monkeypatch.setenv("MGIE_API_KEYS", "[[keys]]")
    with pytest.raises(ConfigError, match="MGIE_API_KEYS, key 1: name is missing"):
        app(ServingArgs(bundle="random"))
