"""Edits of a running service over HTTP, and what it says of its stages."""

import base64
import time
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import openai

from mgie.images.files import read_image
from tests.ray_cluster import HEADERS, KEY
from tests.waiting import POLL_S

GUARD_S = 900.0  # against a hang alone


@dataclass(frozen=True)
class Edited:
    """One answer."""

    data: bytes
    expressive: str
    details: dict[str, Any]

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(read_image(self.data)).astype(int)


def edit(address: str, image: bytes, prompt: str, **extra: Any) -> Edited:
    """Sends one edit with the official client, without its retries."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=GUARD_S)
    answer = client.images.edit(image=("photo", image), prompt=prompt, extra_body=extra).model_dump()
    (result,) = answer["data"]
    return Edited(base64.b64decode(result["b64_json"]), result["revised_prompt"], answer["mgie"])


def stats(address: str) -> dict[str, Any]:
    body: dict[str, Any] = httpx2.get(f"{address}/stats", headers=HEADERS, timeout=GUARD_S).raise_for_status().json()
    return body


def of_stage(address: str, stage: str) -> dict[str, Any]:
    """Figures of a stage as soon as it answers."""
    while (figures := stats(address)[stage]) is None:
        time.sleep(POLL_S)
    found: dict[str, Any] = figures
    return found
