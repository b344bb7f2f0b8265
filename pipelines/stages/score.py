"""The scoring stage: rows with goals -> edited images and one row of scores per setting. Plain Python, no Ray.

A row on its way is a planned row (`PLANNED_SCHEMA`) with the bytes of its images. It may be a chain of edits: each
after the first starts from the result of the one before, and only the last result is scored. What cannot be done
for a row is told in the `reason` of its scores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from PIL import Image

from mgie.bundle.devices import resolve_device
from mgie.data.ledger import RejectionCode, rejection, to_table
from mgie.errors import DataError, ImageError
from mgie.evaluation.network_files import find_network
from mgie.evaluation.perceptual import load_networks
from mgie.evaluation.scorer import Comparison, Scorer
from mgie.images.files import read_image
from mgie.images.pictures import load_mask
from pipelines.stages.edit import EditImages
from pipelines.stages.fetch import EDIT_ROW_SCHEMA
from pipelines.stages.score_rows import CEILING, COPY, IMAGES, ScoringPlan, open_scorer
from pipelines.stages.seeds import row_seed


@dataclass(kw_only=True)
class _Result:
    """What a setting makes of a row."""

    image: Image.Image
    "picture as far as the chain of edits has come"
    data: bytes | None = None
    "the same, encoded"
    expressive: str | None = None
    reason: str | None = None


@dataclass(kw_only=True)
class _Case:
    """A row with its images decoded."""

    row: Mapping[str, Any]
    source: Image.Image
    goal: Image.Image
    mask: Image.Image | None
    edited: Image.Image | None
    turns: Sequence[Mapping[str, Any]]
    results: dict[str, _Result] = field(default_factory=dict)


class ScoreEdits:
    """Edits rows by every setting and scores the results and the baselines.

    Raises:
        BundleError, ConfigError: Bundle or networks cannot be used, a setting is not allowed, or the device is not there.
    """

    def __init__(self, plan: ScoringPlan) -> None:
        self._plan = plan
        networks = {name: find_network(where) for name, where in plan.networks.items()}
        self._scorer = Scorer(load_networks(networks, resolve_device(plan.device)), batch_size=plan.batch_size)
        self._row_scorer = open_scorer(plan.scorer)
        self._editor: EditImages | None = None
        if plan.bundle is not None:
            self._editor = EditImages(
                plan.bundle,
                settings={},
                output_format="png",
                batch_size=plan.batch_size,
                device=plan.device,
                dtype=plan.dtype,
            )

    def __call__(self, table: pa.Table) -> list[tuple[dict[str, Any], bytes | None]]:
        """Rows of `SCORES_SCHEMA`, each with its encoded image where it was made here; its URI is the caller's."""
        scored: list[tuple[dict[str, Any], bytes | None]] = []
        cases = []
        for row in table.to_pylist():
            try:
                cases.append(_open(row))
            except _RejectedError as refused:
                scored += [(_score_row(row, name, reason=refused.reason), None) for name in self._plan.names]
        for case in cases:
            case.results[COPY] = _Result(image=case.source)
            if self._plan.has_ceiling:
                assert self._editor is not None
                case.results[CEILING] = _Result(image=self._editor.reconstruct(case.goal))
        for name, settings in self._plan.settings.items():
            self._edit(cases, name, settings)
        done = [(case, name, case.results[name]) for case in cases for name in self._plan.names]
        good = [(case, result) for case, _, result in done if result.reason is None]
        measured = iter(self._scorer([_comparison(case, result) for case, result in good]))
        for case, name, result in done:
            scores = next(measured) | self._score_by_facts(case, result) if result.reason is None else {}
            if result.reason is not None:
                scores, result.data = {}, None
            row = _score_row(case.row, name, reason=result.reason) | scores | {"expressive": result.expressive}
            scored.append((row, result.data))
        return scored

    def _score_by_facts(self, case: _Case, result: _Result) -> dict[str, float]:
        """What the scorer that was named says; a row that it cannot score gets a reason."""
        if self._row_scorer is None or len(case.turns) > 1:  # facts are those of the last turn alone
            return {}
        facts, instruction = json.loads(case.row["facts"]), case.turns[0]["instruction"]
        try:
            return dict(self._row_scorer(facts, instruction, result.image, result.expressive))
        except DataError as error:
            result.reason = rejection("bad_row", str(error))
            return {}

    def _edit(self, cases: Sequence[_Case], name: str, settings: Mapping[str, Any]) -> None:
        """Fills the results of one setting, turn by turn."""
        for case in cases:
            case.results[name] = _Result(image=case.edited or case.source)
        if self._editor is None:
            return
        self._editor.use(settings)
        for turn in range(max((len(case.turns) for case in cases), default=0)):
            active = [case for case in cases if turn < len(case.turns) and case.results[name].reason is None]
            rows = [_edit_row(case.turns[turn], case.results[name].image, self._plan.seed) for case in active]
            edited = self._editor(to_table(rows, EDIT_ROW_SCHEMA)).to_pylist()
            for case, row in zip(active, edited, strict=True):
                result = case.results[name]
                result.reason, result.data, result.expressive = row["reason"], row["data"], row["expressive"]
                if result.data is not None:
                    result.image = read_image(result.data)


class _RejectedError(Exception):
    """A row cannot be scored at all."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _open(row: Mapping[str, Any]) -> _Case:
    """Raises _RejectedError."""
    if row["reason"] is not None:
        raise _RejectedError(row["reason"])
    images: dict[str, Image.Image | None] = {}
    for name in IMAGES:
        data = row[f"{name}_data"]
        try:
            images[name] = None if data is None else load_mask(data) if name == "mask" else read_image(data)
        except ImageError as error:
            raise _rejected("bad_image", f"{name}: {error}") from error
    source, goal = images["source"], images["goal"]
    if source is None or goal is None:
        raise _rejected("bad_row", "the row has no goal")
    return _Case(
        row=row,
        source=source,
        goal=goal,
        mask=images["mask"],
        edited=images["edited"],
        turns=json.loads(row["turns"]),
    )


def _rejected(code: RejectionCode, what: str) -> _RejectedError:
    return _RejectedError(rejection(code, what))


def _edit_row(turn: Mapping[str, Any], image: Image.Image, seed: int) -> dict[str, Any]:
    """A row of `EDIT_ROW_SCHEMA`."""
    return {
        "id": turn["id"],
        "image": "",  # it does not come from a file
        "instruction": turn["instruction"],
        "given": turn["expressive"],
        "seed": row_seed(seed, turn["id"]),
        "attempt": 1,
        "status": "rejected",
        "pixels": image.tobytes(),
        "width": image.width,
        "height": image.height,
    }


def _score_row(row: Mapping[str, Any], name: str, *, reason: str | None) -> dict[str, Any]:
    columns = ("id", "attempt", "source", "goal", "facts")
    return {
        **{column: row[column] for column in columns},
        "setting": name,
        "status": "ok" if reason is None else "rejected",
        "reason": reason,
        "edited": None if name in (COPY, CEILING) else row["edited"],
        "instruction": json.loads(row["turns"])[-1]["instruction"],
    }


def _comparison(case: _Case, result: _Result) -> Comparison:
    return Comparison(
        source=case.source,
        goal=case.goal,
        edited=result.image,
        mask=case.mask,
        source_caption=case.row["source_caption"],
        goal_caption=case.row["goal_caption"],
    )
