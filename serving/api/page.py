"""The page at `/`: static files without a build step, which use the service as any other client does."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).resolve().parents[1] / "page"

_HEADERS = {
    # Nothing from elsewhere, nothing inline. `blob:` is a picture that the page itself holds.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked for again by ETag: files of two versions are never mixed
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_page(api: FastAPI) -> None:
    """Serves the page at `/` and its files below `/page/`."""
    files = _Files(directory=PAGE)

    @api.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    api.mount("/page", files, name="page")
