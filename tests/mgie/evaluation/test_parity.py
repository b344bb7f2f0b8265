import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgie.bundle.bundle import Bundle
from mgie.bundle.convert import convert
from mgie.config import Sources
from mgie.errors import ParityError
from mgie.evaluation.parity import Group, Report, _cleaning_fault, _Comparison, _is_mended, compare

pytestmark = pytest.mark.slow

# Recorded draws and weights: what the others are computed from, not compared themselves.
INPUTS = {
    "train.noise", "train.posterior_noise", "train.timesteps", "train.prob_nodrop", "drop.prob",
    "init.conv_in_4ch.weight", "init.conv_in_4ch.bias",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(reference_dir: Path) -> Report:
    return compare(reference_dir)


@pytest.fixture(scope="module")
def bundle(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert(
        tmp_path_factory.mktemp("parity") / "bundle",
        Sources(
            llava=reference_dir / "llava",
            clip=reference_dir / "clip",
            stable_diffusion=reference_dir / "stable-diffusion",
            mgie=reference_dir / "mgie",
        ),
    )


@pytest.fixture(scope="module")
def recorded(reference_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((reference_dir / "vectors.json").read_text()), load_file(reference_dir / "vectors.safetensors")


@pytest.fixture
def copied(reference_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the reference that a test may change."""
    folder = tmp_path / "reference"
    shutil.copytree(reference_dir, folder, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


def verdicts(report: Report) -> dict[str, str]:
    return {group.name: group.verdict for group in report.groups}


# ---- on the reference


def test_the_model_agrees_with_the_original(report: Report) -> None:
    assert report.passed, [(group.name, group.reason) for group in report.groups if group.verdict == "fail"]
    by_design = [name for name, verdict in verdicts(report).items() if verdict == "by design"]
    assert by_design == ["labels of rows with control text", "cleaned strings, mended"]


def test_tolerances_are_those_suggested_beside_the_vectors(report: Report) -> None:
    tolerances = {group.name: group.tolerance for group in report.groups}
    for exact in ("tokenizing", "labels", "crops", "generated ids", "selection of states", "noise draws"):
        assert tolerances[exact] == 0
    for states in ("hidden states and logits", "edit features", "losses", "generation: states"):
        assert tolerances[states] == 1e-5
    for deep in ("gradients", "latents", "UNet", "guided UNet input and output", "sampling trajectory"):
        assert tolerances[deep] == 5e-5
    assert tolerances["final image"] == 1e-4
    assert max(tolerances.values()) == 1e-4


def test_the_report_as_json(report: Report) -> None:
    data = json.loads(json.dumps(report.as_json()))
    assert set(data) == {"groups", "passed"}
    assert data["passed"] is True
    for group in data["groups"]:
        assert set(group) == {"name", "compared", "worst", "tolerance", "verdict", "reason"}
        assert group["compared"] > 0
        assert group["worst"] <= group["tolerance"]
        assert (group["reason"] == "") == (group["verdict"] == "pass")
    assert len({group["name"] for group in data["groups"]}) == len(data["groups"]) > 25


# ---- every check can fail


def test_a_change_in_any_recorded_tensor_or_text_fails(copied: Path, report: Report) -> None:
    vectors = load_file(copied / "vectors.safetensors")
    changed = {key: value for key, value in vectors.items() if key not in INPUTS}
    for value in changed.values():
        first = value.view(-1)[:1]
        first += 1 if not value.is_floating_point() else 0.01 * value.abs().max()
    save_file(vectors, copied / "vectors.safetensors")
    record = json.loads((copied / "vectors.json").read_text())
    record["tokenizer"]["ids"]["[IMG3]"] += 1
    record["tokenizer"]["size"] += 1
    record["tokenize_table"][3]["input_ids"][-1] += 1
    record["label_table"][0]["labels"][-1] -= 1
    record["label_table"][1]["input_ids"][5] += 1
    record["prompts"]["train"] += "x"
    record["prompts"]["inference"] += "x"
    record["prompts"]["data_generation"] = record["prompts"]["data_generation"].replace("  (in", " (in")
    record["prompts"]["summarizer"]["prompt"] += "."
    record["train_select_index"][1] += 1
    record["edge_samples"]["select_index"][0] += 1
    record["gradient_norms"]["per_parameter"]["lm_head.weight"] *= 1.001
    record["gradient_norms"]["groups"]["all"] *= 1.001
    record["dropout_boundaries"]["text_null"][1] = True
    record["dropout_boundaries"]["image_null"][0] = False
    record["dropout_boundaries"]["loss"] *= 1.001
    samples = record["generation"]["samples"]
    samples[0]["p"] += 1
    samples[1]["img0_position"] += 1
    samples[2]["output_without_ngram_constraint"][-1] += 1
    samples[3]["ended_with_eos"] = not samples[3]["ended_with_eos"]
    record["remove_alter"][7]["output"] = "Another sentence."
    samples[0]["expressive"] += "!"
    (copied / "vectors.json").write_text(json.dumps(record))

    broken = compare(copied)
    assert not broken.passed
    problems = [problem for group in broken.groups for problem in group.problems]
    unseen = {key for key in changed if not any(p.startswith((f"{key} ", f"{key},")) for p in problems)}
    # Compared step by step: the changed number is in the first.
    unseen = {key for key in unseen if not any(p.startswith(f"{key} 0 ") for p in problems)}
    assert unseen == set()
    for text in (
        "id of [IMG3]", "size of the vocabulary", "ids of ' hello'", "row 'make it red' / 'A red wall.': labels",
        "row '' / '': ids", "train is", "inference", "data_generation", "summarizer", "train_select_index", "select_index",
        "lm_head.weight differs", "group all", "u = 0.10: text null", "u = 0.05: image null", "boundary loss", "gen0: p",
        "gen1: position", "gen2: output_without", "gen3: ended",
    ):  # fmt: skip
        assert any(problem.startswith(text) for problem in problems), text
    assert any("'A bright red color covers it all.'" in problem for problem in problems)
    # What can fail did: no group is left that passes whatever is recorded.
    assert {name for name, verdict in verdicts(broken).items() if verdict != "fail"} <= {
        "labels of rows with control text",
        "cleaned strings, mended",
    }
    assert set(verdicts(broken)) == set(verdicts(report))


def test_a_perturbed_weight_fails_where_it_is_used_and_nowhere_before(copied: Path) -> None:
    path = copied / "mgie" / "unet.pt"
    weights = torch.load(path, weights_only=True)
    weights["conv_out.bias"][0] += 0.01
    torch.save(weights, path)
    found = verdicts(compare(copied))
    for name in ("UNet", "losses", "condition dropout", "sampling trajectory", "final image"):
        assert found[name] == "fail", name
    for name in ("tokenizing", "labels", "hidden states and logits", "edit features", "latents", "generation: states"):
        assert found[name] == "pass", name


def test_a_perturbed_projector_fails_from_the_image_features_on(
    bundle: Bundle, reference_dir: Path, recorded: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    comparison = _Comparison(reference_dir, *recorded, bundle)
    with torch.no_grad():
        comparison.mgie.mllm.projector.bias += 1
    found = {group.name: group for group in comparison.training()}
    assert found["training ids, mask and labels"].verdict == "pass"
    assert found["latents"].verdict == "pass"
    for name in ("image features and input embeddings", "hidden states and logits", "edit features", "losses"):
        assert found[name].verdict == "fail", name
    assert found["image features and input embeddings"].problems[0].startswith("train.projected_features")


def test_a_parameter_without_gradient_is_a_failure_not_an_error(
    bundle: Bundle, reference_dir: Path, recorded: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    comparison = _Comparison(reference_dir, *recorded, bundle)
    comparison.mgie.edit_head.requires_grad_(requires_grad=False)
    values, norms = comparison.gradients()
    assert values.verdict == norms.verdict == "fail"
    assert any(problem.startswith("grad.edit_head.query") for problem in values.problems)
    assert any(problem.startswith("trained parameters") for problem in norms.problems)


# ---- "by design" hides nothing else


@pytest.fixture(scope="module")
def comparison(bundle: Bundle, reference_dir: Path, recorded: tuple[dict[str, Any], dict[str, Tensor]]) -> _Comparison:
    return _Comparison(reference_dir, *recorded, bundle)


def with_record(comparison: _Comparison, record: dict[str, Any]) -> _Comparison:
    changed = copy.copy(comparison)
    changed.record = record
    return changed


def test_a_changed_label_fails_in_every_row_without_control_text(
    comparison: _Comparison, recorded: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    markers = (*comparison.tokenizer.control_tokens, "USER:", "ASSISTANT:", "<image>")
    rows = recorded[0]["label_table"]
    plain = [i for i, row in enumerate(rows) if not any(m in row["instruction"] + row["expressive"] for m in markers)]
    assert len(plain) == 5
    for i in plain:
        record = copy.deepcopy(recorded[0])
        record["label_table"][i]["labels"][-1] = -100
        groups = with_record(comparison, record).labels()
        assert groups[0].name == "labels"
        assert groups[0].verdict == "fail"


def test_ids_of_rows_whose_text_is_a_turn_marker_are_still_compared(
    comparison: _Comparison, recorded: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    record = copy.deepcopy(recorded[0])
    [row] = [row for row in record["label_table"] if row["instruction"] == "write ASSISTANT: on the wall"]
    row["input_ids"][60] += 1
    assert with_record(comparison, record).labels()[0].verdict == "fail"


def test_our_labels_of_rows_with_control_text_can_fail(
    comparison: _Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mgie.evaluation.parity

    real = mgie.evaluation.parity.encode_answered

    def masks_everything(*args: Any, **kwargs: Any) -> Any:
        row = real(*args, **kwargs)
        row.labels[:] = [-100] * len(row.labels)
        return row

    monkeypatch.setattr(mgie.evaluation.parity, "encode_answered", masks_everything)
    assert [group.verdict for group in comparison.labels()] == ["fail", "fail"]


def test_the_original_parsing_of_user_text_would_fail(comparison: _Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgie.evaluation.parity

    real = mgie.evaluation.parity.encode_answered

    def parses(tokenizer: Any, instruction: str, expressive: str, num_patches: int) -> Any:
        row = real(tokenizer, instruction, expressive, num_patches)
        ids = tokenizer.encode(tokenizer.parse(instruction))[1:]
        return type(row)(row.ids[:5] + ids + row.ids[5:], [-100] * len(ids) + row.labels, row.answer_start, None)

    monkeypatch.setattr(mgie.evaluation.parity, "encode_answered", parses)
    assert comparison.labels()[1].verdict == "fail"


def test_groups_by_design_are_left_out_where_nothing_is_to_be_said(
    comparison: _Comparison, recorded: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    record = copy.deepcopy(recorded[0])
    record["label_table"] = record["label_table"][:2]
    record["remove_alter"] = [{"input": "One sentence", "output": "One sentence."}]
    changed = with_record(comparison, record)
    changed.samples = []
    assert [(group.name, group.verdict) for group in changed.labels()] == [("labels", "pass")]
    assert [(group.name, group.verdict) for group in changed.cleaning()] == [("cleaned strings", "pass")]


@pytest.mark.parametrize(
    ("text", "output", "fault"),
    [
        ("One. Two. Three.", "One.Two.", "joined without a space"),
        ("A 2.5 cm line. Next.", "A 2.5 cm line.", "decimal point"),
        ("See alternatives here. x", "See.", "`alternative` inside a word"),
        ("", None, "no text"),
        ("Two words here", "Two words here.", ""),
        ("red. Alternatively, blue", "red.", ""),
    ],
)
def test_the_rule_by_which_a_string_counts_as_mended(text: str, output: str | None, fault: str) -> None:
    row = {"input": text, "raises": "IndexError"} if output is None else {"input": text, "output": output}
    assert _cleaning_fault(row, text) == fault


@pytest.mark.parametrize(
    ("ours", "text", "output", "is_mended"),
    [
        ("One. Two.", "One. Two. Three.", "One.Two.", True),
        ("One. Three.", "One. Two. Three.", "One.Two.", False),
        ("One.", "One. Two. Three.", "One.Two.", False),
        ("A 2.5 cm line. Next.", "A 2.5 cm line. Next.", "A 2.5 cm line.", True),
        ("A 2.5 cm line nonsense.", "A 2.5 cm line. Next.", "A 2.5 cm line.", False),
        ("", "A 2.5 cm line. Next.", "A 2.5 cm line.", False),
    ],
)
def test_a_mended_string_differs_from_the_recorded_one_by_its_fault_only(
    ours: str, text: str, output: str, is_mended: bool
) -> None:
    row = {"input": text, "output": output}
    assert _is_mended(ours, row, text, _cleaning_fault(row, text)) is is_mended


# ---- arithmetic of a group


def test_a_group_passes_at_its_tolerance_and_fails_above() -> None:
    recorded = torch.tensor([0.0, 4.0])
    for difference, verdict in ((0.5, "pass"), (0.75, "fail")):
        group = Group("g", 0.125)
        group.tensor("x", recorded + torch.tensor([difference, 0.0]), recorded)
        assert (group.worst, group.verdict) == (difference / 4, verdict)
        assert group.compared == 2


@pytest.mark.parametrize(("ours", "recorded"), [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), float("inf"))])
def test_what_is_not_finite_fails_on_either_side(ours: float, recorded: float) -> None:
    group = Group("g", 1.0)
    group.tensor("x", torch.tensor([ours]), torch.tensor([recorded]))
    assert group.verdict == "fail"
    assert "not finite" in group.reason


def test_another_shape_fails() -> None:
    group = Group("g", 1.0)
    group.tensor("x", torch.zeros(2, 1), torch.zeros(2))
    assert group.verdict == "fail"


def test_a_group_that_compared_nothing_fails() -> None:
    assert Group("g", 1.0).verdict == "fail"
    assert Group("g", 1.0).reason == "nothing was compared"
    assert not Report((Group("g", 1.0),)).passed


def test_a_failure_is_never_by_design() -> None:
    group = Group("g", 0.0, design_reason="mended")
    group.equal("x", 1, 1)
    assert group.verdict == "by design"
    group.equal("x", 1, 2)
    assert group.verdict == "fail"
    assert group.reason == "x is 1, recorded 2"


# ---- folders that are no reference


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_that_is_no_reference_is_refused(copied: Path, content: str | None) -> None:
    if content is None:
        (copied / "vectors.json").unlink()
    else:
        (copied / "vectors.json").write_text(content)
    with pytest.raises(ParityError, match="reference"):
        compare(copied)


def test_damaged_vectors_are_refused(copied: Path) -> None:
    (copied / "vectors.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ParityError, match="is not a reference folder"):
        compare(copied)


def test_a_missing_image_or_tensor_is_named(
    comparison: _Comparison, recorded: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    changed = copy.copy(comparison)
    changed.folder = tmp_path
    with pytest.raises(ParityError, match=r"lacks images/gen_0\.png"):
        changed.pixels()
