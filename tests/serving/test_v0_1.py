"""A store of version 0.1.0, found by the code as it is now: jobs to be run, a job that was done, results that were kept.

The clock of the store stood at 1,800,000,000 s and goes on from there.
"""

import base64
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgie.config import ImageLimits
from mgie.images.files import read_image
from serving.edits.in_process import InProcessBackend
from serving.edits.results import ResultStore
from serving.errors import DamagedError, NotFoundError
from serving.jobs.record import Lease
from serving.jobs.store import JobStore
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.serving.jobs.conftest import ASYNC, Replicas
from tests.v0_1 import DATA, assert_same_picture, pixels_of

pytestmark = pytest.mark.slow

WRITTEN_S = 1_800_000_000.0
DONE, INTERRUPTED, QUEUED = (
    "6b49e1a05dfcc2bfef24cf421706fb0cca71c93c",
    "6b49e1a1df7078598d0e5c16d1e163894a3b7467",
    "6b49e1a2a3378cb80fed0aacea306bb571747a22",
)
ENDS = {
    QUEUED: ("queued", "d070ee41a1776577b8cc5267dc832b54ec2e0c5692c4e2352c763fb71a8c30f1"),
    INTERRUPTED: ("interrupted", "f3b9a5cbc21e8d1f032326ccb7063e9a0d4265ff3e0c417707fe24409829e139"),
}
KEPT = {
    "kept-of-v0-1": "158d6aa59819d9e39732e8397de86cb40a0d0f1c72324ada05badf21cdc7c991",
    "kept-of-v0-1:0": "158d6aa59819d9e39732e8397de86cb40a0d0f1c72324ada05badf21cdc7c991",
    "kept-of-v0-1:1": "f5c5599a12a4033b6869bfe813b4aa2450f82f561a1f8b4c233d17411b3cc371",
    DONE: "4822557c09bd3898f8e00f34e49afd21a8d74652283fdde979d72154e83fca08",
}
DONE_FILE = "c82a3a5780d57f967ec2dffc340bd3a7fb753f5e0d55072d696b208e6fb91693"
BUNDLE = "5242df45c112e361"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(DATA / "store", tmp_path / "store"))


@pytest.fixture
def replicas(mllm: MLLMStage, diffusion: DiffusionStage, store: Path) -> Iterator[Replicas]:
    """Over the copy, a minute later: no lease holds any more."""
    opened = Replicas(InProcessBackend(mllm, diffusion), str(store))
    opened.clock.now_s = WRITTEN_S + 60
    yield opened
    opened.close()


def _jobs(replicas: Replicas) -> JobStore:
    return JobStore(replicas.artifacts(), limits=ImageLimits())


def test_the_records_of_jobs_say_what_they_said(replicas: Replicas) -> None:
    jobs = _jobs(replicas)
    assert [place.job_id for place in jobs.line()] == [INTERRUPTED, QUEUED]

    queued = jobs.get(QUEUED).record
    assert (queued.status, queued.attempts, queued.lease, queued.order.priority) == ("queued", 0, None, "batch")
    assert (queued.order.created_s, queued.order.ends_s) == (WRITTEN_S + 2, WRITTEN_S + 3602)
    photo, mask = jobs.pictures(jobs.get(QUEUED))
    assert photo == (DATA / "job_request" / "photo.png").read_bytes()
    assert mask == (DATA / "job_request" / "mask.png").read_bytes()
    call = queued.order.edit_call(image=photo, mask=mask, deadline=0.0).options
    assert (call.instruction, call.seed, call.overrides) == ("remove the house", 13, {"steps": 3})
    assert (call.deterministic, call.keeps_lossless, call.output_format) == (True, True, "png")

    interrupted = jobs.get(INTERRUPTED).record
    assert (interrupted.status, interrupted.attempts, interrupted.num_steps) == ("rendering", 1, 60)
    assert interrupted.lease == Lease(holder="01a1e1ea305e79c2", until_s=WRITTEN_S + 2)

    done = jobs.get(DONE).record
    assert (done.status, done.has_ended, done.step) == ("done", True, 3)
    assert done.results == ["6b49e1a08526f582dbf02f1136221e5fb3510032"]
    assert jobs.expires_s(jobs.get(DONE)) == WRITTEN_S + 4000


