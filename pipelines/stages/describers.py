"""Who answers "what will this image be like if ...": the protocol, and an HTTP endpoint that speaks it.

Those that run a model here are in `local_describers.py`. Knows nothing of Ray, rows or files, and needs no torch.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import httpx2
from PIL import Image

from mgie.errors import DataError
from mgie.images.files import write_image
from mgie.model.prompts import DATA_SUFFIX, QUESTION, clean_expressive

BackendName = Literal["bundle", "transformers", "openai"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """One answer."""

    text: str
    "cleaned: at most two sentences; empty where the model wrote none"
    prompt_tokens: int
    "tokens of the prompt, image included"
    output_tokens: int
    "tokens written"


@runtime_checkable
class Describer(Protocol):
    """Describes edits in batches."""

    model: str
    "name of the model"
    revision: str
    "its revision or identity"

    def describe(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        """One description per image and instruction, in order."""
        ...


class OpenAIDescriber:
    """An OpenAI-compatible vision endpoint (`POST BASE/chat/completions`), which is how vLLM comes in.

    The questions of a batch are asked one after another; concurrency comes from the number of actors.
    429, 5xx and broken connections are tried again with growing pauses.

    Args:
        base_url: Up to and including `/v1`. api_key: Sent as a bearer token.
    """

    _TRIES = 5

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None,
        max_new_tokens: int,
        timeout_s: float = 120.0,
        first_pause_s: float = 1.0,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx2.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout_s)
        self._max_new_tokens, self._first_pause_s = max_new_tokens, first_pause_s
        self.model, self.revision = model, base_url

    def describe(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        """See `Describer`.

        Raises:
            DataError: The endpoint refused a question or stayed unreachable.
        """
        return [self._ask(image, instruction) for image, instruction in zip(images, instructions, strict=True)]

    def _ask(self, image: Image.Image, instruction: str) -> Description:
        data = base64.b64encode(write_image(image, format="png")).decode()
        question = QUESTION.format(instruction=instruction) + DATA_SUFFIX
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": question},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._max_new_tokens,
            "temperature": 0,
        }
        answer = self._post(body)
        try:
            usage = answer.get("usage") or {}
            return Description(
                text=clean_expressive(answer["choices"][0]["message"]["content"] or ""),
                prompt_tokens=int(usage.get("prompt_tokens", 0)),
                output_tokens=int(usage.get("completion_tokens", 0)),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"the endpoint's answer is not a chat completion: {str(answer)[:200]}") from error

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(self._TRIES):
            if attempt:
                time.sleep(self._first_pause_s * 2 ** (attempt - 1))
            try:
                response = self._client.post("chat/completions", json=body)
            except httpx2.TransportError as error:
                problem = str(error) or type(error).__name__
                continue
            if response.status_code == 429 or response.status_code >= 500:
                problem = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                raise DataError(f"the endpoint answered with status {response.status_code}: {response.text[:200]}")
            answer: dict[str, Any] = response.json()
            return answer
        raise DataError(f"the endpoint did not answer after {self._TRIES} tries: {problem}")
