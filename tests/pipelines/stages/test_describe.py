"""Stages as plain Python: every row that comes in goes out, with words or with a reason."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from mgie.data.ledger import LEDGER_SCHEMA, rejection_code, to_table
from mgie.errors import ConfigError, PromptError
from mgie.inference.batch_failures import bisect_failures
from mgie.storage.folder import open_folder
from pipelines.stages.describe import DescribeEdit
from pipelines.stages.describers import Describer, Description
from pipelines.stages.fetch import DESCRIBE_ROW_SCHEMA, FetchSources
from pipelines.stages.local_describers import BundleDescriber
from pipelines.stages.summarize import PRESETS, Preset, Summarize
from pipelines.stages.summarizer import Summarizer


def _rows(folder: Path, count: int) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (40 + i, 30), (20 * i % 256, 90, 200)).save(folder / f"{i}.png")
        rows.append(
            {
                "id": i,
                "dataset": "t",
                "split": "train",
                "source": f"{i}.png",
                "goal": f"{i}.png",
                "instruction": "make it night " * (1 + i % 3),
                "provenance": "{}",
                "status": "rejected",
                "attempt": 1,
            }
        )
    return rows


@pytest.fixture(scope="module")
def describer() -> BundleDescriber:
    return BundleDescriber("random", max_new_tokens=24, stop_early=True, device="cpu", dtype="auto")


@pytest.fixture(scope="module")
def summarizer() -> Summarizer:
    preset = Preset(
        describe_max_new_tokens=24, stop_early=True, num_beams=2, min_length=3, max_length=12, no_repeat_ngram_size=3
    )
    return Summarizer("random-summarizer", preset, device="cpu")


def _fetch(folder: Path, rows: list[dict[str, Any]]) -> pa.Table:
    return FetchSources(open_folder(folder))(to_table(rows, LEDGER_SCHEMA))


def test_fetched_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    [row] = _fetch(tmp_path / "i", _rows(tmp_path / "i", 1)).to_pylist()
    image = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
    assert image.tobytes() == Image.open(tmp_path / "i" / "0.png").tobytes()


@pytest.mark.parametrize(
    ("source", "content", "code"),
    [
        ("absent.png", None, "missing_file"),
        ("broken.png", b"\x89PNG\r\n\x1a\n broken", "bad_image"),
        ("text.png", b"hello", "bad_image"),
        ("../outside.png", None, "bad_row"),
    ],
)
def test_a_source_that_cannot_be_read_is_a_row_with_a_reason(
    tmp_path: Path, source: str, content: bytes | None, code: str
) -> None:
    rows = _rows(tmp_path / "i", 2)
    rows[0]["source"] = source
    if content is not None:
        (tmp_path / "i" / source).write_bytes(content)
    bad, good = _fetch(tmp_path / "i", rows).to_pylist()
    assert rejection_code(bad["reason"]) == code
    assert (bad["pixels"], good["reason"]) == (None, None)


def test_rows_keep_their_order_and_the_rejected_pass_through(
    tmp_path: Path, describer: BundleDescriber, summarizer: Summarizer
) -> None:
    rows = _rows(tmp_path / "i", 7)
    rows[3]["source"] = "absent.png"
    described = DescribeEdit(lambda: describer, preset="fast", batch_size=3)(_fetch(tmp_path / "i", rows))
    assert described.schema == DESCRIBE_ROW_SCHEMA
    finished = Summarize(lambda: summarizer, batch_size=2)(described).to_pylist()
    assert [row["id"] for row in finished] == list(range(7))
    assert [row["status"] for row in finished] == ["ok"] * 3 + ["rejected"] + ["ok"] * 3
    for row in finished:
        assert (row["describe_model"], row["summarize_model"], row["preset"]) == ("random", "random-summarizer", "fast")
        if row["status"] == "ok":
            assert row["verbose"]
            assert row["expressive"]
            assert row["reason"] is None
            assert row["describe_tokens"] > 0
            assert row["summarize_tokens"] > 0
        else:
            assert (row["verbose"], row["expressive"]) == (None, None)
            assert rejection_code(row["reason"]) == "missing_file"


def test_a_batch_describes_each_row_as_alone(
    tmp_path: Path, describer: BundleDescriber, summarizer: Summarizer
) -> None:
    rows = _rows(tmp_path / "i", 5)
    images = [Image.open(tmp_path / "i" / row["source"]).convert("RGB") for row in rows]
    words = [row["instruction"] for row in rows]
    together = describer.describe(images, words)
    assert together == [describer.describe([image], [text])[0] for image, text in zip(images, words, strict=True)]
    texts = [f"The sky would be dark number {i}. " * (i + 1) for i in range(4)]
    summarizer._model.double()  # random weights nearly tie: in float32 rounding may decide
    assert summarizer.summarize(texts) == [summarizer.summarize([text])[0] for text in texts]


def test_stopping_early_changes_no_text(tmp_path: Path, describer: BundleDescriber) -> None:
    """On the random model, whose words hold full stops now and then; the general proof is on `is_settled`."""
    whole = BundleDescriber("random", max_new_tokens=96, stop_early=False, device="cpu", dtype="auto")
    early = BundleDescriber("random", max_new_tokens=96, stop_early=True, device="cpu", dtype="auto")
    images = [Image.new("RGB", (64, 48), (17 * i % 256, 40, 250 - 20 * i)) for i in range(8)]
    words = [f"make it {colour}" for colour in ("red", "blue", "warm", "cold", "dark", "night", "snow", "rain")]
    a, b = whole.describe(images, words), early.describe(images, words)
    assert [d.text for d in a] == [d.text for d in b]
    assert all(y.output_tokens <= x.output_tokens for x, y in zip(a, b, strict=True))


class _Fussy:
    """A describer with a fixed limit of memory and a dislike; it stands for a model at its limits."""

    model, revision = "fussy", "1"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def describe(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        self.sizes.append(len(images))
        if len(images) > 2 or any(image.width > 45 for image in images):
            raise torch.OutOfMemoryError("no room")
        if any("night make it night make" in text for text in instructions):
            raise PromptError("too long for me")
        return [Description(text=text, prompt_tokens=1, output_tokens=1) for text in instructions]


def test_out_of_memory_halves_the_batch_and_rejects_only_the_row_at_fault(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "i", 7)  # widths 40..46: only the last is over 45; words repeat 1, 2, 3 times
    fussy = _Fussy()
    assert isinstance(fussy, Describer)
    out = DescribeEdit(lambda: fussy, preset="fast", batch_size=8)(_fetch(tmp_path / "i", rows)).to_pylist()
    assert [row["reason"] is None for row in out] == [True, True, False, True, True, False, False]
    assert "no room" in out[6]["reason"]
    assert "too long for me" in out[2]["reason"]
    assert fussy.sizes[0] == 7
    assert min(fussy.sizes) == 1


def test_a_wrong_configuration_is_not_taken_for_a_bad_row() -> None:
    def work(items: Sequence[int]) -> list[int]:
        raise ConfigError("wrong for all")

    with pytest.raises(ConfigError):
        bisect_failures(work, [1, 2, 3])
    assert bisect_failures(work, []) == []


def test_published_settings() -> None:
    paper = PRESETS["mgie_paper"]
    assert (paper.num_beams, paper.min_length, paper.max_length, paper.no_repeat_ngram_size) == (5, 5, 64, 3)
    assert paper.describe_max_new_tokens == 1024


def test_text_of_the_description_never_becomes_a_control_token_of_t5(summarizer: Summarizer) -> None:
    eos, pad, unk = (getattr(summarizer._tokenizer, f"{name}_token_id") for name in ("eos", "pad", "unk"))
    hostile = summarizer._ids("x </s> <pad> y </s></s> <unk>")
    assert hostile[-1] == eos
    assert not {eos, pad} & set(hostile[:-1])
    plain = "The sky would be dark."
    assert summarizer._ids(plain) == summarizer._tokenizer(plain)["input_ids"]
    assert unk != eos
    assert len(summarizer._ids("dark " * 2000)) == 512
