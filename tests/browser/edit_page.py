"""The page as a person uses it, and what it sends."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WAIT_MS = 280_000  # against a hang alone
expect.set_options(timeout=WAIT_MS)


class Recorder:
    """Passes everything on, and remembers the bodies of the edits asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self.bodies = app, list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self.bodies.append(b"")

        async def recorded() -> Message:
            message = await receive()
            self.bodies[-1] += message.get("body", b"")
            return message

        await self._app(scope, recorded, send)

    def sent(self, field: str) -> bool:
        """Whether the last edit had a field of this name."""
        return f'name="{field}"'.encode() in self.bodies[-1]


class EditPage:
    """The page as a person uses it."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def choose(self, data: bytes, name: str = "photo.png") -> None:
        self["#file"].set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
        expect(self["#facts"]).to_contain_text(name)

    def fill_numbers(self, **numbers: float) -> None:
        self["#settings details"].evaluate("details => details.open = true")
        for name, number in numbers.items():
            self[f"[name={name}]"].fill(str(number))

    def ask(self, words: str) -> None:
        self["#prompt"].fill(words)
        self["#send"].click()

    def edit(self, words: str, **numbers: float) -> None:
        self.fill_numbers(**numbers)
        self.ask(words)
        self.is_done()

    def is_done(self) -> None:
        expect(self["#status"]).to_contain_text("Done")
        expect(self["#send"]).to_be_visible()

    def download(self, *, with_metadata: bool = True) -> bytes:
        self["#with-metadata"].set_checked(with_metadata)
        with self.page.expect_download() as download:
            self["#download"].click()
        return Path(download.value.path()).read_bytes()

    def tree(self) -> list[Any]:
        """The history as it is nested: [words, [child, ...]]."""
        script = """list => {
            const read = (ul) => [...ul.children].map((li) => {
                const below = li.querySelector(":scope > ul");
                return [li.querySelector(":scope > button > span").firstChild.textContent, below ? read(below) : []];
            });
            return read(list);
        }"""
        tree: list[Any] = self["#tree"].evaluate(script)
        return tree

    def open(self, words: str, number: int = 0) -> None:
        """Selects a picture of the history."""
        self[".node"].filter(has_text=words).nth(number).click()
