"""The page's modules by themselves, in the browser."""

import itertools
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from tests.browser.edit_page import EditPage

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

READ = """async ([bytes, size]) => {
    const { readEvents } = await import("/page/sse.js");
    const all = new Uint8Array(bytes);
    const body = new ReadableStream({
        start(controller) {
            for (let at = 0; at < all.length; at += size) controller.enqueue(all.slice(at, at + size));
            controller.close();
        },
    });
    const read = [];
    for await (const one of readEvents(body)) read.push(one);
    return read;
}"""


def test_events_are_read_whatever_the_pieces_they_come_in(edit_page: EditPage) -> None:
    lines = [
        ": id 7",
        "",
        ': expressive "ä night: dark"',
        "",
        "event: a",
        "data: {1}",
        "",
        "data:first",
        "data: second ",
        "",
    ]
    lines += ["event: never", "", "id: 4", "data", "", "event: cut off", "data: x"]
    for size, line_end in itertools.product((1, 2, 7, 10_000), ("\n", "\r\n")):
        read: list[Any] = edit_page.page.evaluate(READ, [list(line_end.join(lines).encode()), size])
        assert read == [
            {"comment": "id 7"},
            {"comment": 'expressive "ä night: dark"'},
            {"event": "a", "data": "{1}"},
            {"event": "message", "data": "first\nsecond "},
            {"event": "message", "data": ""},
        ], (size, line_end)


def test_a_stream_that_breaks_off_is_an_error_that_says_so(edit_page: EditPage) -> None:
    script = """async (text) => {
        const { progressOf } = await import("/page/api.js");
        const response = new Response(text, { headers: { "x-request-id": "7" } });
        try {
            for await (const event of progressOf(response)) window.last = event;
            return null;
        } catch (error) {
            return [error.code, error.requestId, window.last];
        }
    }"""
    text = ': expressive "night"\n\n: step 1/8\n\nevent: image_edit.completed\ndata: {"b64'
    assert edit_page.page.evaluate(script, text) == ["broken_off", "7", {"step": 1, "total": 8}]
    failed = 'data: {"error": {"message": "m", "type": "t", "param": null, "code": "cancelled"}}\n\n'
    assert edit_page.page.evaluate(script, failed) == ["cancelled", "7", {"step": 1, "total": 8}]


def test_every_error_has_advice(edit_page: EditPage) -> None:
    script = """async (error) => {
        const { adviceFor, ApiError } = await import("/page/errors.js");
        return adviceFor(new ApiError({message: "m", ...error}));
    }"""
    for error, advice in (
        ({"code": "engine_full", "status": 429, "retryAfterS": 3}, "Try again in 3 s."),
        ({"code": "stage_unavailable", "status": 503}, "Try again in a few seconds."),
        ({"code": "invalid_value", "status": 400}, "Change that, and try again."),
        ({"status": 500}, "Try again; if it stays, tell the operator the id below."),
    ):
        assert edit_page.page.evaluate(script, error) == advice
