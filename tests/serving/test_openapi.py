"""schemathesis sends what the OpenAPI document allows, and what it does not, to the real stages in process."""

import base64
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def with_photo(case: Any, photo: bytes) -> None:
    """Half of the bodies get a photo that can be edited, and few steps: else none would come past the decoder."""
    if not isinstance(case.body, dict) or random.Random(str(case.body)).random() < 0.5:
        return
    is_json = case.media_type == "application/json"
    image = f"data:image/png;base64,{base64.b64encode(photo).decode()}" if is_json else photo
    case.body.pop("images", None)
    case.body.pop("previous", None)
    case.body.pop("mask", None)
    case.body |= {"image": image, "steps": 1, "n": 1}


@pytest.mark.parametrize("num_cases", [12, pytest.param(60, marks=pytest.mark.endure)])
def test_no_request_makes_the_service_fail_or_answer_what_is_not_documented(
    mllm: MLLMStage,
    diffusion: DiffusionStage,
    photo: Callable[..., bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    *,
    num_cases: int,
) -> None:
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

    api = api_over(InProcessBackend(mllm, diffusion), tmp_path)
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    statuses: Counter[tuple[str, int]] = Counter()
    small = photo(32, 32)

    def check(operation: Any, mode: Any) -> None:
        @settings(
            max_examples=num_cases,  # of each operation, media type and mode
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            with_photo(case, small)
            response = case.call()
            statuses[operation.label, response.status_code] += 1
            # 504: the case asked for it by `timeout_s`.
            assert response.status_code < 500 or response.status_code == 504, response.text
            is_event_stream = response.headers["content-type"][0].startswith("text/event-stream")
            if response.status_code != 204 and not is_event_stream:
                case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])

        send()

    for result in schema.get_all_operations():
        operation = result.ok()
        # Only a body can be wrong: any text is an id.
        for mode in GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]:
            check(operation, mode)
    record_property("cases", str(dict(statuses)))
    assert statuses["POST /v1/images/edits", 200] > 0
    assert statuses["POST /v1/images/edits", 202] > 0
    assert statuses["POST /v1/images/edits", 400] > 0
    assert statuses["GET /v1/edits/{job_id}", 404] > 0
    assert statuses["DELETE /v1/edits/{job_id}", 404] > 0
    assert statuses["DELETE /v1/images/edits/{edit_id}", 404] > 0
