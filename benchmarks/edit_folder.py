"""A folder of photos as `mgie edit` makes it, in batches against one at a time.

    python benchmarks/edit_folder.py [--photos 32] [--batch 8] [--rounds 3] [--bundle tiny] [--device auto]

Draws photos of two shapes as JPEG files, loads the bundle once, then runs the command's own path (read, check, derive,
render, write) over the whole folder at batch 1 and at `--batch` in turns. Figures are medians of the rounds; results of
the two ways are compared pixel by pixel. On a CPU one thread works and its processor time counts, which is the time on
the clock where nobody else works: others' work on a shared machine does not change it.

The last line is JSON: edits per second in batches, and one at a time.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mgie.cli
from mgie.editor import Editor
from mgie.images.geometry import resize
from mgie.tiny.world import make_sample

SHAPES = ((1024, 768), (768, 1024))  # photos as cameras give them, smaller; three of four lie


def draw_photos(folder: Path, count: int) -> None:
    """Scenes of the tiny world, as JPEG files."""
    folder.mkdir()
    for i in range(count):
        scene = make_sample(0, "test", i, side_px=128).source
        resize(scene, SHAPES[i % 4 == 3]).save(folder / f"{i:03d}.jpg", quality=90)


def main() -> None:
    """Parses the arguments, prints a row per way."""
    parser = argparse.ArgumentParser(description="mgie edit on a folder: batches against one at a time.")
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    editor = Editor.load(given.bundle, device=given.device)
    Editor.load = lambda *_, **__: editor  # type: ignore[method-assign]  # loading is not the question
    clock = time.perf_counter
    if editor.renderer.device.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    seconds: dict[int, list[float]] = {1: [], given.batch: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        draw_photos(folder, given.photos)
        for number in range(given.rounds + 1):  # the first warms up
            for batch, taken in seconds.items():
                out = Path(scratch) / f"batch-{batch}"
                started = clock()
                with redirect_stdout(io.StringIO()):
                    status = mgie.cli.edit(
                        folder,
                        ("make it night",),
                        flags={"out": out, "seed": 1},
                        given={},
                        batch_size=batch,
                        bundle=given.bundle,
                        device=given.device,
                        overwrite=True,
                    )
                if status:
                    raise SystemExit(status)
                if number:
                    taken.append(clock() - started)
        far = max(
            int(np.abs(np.asarray(Image.open(path), dtype=int) - np.asarray(Image.open(other), dtype=int)).max())
            for path, other in zip(*(sorted((Path(scratch) / f"batch-{b}").iterdir()) for b in seconds), strict=True)
        )
    rates = {batch: given.photos / statistics.median(taken) for batch, taken in seconds.items()}
    for batch, rate in rates.items():
        print(f"batch {batch:3}  {rate:8.2f} edits/s  rounds {', '.join(f'{s:.1f} s' for s in seconds[batch])}")
    print(f"results differ by at most {far} of 255 levels")
    ours, reference = rates[given.batch], rates[1]
    print(
        json.dumps(
            {
                "name": "edit_folder",
                "unit": "edits/s",
                "ours": round(ours, 2),
                "reference": round(reference, 2),
                "ratio": round(ours / reference, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
