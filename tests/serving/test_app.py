"""The arguments of the application builder; how it runs is tested on a cluster in test_cluster.py."""

import inspect
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.scripts import cli

import serving
from serving.app import app
from serving.args import ArgumentError, ServingArgs


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
        ({"bundel": "x"}, r"there is no setting 'bundel'; did you mean bundle\?"),
        ({"qqq": "x"}, r"there is no setting 'qqq'; serving/args\.py describes them all"),
        ({"max_steps": "many"}, "max_steps is 'many'; it must be a valid integer"),
        ({"max_n": "11"}, "max_n is '11'; it must be less than or equal to 10"),
        ({"device": "gpu"}, "device is 'gpu'; it must be auto, cpu, mps, cuda or cuda:N"),
        ({"log_format": "xml"}, "log_format is 'xml'; it must be 'json' or 'text'"),
        ({"mllm_min_replicas": 3}, "mllm_min_replicas is 3; it must be at most mllm_max_replicas, 2"),
        ({"diffusion_max_replicas": 0}, "diffusion_max_replicas"),
        ({"device": "cuda"}, "mllm_num_gpus is 0"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"job_timeout_s": 100, "artifacts_ttl_s": 99}, "job_timeout_s is 100; it must be at most artifacts_ttl_s, 99"),
    ],
)
def test_bad_arguments_are_refused_by_name(given: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        ServingArgs.model_validate(given)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ArgumentError, match="webhook_hosts needs a secret"):
        app(args)


def test_the_builder_takes_several_bundles_of_different_names(random_bundle: Path, renamed_bundle: Path) -> None:
    app(ServingArgs(bundle=str(random_bundle), bundles=(str(renamed_bundle),)))
    with pytest.raises(ArgumentError, match="names must differ"):
        app(ServingArgs(bundle=str(random_bundle), bundles=(str(random_bundle),)))


def test_a_bundle_that_cannot_serve_fails_in_the_builder() -> None:
    with pytest.raises(ArgumentError, match="no tokenizer"):
        app(ServingArgs(bundle="random-summarizer"))
    with pytest.raises(ArgumentError, match="does not exist"):
        app(ServingArgs(bundle="./nowhere"))


def test_two_replicas_of_each_stage_fit_two_cpus_by_default() -> None:
    args = ServingArgs(bundle="random")
    assert args.mllm_max_replicas >= 2
    assert args.diffusion_max_replicas >= 2
    assert args.mllm_max_replicas * args.mllm_num_cpus + args.diffusion_max_replicas * args.diffusion_num_cpus <= 2


def test_limits_and_keys_that_cannot_hold_fail_in_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"max_steps is 1; bundle 'random' takes \d+ by default"):
        app(ServingArgs(bundle="random", max_steps=1))
    with pytest.raises(ArgumentError, match=r"keys_file .*absent\.toml cannot be read"):
        app(ServingArgs(bundle="random", keys_file=str(tmp_path / "absent.toml")))
    monkeypatch.setenv("MGIE_API_KEYS", "[[keys]]")
    with pytest.raises(ArgumentError, match="MGIE_API_KEYS, key 1: name is missing"):
        app(ServingArgs(bundle="random"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("artifacts={file}/results", "Error: store {file}/results cannot be opened: "),
        ("bundle=./nowhere", "Error: bundle './nowhere' does not exist"),
        ("max_stepz=3", "Error: there is no setting 'max_stepz'; did you mean max_steps?"),
    ],
)
def test_serve_run_tells_what_is_wrong_in_one_line_before_it_starts_anything(
    given: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    command = ["run", "serving.app", "keep_results=true", given.format(file=file)]
    had_ray = ray.is_initialized()  # by tests before, in this process
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(words.format(file=file))
    assert ray.is_initialized() == had_ray
