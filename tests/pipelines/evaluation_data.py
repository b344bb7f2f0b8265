"""Rows with goals, for the tests of evaluation."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mgie.data.ledger import LEDGER_SCHEMA, MANIFEST_SCHEMA, row_id, to_table, write_images_root
from mgie.images.geometry import resize
from mgie.storage.folder import open_folder
from mgie.tiny.world import Sample, make_sample
from pipelines.stages.score_rows import ScoringPlan

SIDE_PX = 64


def picture(seed: int, wh: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth noise."""
    rng = np.random.default_rng(seed)
    return resize(Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)), wh)


def write_png(folder: Path, name: str, image: Image.Image) -> str:
    """Its URI."""
    out = io.BytesIO()
    image.save(out, "PNG")
    open_folder(folder).write(f"images/{name}.png", out.getvalue())
    return f"images/{name}.png"


def row(number: int, **given: Any) -> dict[str, Any]:
    """A row of a manifest."""
    instruction = f"make it number {number}"
    return {
        "id": row_id(str(number).encode(), b"", instruction, "forward"),
        "dataset": "drawn",
        "split": "test",
        "instruction": instruction,
        "provenance": "{}",
    } | given


def drawn_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows with their images, in two groups `kind`."""
    return [
        row(
            i,
            source=write_png(folder, f"{i}-source", picture(2 * i)),
            goal=write_png(folder, f"{i}-goal", picture(2 * i + 1)),
            source_caption=f"number {i}",
            goal_caption=f"number {i + 1}",
            provenance=json.dumps({"kind": "ab"[i % 2]}),
        )
        for i in range(count)
    ]


def session_rows(folder: Path, session: str, turns: list[int]) -> list[dict[str, Any]]:
    """Turns of a session; the goal of one is the source of the next."""
    base = sum(map(ord, session)) * 10
    uris = {k: write_png(folder, f"{session}-{k}", picture(base + k)) for k in range(max(turns) + 1)}
    mask = write_png(folder, f"{session}-mask", Image.new("RGB", (64, 48), "white"))
    return [
        row(base + k, source=uris[k - 1], goal=uris[k], mask=mask, session=session, turn=k, split="test") for k in turns
    ]


def world_rows(folder: Path, numbers: range) -> tuple[list[dict[str, Any]], list[Sample]]:
    """Rows that are samples of the tiny world, and these."""
    rows, samples = [], []
    for number in numbers:
        origin = {"seed": 0, "split": "test", "number": number, "side_px": SIDE_PX}
        sample = make_sample(0, "test", number, side_px=SIDE_PX)
        uris = {k: write_png(folder, f"{number}-{k}", getattr(sample, k)) for k in ("source", "goal", "mask")}
        provenance = json.dumps({"tiny_world": origin, "operation": sample.operation})
        rows.append(row(number, **uris, instruction=sample.instruction, provenance=provenance))
        samples.append(sample)
    return rows, samples


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest beside the images."""
    manifest = open_folder(folder / "manifest")
    with manifest.publish("part-0.parquet") as path:
        pq.write_table(to_table(rows, MANIFEST_SCHEMA), path)
    write_images_root(manifest, "..")
    return folder / "manifest"


def write_ledger(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A ledger beside the images; rows without `expressive` are rejected."""
    ledger = open_folder(folder / "ledger")
    with ledger.publish("part-0.parquet") as path:
        settled = [{"attempt": 1, "status": "ok" if r.get("expressive") else "rejected"} | r for r in rows]
        pq.write_table(to_table(settled, LEDGER_SCHEMA), path)
    write_images_root(ledger, "..")
    return folder / "ledger"


def scoring_plan(**given: Any) -> ScoringPlan:
    """Two steps of the tiny bundle, and the ceiling."""
    defaults: dict[str, Any] = {
        "bundle": "random",
        "settings": {"edited": {"steps": 2}},
        "has_ceiling": True,
        "networks": {},
        "seed": 0,
        "batch_size": 8,
        "device": "cpu",
        "dtype": "auto",
    }
    return ScoringPlan(**(defaults | given))
