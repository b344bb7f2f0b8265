"""How fast the summarize job's stages are, against the published way: a loop over rows, one at a time.

    python benchmarks/summarize.py                                        tiny models, this machine's CPU
    python benchmarks/summarize.py --describe-model BUNDLE --summarize-model BUNDLE --num-gpus 0.5 --dtype bfloat16

The loop is plain code: read an image, describe, summarise, next row; every description is written to its end, as in
the published notebook. The same rows then go through the same models in larger batches, still one stage after the
other and without Ray, to tell what batching and early stopping give; then through the job. Models are loaded before
the clocks start; the job's rate is taken from its first written block to its last. All outputs must be equal.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from ray.data import DataContext

from mgie.data.ledger import read_ledger, read_manifest
from mgie.images.files import read_image
from mgie.storage.folder import Folder, open_folder
from mgie.tiny.world import write_layout
from pipelines.prepare import PrepareConfig, prepare
from pipelines.runs.cluster import StageSize, start_ray
from pipelines.stages.local_describers import BundleDescriber
from pipelines.stages.summarizer import Summarizer
from pipelines.summarize import SummarizeConfig, make_describer, make_summarizer, summarize

Texts = dict[int, tuple[str, str]]


def loop(rows: Sequence[tuple[int, bytes, str]], describer: BundleDescriber, summarizer: Summarizer) -> Texts:
    """The published way."""
    texts = {}
    for row_id, data, instruction in rows:
        [description] = describer.describe([read_image(data)], [instruction])
        [(expressive, _, _)] = summarizer.summarize([description.text])
        texts[row_id] = (description.text, expressive)
    return texts


def batched(
    rows: Sequence[tuple[int, bytes, str]], describer: BundleDescriber, summarizer: Summarizer, *, batch_size: int
) -> Texts:
    """The same, several rows per model call."""
    texts: Texts = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        images: list[Image.Image] = [read_image(data) for _, data, _ in part]
        verbose = [found.text for found in describer.describe(images, [instruction for *_, instruction in part])]
        for (row_id, *_), text, (expressive, _, _) in zip(part, verbose, summarizer.summarize(verbose), strict=True):
            texts[row_id] = (text, expressive)
    return texts


def timed(work: Callable[[], Texts], num_rows: int) -> tuple[Texts, float]:
    """Result and rows per second."""
    started = time.perf_counter()
    texts = work()
    return texts, num_rows / (time.perf_counter() - started)


def from_ledger(out: Folder) -> Texts:
    """What the job wrote."""
    columns = ["id", "verbose", "expressive"]
    rows = pa.Table.from_batches(read_ledger(out, columns=columns)).to_pylist()
    return {row["id"]: (row["verbose"], row["expressive"]) for row in rows}


def steady_rate(out: Folder) -> float:
    """Rows per second between the first written block and the last."""
    files = sorted(Path(out.path).glob("part-*.parquet"), key=lambda path: path.stat().st_mtime)
    rows = sum(pq.read_metadata(path).num_rows for path in files[1:])
    return rows / (files[-1].stat().st_mtime - files[0].stat().st_mtime)


def share_equal(texts: Texts, expected: Texts) -> float:
    """Share of the rows whose texts are equal."""
    assert texts.keys() == expected.keys(), "rows are missing"
    return sum(texts[row_id] == expected[row_id] for row_id in expected) / len(expected)


def main() -> None:
    """Measures, prints, asserts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--reference-rows", type=int, default=32, help="rows of the loop, which is slow")
    parser.add_argument("--rows-per-commit", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--describe-model", default="tiny-llava")
    parser.add_argument("--summarize-model", default="random-summarizer")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="of a description")
    parser.add_argument("--num-gpus", type=float, default=0.0, help="of each stage's actor")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the loop is bound by calls, not by sums; the job's actors have one thread each, too
    device = "cuda" if args.num_gpus else "cpu"
    size = StageSize(num_cpus=0.5, num_gpus=args.num_gpus, batch_size=args.batch_size)
    with tempfile.TemporaryDirectory(prefix="mgie-bench-") as folder:
        write_layout("ipr2pr", Path(folder) / "raw", args.rows)
        start_ray()
        DataContext.get_current().wait_for_min_actors_s = 600
        prepared = prepare(PrepareConfig(input=f"{folder}/raw", out=f"{folder}/prepared"))
        config = SummarizeConfig(
            manifest=prepared.manifest,
            out=f"{folder}/ledger",
            describe_model=args.describe_model,
            summarize_model=args.summarize_model,
            describe_max_new_tokens=args.max_new_tokens,
            rows_per_commit=args.rows_per_commit,
            describe=size,
            summarize=size,
            device=device,
            dtype=args.dtype,
        )
        where, columns = open_folder(prepared.manifest), ["id", "source", "instruction"]
        manifest = pa.Table.from_batches(read_manifest(where, columns=columns)).to_pylist()
        rows = [
            (row["id"], (Path(folder) / "raw" / row["source"]).read_bytes(), row["instruction"]) for row in manifest
        ]
        few = rows[: args.reference_rows]

        eager, summarizer = make_describer(config), make_summarizer(config)
        full = BundleDescriber(
            args.describe_model, max_new_tokens=args.max_new_tokens, stop_early=False, device=device, dtype=args.dtype
        )
        loop(few[:1], full, summarizer)  # warm
        rates = {}
        expected, rates["loop, as published"] = timed(partial(loop, few, full, summarizer), len(few))
        for name, describer, batch_size in (
            ("loop, early stop", eager, 1),
            ("batches, as published", full, args.batch_size),
            ("batches, early stop", eager, args.batch_size),
        ):
            work = partial(batched, few, describer, summarizer, batch_size=batch_size)
            texts, rates[name] = timed(work, len(few))
            print(f"{name}: {rates[name]:.2f} rows/s; {share_equal(texts, expected):.1%} of texts equal", flush=True)
        outcome = summarize(config)
        out = open_folder(config.out)
        written = from_ledger(out)
        assert len(written) == outcome.report["rows"], "rows were rejected"
        equal = share_equal({row_id: written[row_id] for row_id in expected}, expected)
        rates["job"] = steady_rate(out)
        ray.shutdown()
    for name, rate in rates.items():
        print(f"{name:24} {rate:8.2f} rows/s  {rate / rates['loop, as published']:6.2f}x")
    print(
        f"job with start: {outcome.report['rows']} rows in {outcome.report['seconds']:.1f} s; {equal:.1%} of texts equal"
    )
    assert equal == 1.0, "the job's outputs differ from the loop's"
    result = {
        "name": "summarize",
        "unit": "rows/s",
        "ours": round(rates["job"], 3),
        "reference": round(rates["loop, as published"], 3),
        "ratio": round(rates["job"] / rates["loop, as published"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
