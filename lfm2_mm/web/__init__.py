"""The web page: static files inside the package, and the routes that hand them out.

Plain ES modules without a build step. The page is only a client of `/v1`, as a stranger's would be.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["mount"]


def mount(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/static/`."""
    from fastapi.responses import FileResponse, Response
    from starlette.staticfiles import StaticFiles

    folder = str(files("lfm2_mm.web").joinpath("static"))

    async def index() -> Response:
        return FileResponse(f"{folder}/index.html", headers={"cache-control": "no-cache"})

    async def icon() -> Response:
        return FileResponse(f"{folder}/icon.svg", media_type="image/svg+xml")

    app.add_api_route("/", index, include_in_schema=False)
    app.add_api_route("/favicon.ico", icon, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=folder), name="static")
