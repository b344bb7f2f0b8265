#!/usr/bin/env python
"""The paper's comparison in miniature: ip2p, ft, fz, lgie, e2e, and e2e without L_ins, on held-out edits of the tiny world.

    python -m pipelines.compare --work out/tiny --results docs/results

All variants begin with the InstructPix2Pix of `make tiny` (fz: that is all it is), train on the same rows in the same
order for the same number of steps, and edit the same held-out photos with the same noise. Stages as in
`pipelines/tiny.py`, whose folder is read and gone on with. Writes `comparison.json`, `comparison.md` and
`comparison.svg`: means with bootstrap intervals, and those of differences, which are taken row by row.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from mgie.data.ledger import read_latest
from mgie.errors import ConfigError, DataError
from mgie.evaluation.bootstrap import LEVEL, Interval, bootstrap_means
from mgie.storage.folder import open_folder
from pipelines import tiny
from pipelines.reports.compare import METRICS, Comparison, Group, markdown, plot
from pipelines.runs.command import Ending, run_command
from pipelines.runs.config_file import write_config
from pipelines.runs.recipe import Stage, make
from pipelines.stages.score_rows import scores_schema

VARIANTS = ("ip2p", "ft", "fz", "lgie", "e2e", "e2e without L_ins")
CLAIMS = (("e2e", "ft"), ("ft", "fz"), ("e2e", "lgie"), ("lgie", "ip2p"), ("e2e", "ip2p"), ("e2e", "e2e without L_ins"))
"""The paper's orderings: the first is better than the second."""
_SHOWN = ("l1", "inside_l1", "background_l1", "ssim", "object_check", "states_change")
_COPY, _EDITED = "copy", "edited"
_GIVES_EXPRESSIVE = ("ft", "fz")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Trains the variants, scores them, writes the comparison."""

    work: Path = Path("out/tiny")
    "folder of `make tiny`"
    results: Path = Path("docs/results")
    "where tables and plot go"
    steps: int = 2000
    "training steps of each variant"
    seeds: int = 1
    "runs of each variant"
    rows: int = 1000
    "held-out edits"
    share: float = 1.0
    "share of the recipe's samples and steps, as given to `make tiny`"
    shipped: bool = False
    "begin with the VAE, LLaVA and Flan-T5 that ship, which takes hours less than training them first"
    parallel: int = 2
    "stages at a time, one CPU each"

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "rows", "parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1", param=name)


def stages(config: CompareConfig) -> dict[str, Stage]:
    """The recipe's stages and those of the comparison."""
    found = {**tiny.STAGES, **tiny.held_out(str(config.rows))}
    if config.shipped:
        found = tiny.with_shipped(found)
    for seed in range(config.seeds):
        for variant in VARIANTS:
            bundle = "ip2p-bundle"
            if variant != "fz":
                name = _name("train", variant, seed)
                found[name] = _training(variant, seed, config.steps)
                bundle = _name("bundle", variant, seed)
                found[bundle] = tiny.export(name, variant.replace(" ", "-"))
            gives = ("--give-expressive",) if variant in _GIVES_EXPRESSIVE else ()
            found[_name("scores", variant, seed)] = tiny.scoring(bundle, *gives, "--no-ceiling", "--seed", str(seed))
    return found


def _training(variant: str, seed: int, steps: int) -> Stage:
    start = "ip2p-bundle" if variant in ("ip2p", "ft") else "mgie-start"
    without = ("--training.objective.instruction-weight", "0.0") if variant == "e2e without L_ins" else ()
    return tiny.training(
        variant.split(" ", maxsplit=1)[0], start, str(steps), "--training.seed", str(seed),
        "--training.micro-batch", "16", "--training.optimizer.lr-unet", "5e-4", *without, rows="ledger",
    )  # fmt: skip


def _name(what: str, variant: str, seed: int) -> str:
    return f"{what}-{variant.replace(' ', '-')}-{seed}"


def compare(folders: Mapping[str, Path], config: CompareConfig) -> Comparison:
    """Means, and differences row by row, of what the scoring stages found.

    Raises:
        DataError: Variants were scored on different rows.
    """
    scores = {
        variant: [_read(folders[_name("scores", variant, seed)] / "scores") for seed in range(config.seeds)]
        for variant in VARIANTS
    }
    some = scores["e2e"][0]
    ids = sorted(some)
    if any(sorted(one) != ids for runs in scores.values() for one in runs):
        raise DataError("the variants were scored on different rows; make their stages again")
    facts = [json.loads(some[i][_EDITED]["facts"]) for i in ids]
    groups = {"all": np.ones(len(ids), dtype=bool)}
    groups["ambiguous"] = np.array([bool(fact["is_ambiguous"]) for fact in facts])
    groups["not ambiguous"] = ~groups["ambiguous"]
    for family in sorted({fact["family"] for fact in facts}):
        groups[family] = np.array([fact["family"] == family for fact in facts])
    found = []
    for name, chosen in groups.items():
        for metric in _SHOWN:
            values = {v: np.mean([_column(run, ids, metric) for run in runs], axis=0) for v, runs in scores.items()}
            values = {"copy": _column(some, ids, metric, setting=_COPY), **values}
            found.append(_group(name, metric, {v: column[chosen] for v, column in values.items()}))
    settings = {name: getattr(config, name) for name in ("steps", "seeds", "share", "shipped")} | {"level": LEVEL}
    return Comparison(settings=settings, rows=len(ids), groups=tuple(found))


def _group(name: str, metric: str, values: Mapping[str, npt.NDArray[np.float64]]) -> Group:
    sign = 1.0 if METRICS[metric].is_higher_better else -1.0
    differences = {f"{a} > {b}": sign * (values[a] - values[b]) for a, b in CLAIMS}
    columns = {**values, **differences}
    intervals = bootstrap_means(np.stack(list(columns.values()), axis=1), seed=0)
    means: dict[str, Interval | None] = dict(zip(columns, intervals, strict=True))
    return Group(
        name=name,
        metric=metric,
        rows=len(next(iter(values.values()))),
        means={v: means[v] for v in values},
        gains={claim: means[claim] for claim in differences},
    )


def _read(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Score rows by id and setting; those that could not be scored are left out."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in read_latest(open_folder(folder), scores_schema(METRICS), key=("id", "setting")).to_pylist():
        if row["status"] == "ok":
            found.setdefault(row["id"], {})[row["setting"]] = row
    return found


def _column(
    run: Mapping[int, Mapping[str, Mapping[str, Any]]], ids: Sequence[int], metric: str, *, setting: str = _EDITED
) -> npt.NDArray[np.float64]:
    values = (run[i][setting][metric] for i in ids)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _run(config: CompareConfig, *, console: Console) -> Ending:
    write_config(open_folder(config.results), config)
    places = make(
        stages(config), config.work.resolve(), share=config.share, parallel=config.parallel, console=console,
        until=[_name("scores", variant, seed) for variant in VARIANTS for seed in range(config.seeds)],
    )  # fmt: skip
    comparison = compare(places, config)
    (config.results / "comparison.json").write_text(json.dumps(comparison.as_json(), indent=1) + "\n")
    (config.results / "comparison.md").write_text(markdown(comparison))
    (config.results / "comparison.svg").write_text(plot(comparison))
    return Ending(said=f"comparison: {config.results / 'comparison.md'}")


def main() -> int:
    """The recipe as a command; returns the exit status."""
    return run_command(CompareConfig, _run, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
