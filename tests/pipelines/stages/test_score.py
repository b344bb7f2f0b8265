"""The scoring stage as plain Python."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from mgie.bundle.bundle import open_bundle
from mgie.data.ledger import rejection_code, to_table
from mgie.editor import Editor
from mgie.evaluation.scorer import MAX_PSNR_DB
from mgie.images.pixels import from_work, to_work
from mgie.storage.folder import open_folder
from pipelines.stages.score import ScoreEdits
from pipelines.stages.score_rows import (
    CEILING,
    COPY,
    PLANNED_SCHEMA,
    FetchPictures,
    Protocol,
    ScoringPlan,
    read_rows,
    scores_schema,
)
from pipelines.stages.seeds import row_seed
from tests.mgie.networks import write_clip, write_dino
from tests.pipelines.evaluation_data import (
    drawn_rows,
    picture,
    row,
    scoring_plan,
    session_rows,
    world_rows,
    write_ledger,
    write_manifest,
    write_png,
)

pytestmark = pytest.mark.slow

WORLD = "mgie.tiny.world.scorer:WorldScorer"
Scored = dict[tuple[int, str], tuple[dict[str, Any], bytes | None]]


def _score(folder: Path, plan: ScoringPlan, *, words: bool = False, protocol: Protocol = "single-turn") -> Scored:
    planned = read_rows(open_folder(folder), split="all", max_rows=None, protocol=protocol, gives_expressive=words)
    images = open_folder(folder.parent)
    scored = ScoreEdits(plan)(FetchPictures(images, images)(to_table(planned, PLANNED_SCHEMA)))
    to_table([one for one, _ in scored], scores_schema(plan.metrics))
    found = {(one["id"], one["setting"]): (one, data) for one, data in scored}
    assert len(found) == len(scored) == len(planned) * len(plan.names)
    return found


def _pixels(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_row_is_edited_as_the_editor_does_with_its_own_seed_and_measured(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 3)
    found = _score(write_manifest(tmp_path, rows), scoring_plan(seed=5))
    editor = Editor.load("random", device="cpu")
    for i, one in enumerate(rows):
        scores, data = found[one["id"], "edited"]
        alone = editor.edit(picture(2 * i), one["instruction"], seed=row_seed(5, one["id"]), steps=2)
        edited = _pixels(data)
        assert np.abs(edited - np.asarray(alone.image).astype(int)).max() <= 2
        goal = np.asarray(picture(2 * i + 1)).astype(int)
        assert scores["l1"] == pytest.approx(np.abs(edited - goal).mean() / 255, rel=1e-5)
        assert (scores["status"], scores["instruction"]) == ("ok", one["instruction"])
        assert scores["expressive"] == alone.expressive


def test_the_baselines_are_the_input_and_the_goal_through_the_vae(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 2)
    found = _score(write_manifest(tmp_path, rows), scoring_plan())
    bundle = open_bundle("random")
    renderer, settings = bundle.load_renderer(device="cpu"), bundle.config.defaults
    for i, one in enumerate(rows):
        source, goal = (np.asarray(picture(2 * i + k)).astype(int) for k in (0, 1))
        copied, data = found[one["id"], COPY]
        assert data is None
        assert copied["l1"] == pytest.approx(np.abs(source - goal).mean() / 255, rel=1e-5)
        ceiling, data = found[one["id"], CEILING]
        assert data is None
        framing = renderer.framing((64, 48), settings)
        with torch.no_grad():
            latents = renderer.vae.autoencoder.encode(to_work(picture(2 * i + 1), framing)[None]).latent_dist.mode()
            back = from_work(renderer.vae.autoencoder.decode(latents).sample[0], framing)
        assert ceiling["l1"] == pytest.approx(np.abs(np.asarray(back).astype(int) - goal).mean() / 255, abs=1e-4)
        assert ceiling["l1"] > 0.01


def test_copying_the_input_is_perfect_where_nothing_is_to_be_done(tmp_path: Path) -> None:
    uri, mask = write_png(tmp_path, "a", picture(0)), write_png(tmp_path, "m", picture(1))
    rows = [row(i, source=uri, goal=uri, mask=mask, source_caption="a", goal_caption="b") for i in range(2)]
    networks = {"clip": str(write_clip(tmp_path / "clip")), "dino": str(write_dino(tmp_path / "dino"))}
    found = _score(write_manifest(tmp_path, rows), scoring_plan(networks=networks))
    expected = {
        "l1": 0, "l2": 0, "psnr": MAX_PSNR_DB, "ssim": 1, "clip_i": 1, "dino": 1,
        "inside_l1": 0, "background_l1": 0, "background_l2": 0, "background_psnr": MAX_PSNR_DB,
    }  # fmt: skip
    for one in rows:
        copied, _ = found[one["id"], COPY]
        assert {name: copied[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert "lpips" not in copied
        assert "clip_t" in copied


def test_a_mask_means_its_transparent_part_or_where_nothing_is_its_white_one(tmp_path: Path) -> None:
    """MagicBrush publishes the photo with a hole, now and then of another size than the photo; others white on black."""
    source, goal = picture(0), picture(1)
    left = Image.new("L", (64, 48), 0)
    left.paste(255, (0, 0, 32, 48))
    hole = source.copy()
    hole.putalpha(ImageChops.invert(left))
    masks = {"white": left, "hole": hole, "large hole": hole.resize((128, 96), Image.Resampling.NEAREST)}
    uris = {name: write_png(tmp_path, name, image) for name, image in {"a": source, "b": goal, **masks}.items()}
    rows = [row(i, source=uris["a"], goal=uris["b"], mask=uris[name]) for i, name in enumerate(masks)]
    found = _score(write_manifest(tmp_path, rows), scoring_plan())
    errors = np.abs(np.asarray(source).astype(int) - np.asarray(goal)) / 255
    for one in rows:
        copied, _ = found[one["id"], COPY]
        assert copied["inside_l1"] == pytest.approx(errors[:, :32].mean(), rel=1e-5)


def test_each_turn_starts_from_the_result_of_the_one_before(tmp_path: Path) -> None:
    three, one = session_rows(tmp_path, "s", [1, 2, 3]), session_rows(tmp_path, "t", [1])
    found = _score(write_manifest(tmp_path, [*three, *one]), scoring_plan(batch_size=1), protocol="multi-turn")
    editor = Editor.load("random", device="cpu")
    image = Image.open(tmp_path / three[0]["source"])
    for turn in three:
        image = editor.edit(image, turn["instruction"], seed=row_seed(0, turn["id"]), steps=2).image
    scores, data = found[three[2]["id"], "edited"]
    assert (_pixels(data) == np.asarray(image)).all()  # in batches of one, as the editor's
    goal = np.asarray(Image.open(tmp_path / three[2]["goal"])).astype(int)
    assert scores["l1"] == pytest.approx(np.abs(_pixels(data) - goal).mean() / 255, rel=1e-5)
    first = np.asarray(Image.open(tmp_path / three[0]["source"])).astype(int)
    assert found[three[2]["id"], COPY][0]["l1"] == pytest.approx(np.abs(first - goal).mean() / 255, rel=1e-5)
    assert "inside_l1" not in scores
    assert "inside_l1" in found[one[0]["id"], "edited"][0]


def test_a_row_that_cannot_be_scored_says_why_in_every_setting(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 4)
    rows[0]["goal"] = "images/none.png"
    (tmp_path / rows[1]["goal"]).write_bytes(b"broken")
    rows[2]["source"] = "../x"
    found = _score(write_manifest(tmp_path, rows), scoring_plan())
    for one, code in zip(rows, ("missing_file", "bad_image", "bad_row"), strict=False):
        for setting in (COPY, CEILING, "edited"):
            scores, data = found[one["id"], setting]
            assert (scores["status"], rejection_code(scores["reason"])) == ("rejected", code)
            assert data is None
            assert "l1" not in scores
    assert found[rows[3]["id"], "edited"][0]["status"] == "ok"


def test_an_edit_that_fails_leaves_the_baselines(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 2)
    rows[0]["instruction"] = "make it " + "very " * 5000 + "dark"  # too long for the model
    found = _score(write_manifest(tmp_path, rows), scoring_plan())
    assert rejection_code(found[rows[0]["id"], "edited"][0]["reason"]) == "edit_failed"
    assert found[rows[0]["id"], COPY][0]["status"] == "ok"
    assert found[rows[1]["id"], "edited"][0]["status"] == "ok"


def test_a_sweep_edits_with_each_scale(tmp_path: Path) -> None:
    rows = drawn_rows(tmp_path, 1)
    settings = {f"image guidance {s:g}": {"steps": 2, "image_guidance_scale": s} for s in (1.0, 3.0)}
    found = _score(write_manifest(tmp_path, rows), scoring_plan(settings=settings, has_ceiling=False))
    first, second = (_pixels(found[rows[0]["id"], name][1]) for name in settings)
    assert (first != second).any()
    editor = Editor.load("random", device="cpu")
    seed = row_seed(0, rows[0]["id"])
    alone = editor.edit(picture(0), rows[0]["instruction"], seed=seed, steps=2, image_guidance_scale=3.0)
    assert np.abs(second - np.asarray(alone.image).astype(int)).max() <= 2


def _scored_results(folder: Path, rows: list[dict[str, Any]], results: dict[int, str]) -> dict[int, dict[str, Any]]:
    """Scores of results that are there already, by id."""
    images = open_folder(folder)
    planned = read_rows(
        open_folder(write_manifest(folder, rows)), split="all", max_rows=None, protocol="single-turn", gives_expressive=False
    )  # fmt: skip
    planned = [one | {"edited": results[one["id"]]} for one in planned]
    plan = scoring_plan(bundle=None, settings={"edited": {}}, has_ceiling=False, scorer=WORLD)
    scored = ScoreEdits(plan)(FetchPictures(images, images)(to_table(planned, PLANNED_SCHEMA)))
    found = {one["id"]: one for one, _ in scored if one["setting"] == "edited"}
    assert {number: one["edited"] for number, one in found.items()} == results
    return found


def test_of_the_tiny_world_the_right_thing_must_have_changed_and_nothing_else(tmp_path: Path) -> None:
    rows, samples = world_rows(tmp_path, range(12))
    goals = _scored_results(tmp_path, rows, {one["id"]: one["goal"] for one in rows})
    copies = _scored_results(tmp_path, rows, {one["id"]: one["source"] for one in rows})
    assert sum(one["object_check"] for one in goals.values()) >= 11
    assert sum(one["object_check"] for one in copies.values()) <= 1
    for one, sample in zip(rows, samples, strict=True):
        inside = np.abs(sample.source_pixels.astype(int) - sample.goal_pixels)[sample.changed].mean() / 255
        assert copies[one["id"]]["inside_l1"] == pytest.approx(inside, rel=1e-5)
        assert copies[one["id"]].get("background_l1", 0) == 0  # none where all of the picture changes
        assert goals[one["id"]]["inside_l1"] == 0
        assert "states_change" not in goals[one["id"]]  # nobody said anything


def test_of_the_tiny_world_the_words_must_state_the_change(tmp_path: Path) -> None:
    rows, samples = world_rows(tmp_path, range(4))
    for one, sample in zip(rows, samples, strict=True):
        one["expressive"] = sample.expressive
    rows[3]["expressive"] = "Something will be different."
    found = _score(write_ledger(tmp_path, rows), scoring_plan(scorer=WORLD), words=True)
    assert [found[one["id"], "edited"][0]["states_change"] for one in rows] == [1, 1, 1, 0]
    assert found[rows[0]["id"], "edited"][0]["expressive"] == samples[0].expressive
    assert "states_change" not in found[rows[0]["id"], COPY][0]


def test_a_sample_that_the_world_draws_otherwise_today_is_refused(tmp_path: Path) -> None:
    rows, _ = world_rows(tmp_path, range(2))
    rows[0]["instruction"] = "something else"
    found = _score(write_manifest(tmp_path, rows), scoring_plan(scorer=WORLD))
    assert "of the tiny world is another edit in this version" in found[rows[0]["id"], COPY][0]["reason"]
    assert found[rows[1]["id"], COPY][0]["status"] == "ok"