def test_the_runner_brings_the_jobs_to_the_ends_that_they_would_have_come_to(replicas: Replicas) -> None:
    here = replicas.open()
    for job_id, attempts in ((INTERRUPTED, 2), (QUEUED, 1)):
        job = here.wait(job_id, "done", "failed", "cancelled")
        assert (job["status"], job["attempts"]) == ("done", attempts)
        name, pixels_sha256 = ENDS[job_id]
        _skip_unless_recorded(job["result"]["mgie"]["bundle"])
        image = read_image(base64.b64decode(job["result"]["data"][0]["b64_json"]))
        assert_same_picture(image, DATA / "job_ends" / f"{name}.png", pixels_sha256)
    assert _jobs(replicas).find(QUEUED) is not None
    kept = ResultStore(replicas.artifacts()).previous(QUEUED)
    assert pixels_of(read_image(kept)) == pixels_of(image)


def test_a_job_that_was_done_is_shown_as_it_was(replicas: Replicas) -> None:
    view = replicas.open(is_at_work=False).job(DONE)
    assert (view["status"], view["attempts"], view["expires_at"]) == ("done", 1, int(WRITTEN_S) + 4000)
    result = view["result"]
    assert (result["output_format"], result["size"]) == ("webp", "64x48")
    assert result["usage"]["total_tokens"] == 194
    told = result["mgie"]
    assert (told["id"], told["seed"], told["steps"], told["bundle"]) == (DONE, 12, 3, BUNDLE)
    file = base64.b64decode(result["data"][0]["b64_json"])
    assert hashlib.sha256(file).hexdigest() == DONE_FILE


def test_a_request_that_is_sent_again_with_its_key_finds_its_job(replicas: Replicas) -> None:
    files = {name: (DATA / "job_request" / f"{name}.png").read_bytes() for name in ("photo", "mask")}
    data = {"prompt": "remove the house", "steps": "3", "seed": "13", "deterministic": "true", "keep": "true"}

    def send(**changed: str) -> Any:
        here = replicas.open(is_at_work=False)
        return here.request(
            "POST",
            "/v1/images/edits",
            files={"image": files["photo"], "mask": files["mask"]},
            data=data | changed,
            headers=ASYNC | {"idempotency-key": "key-of-v0.1"},
        )

    again = send()
    assert (again.status_code, again.json()["id"]) == (202, QUEUED)
    assert send(seed="14").json()["error"]["param"] == "Idempotency-Key"


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_result_is_found_by_the_id_of_its_edit(replicas: Replicas, name: str) -> None:
    kept = ResultStore(replicas.artifacts())
    image = read_image(kept.previous(name))
    assert (image.size, pixels_of(image)) == ((64, 48), KEPT[name])


def test_a_kept_result_says_how_it_came_about_until_it_expires(replicas: Replicas) -> None:
    store = replicas.artifacts()
    artifact = store.get("6b49e1a048482717a6e13f90cccbf4e3830253a5")
    assert (artifact.content_type, artifact.width, artifact.height, artifact.num_bytes) == ("image/png", 64, 48, 5363)
    assert (artifact.created_s, artifact.expires_s) == (WRITTEN_S, int(WRITTEN_S) + 4000)
    assert artifact.edit is not None
    assert (artifact.edit.seed, artifact.edit.bundle) == (12, BUNDLE)
    assert artifact.edit.settings == {
        "sampler": "euler_ancestral",
        "steps": 3,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "square_crop": False,
        "detail_transfer": False,
    }
    replicas.clock.now_s = WRITTEN_S + 4001
    with pytest.raises(NotFoundError):
        ResultStore(replicas.artifacts()).previous("kept-of-v0-1")


def test_a_next_turn_goes_on_from_a_kept_result(replicas: Replicas) -> None:
    here = replicas.open(is_at_work=False)
    kept = ResultStore(replicas.artifacts()).previous("kept-of-v0-1:1")

    def send(**source: Any) -> str:
        fields = {"prompt": (None, "p"), "steps": (None, "1"), "seed": (None, "1"), "deterministic": (None, "true")}
        answer = here.request("POST", "/v1/images/edits", files=fields | source)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"][0]["b64_json"])

    assert send(previous=(None, "kept-of-v0-1:1")) == send(image=kept)


def test_a_record_with_a_changed_field_is_damaged(replicas: Replicas, store: Path) -> None:
    path = store / "documents" / f"job.{QUEUED}"
    path.write_text(path.read_text().replace('"priority"', '"precedence"'))
    with pytest.raises(DamagedError, match="the record of a job is damaged"):
        _jobs(replicas).get(QUEUED)


def _skip_unless_recorded(bundle: str) -> None:
    if bundle != BUNDLE:
        pytest.skip("the bundle is built here, by another torch or CPU than the one that is recorded")
