import math
import subprocess
import sys

import pytest

from mgie.config import MAX_STEPS, BundleConfig, EditSettings, GenerationConfig, Provenance
from mgie.errors import BundleError, ConfigError, ImageTooLargeError, MGIEError

PROVENANCE = Provenance(made_by="test")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", MAX_STEPS + 1),
        ("steps", -1),
        ("steps", 10**400),
        ("guidance_scale", -0.1),
        ("guidance_scale", 50.1),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("image_guidance_scale", -math.inf),
        ("image_guidance_scale", 10**400),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*; it must be ") as caught:
        EditSettings(**{name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 200


def test_the_borders_of_the_ranges_are_allowed() -> None:
    EditSettings(steps=1, guidance_scale=0, image_guidance_scale=50)
    EditSettings(steps=MAX_STEPS, guidance_scale=1.0)


def test_values_of_a_wrong_type_are_refused_by_name_where_no_type_checker_runs() -> None:
    # In a process of its own: the tests' type checker would be faster.
    program = """
import json
from dataclasses import asdict
import numpy as np
from mgie.config import EditSettings, GenerationConfig, TrainingConfig
from mgie.errors import ConfigError
given = EditSettings(steps=np.int64(3), guidance_scale=np.float32(1.25), square_crop=np.bool_(True))
assert json.loads(json.dumps(asdict(given)))["steps"] == 3 and given.guidance_scale == 1.25 and given.square_crop is True
for kind, name, value in (
    (EditSettings, "steps", 2.5), (EditSettings, "steps", True), (EditSettings, "steps", "3"),
    (EditSettings, "guidance_scale", "7"), (EditSettings, "guidance_scale", True), (EditSettings, "sampler", "euler"),
    (EditSettings, "image_guidance_scale", [1]), (GenerationConfig, "stop", "never"), (GenerationConfig, "max_new_tokens", "9"),
    (GenerationConfig, "no_repeat_ngram_size", 2.5), (TrainingConfig, "global_batch", 32.5), (TrainingConfig, "seed", 1.5),
    (EditSettings, "square_crop", "false"), (EditSettings, "detail_transfer", 1),
):
    try:
        kind(**{name: value})
    except ConfigError as error:
        assert error.param == name, (name, error)
    else:
        raise SystemExit(f"{name}={value!r} was taken")
print("all refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "all refused\n", done.stderr


def test_override_keeps_what_is_not_given_and_checks_the_rest() -> None:
    base = EditSettings(steps=7, guidance_scale=3.0)
    assert base.override(steps=None, guidance_scale=4.0) == EditSettings(steps=7, guidance_scale=4.0)
    assert base.override(guidance_scale=0.0).guidance_scale == 0.0  # zero is a value, not "not given"
    assert base == EditSettings(steps=7, guidance_scale=3.0)
    with pytest.raises(ConfigError, match="unknown setting strength") as caught:
        base.override(strength=1)
    assert caught.value.param == "strength"
    with pytest.raises(ConfigError) as caught:
        base.override(steps=0)
    assert caught.value.param == "steps"


@pytest.mark.parametrize("field", ["max_new_tokens", "no_repeat_ngram_size"])
def test_generation_limits_are_checked(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**{field: -1})
    assert caught.value.param == field


def test_a_bundle_needs_at_least_one_part() -> None:
    with pytest.raises(BundleError, match="known parts: tokenizer"):
        BundleConfig(name="x", parts=(), trained=True, provenance=PROVENANCE)


def test_require_names_what_is_missing_and_what_is_there() -> None:
    config = BundleConfig(name="x", parts=("unet", "vae"), trained=True, provenance=PROVENANCE)
    config.require(("unet",))
    with pytest.raises(BundleError, match="bundle 'x' has no llm, scheduler; it holds unet, vae"):
        config.require(("llm", "unet", "scheduler"))


def test_every_error_carries_the_argument_at_fault() -> None:
    assert ImageTooLargeError("too large", param="image").param == "image"
    assert MGIEError("plain").param is None
