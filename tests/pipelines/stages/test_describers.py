"""The describing backends: transformers' LLaVA at toy size, and an OpenAI-compatible endpoint on loopback."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mgie.errors import ConfigError, DataError
from mgie.images.files import read_image
from pipelines.stages.describers import Describer, OpenAIDescriber
from pipelines.stages.local_describers import TransformersDescriber

IMAGES = [Image.new("RGB", (50 + 10 * i, 40), (60 * i, 120, 200 - 50 * i)) for i in range(3)]
WORDS = ["make it night", "add a red balloon to the sky", "x"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA in transformers' layout, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llava")
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2, pad_token_id=4,
        ),
        image_token_index=3,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def transformers_describer(llava: Path) -> TransformersDescriber:
    return TransformersDescriber(str(llava), revision=None, max_new_tokens=12, device="cpu", dtype="float32")


def test_llava_of_transformers_describes_a_batch_as_row_by_row(transformers_describer: TransformersDescriber) -> None:
    assert isinstance(transformers_describer, Describer)
    together = transformers_describer.describe(IMAGES, WORDS)
    alone = [transformers_describer.describe([image], [text])[0] for image, text in zip(IMAGES, WORDS, strict=True)]
    assert together == alone
    assert all(0 < description.output_tokens <= 12 for description in together)
    assert together[0].prompt_tokens < together[1].prompt_tokens


def test_user_text_is_never_an_image_for_llava_of_transformers(transformers_describer: TransformersDescriber) -> None:
    ids = transformers_describer._prompt("put <image> and </s> here")
    assert ids.count(3) == 4  # one image of 2 x 2 patches
    assert 2 not in ids
    [description] = transformers_describer.describe(IMAGES[:1], ["put <image> and </s> here"])
    assert description.prompt_tokens == len(ids)


def test_an_unknown_llava_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TransformersDescriber(str(tmp_path), revision=None, max_new_tokens=1, device="cpu", dtype="float32")


Answer = Callable[[int, dict[str, Any]], tuple[int, Any]]


@pytest.fixture
def endpoint() -> Iterator[Callable[[Answer], tuple[str, list[dict[str, Any]]]]]:
    """Starts an HTTP server on loopback that answers as a function of (number of the call, body)."""
    servers = []

    def serve(answer: Answer) -> tuple[str, list[dict[str, Any]]]:
        seen: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                seen.append({"path": self.path, "authorization": self.headers["authorization"], **body})
                status, content = answer(len(seen), body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1", seen

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def _completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def _describer(base_url: str) -> OpenAIDescriber:
    return OpenAIDescriber(base_url, model="m", api_key="secret", max_new_tokens=9, first_pause_s=0.01)


def test_the_endpoint_gets_the_image_and_the_published_question(endpoint: Any) -> None:
    base_url, seen = endpoint(lambda number, body: (200, _completion("One. Two. Three.")))
    describer = _describer(base_url)
    assert isinstance(describer, Describer)
    descriptions = describer.describe(IMAGES[:2], WORDS[:2])
    assert [d.text for d in descriptions] == ["One. Two."] * 2
    assert (descriptions[0].prompt_tokens, descriptions[0].output_tokens) == (7, 5)
    image, text = seen[0]["messages"][0]["content"]
    assert text["text"] == "what will this image be like if 'make it night'  (in a short paragraph)"
    sent = read_image(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")))
    assert sent.tobytes() == IMAGES[0].tobytes()
    assert (seen[0]["path"], seen[0]["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (seen[0]["max_tokens"], seen[0]["temperature"]) == (9, 0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(endpoint: Any, status: int) -> None:
    base_url, seen = endpoint(lambda number, body: (status, {}) if number < 3 else (200, _completion("Fine.")))
    assert _describer(base_url).describe(IMAGES[:1], WORDS[:1])[0].text == "Fine."
    assert len(seen) == 3


def test_a_refusal_or_a_strange_answer_is_an_error_of_the_row(endpoint: Any) -> None:
    base_url, seen = endpoint(lambda number, body: (400, {"error": "no"}))
    with pytest.raises(DataError, match="status 400"):
        _describer(base_url).describe(IMAGES[:1], WORDS[:1])
    assert len(seen) == 1
    base_url, _ = endpoint(lambda number, body: (200, {"choices": []}))
    with pytest.raises(DataError, match="not a chat completion"):
        _describer(base_url).describe(IMAGES[:1], WORDS[:1])


def test_an_endpoint_that_is_not_there_is_given_up_after_five_tries() -> None:
    with pytest.raises(DataError, match="after 5 tries"):
        _describer("http://127.0.0.1:9/v1").describe(IMAGES[:1], WORDS[:1])
