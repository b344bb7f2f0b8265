"""The page as files: complete, small, and nothing in them that leads elsewhere. What it does: tests/browser."""

import re

from fastapi.testclient import TestClient

from serving.api.page import PAGE

MAX_BYTES = 150_000


def _ids(text: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', text))


def test_the_page_loads_all_it_needs_from_the_service_itself(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    used = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"page/style.css", "page/app.js"} <= set(used)
    imported = {
        f"page/{name}" for file in PAGE.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', file.read_text())
    }
    assert imported <= set(used)  # loaded at once, not one after the other
    assert {f"page/{file.name}" for file in PAGE.glob("*.js")} <= set(used)
    for path in used:
        assert client.get(f"/{path}").status_code == 200, path


def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline(client: TestClient) -> None:
    for path in ("/", "/page/app.js"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        sources = {source for allowed in policy.values() for source in allowed.split()}
        assert sources == {"'none'", "'self'", "blob:"}
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-cache")
    page = client.get("/").text
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page)


def test_a_page_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")


def test_no_file_of_the_page_names_another_host() -> None:
    texts = [file for file in PAGE.iterdir() if file.suffix in {".html", ".js", ".css", ".svg"}]
    assert len(texts) > 10
    for file in texts:
        outside = set(re.findall(r"(?:https?:)?//[\w-]+\.[^\s\"')]+", file.read_text(encoding="utf-8")))
        assert outside <= {"http://www.w3.org/2000/svg"}, file.name


def test_every_element_that_a_script_asks_for_is_in_the_page_and_has_one_id() -> None:
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    scripts = "".join(file.read_text(encoding="utf-8") for file in PAGE.glob("*.js"))
    asked = set(re.findall(r'(?:element|show|onClick)\(\s*"([^"]+)"', scripts))
    assert len(asked) > 30
    assert asked <= set(ids)


def test_the_page_weighs_little(client: TestClient) -> None:
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < MAX_BYTES
