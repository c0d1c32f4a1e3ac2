"""The application: our routes and those of frontends, behind the guard.

Puts the parts together and says how errors look. Knows no modality: frontends bring their routes
by the entry-point group `lfm2_mm.routes`, each an object with `router` and, where it answers chats
in a modality of its own, `answer_modes`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from lfm2_mm import __version__, web
from lfm2_mm.server import chat, responses, status
from lfm2_mm.server.context import Context, Gone
from lfm2_mm.server.document import described
from lfm2_mm.server.guard import Guard, log
from lfm2_mm.server.metrics import Metrics
from lfm2_mm.server.options import ServerOptions
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.registry import Registry
from lfm2_mm.server.safe_fetch import PublicFetcher
from lfm2_mm.server.worker import Worker

__all__ = ["ROUTE_GROUP", "create_app"]

ROUTE_GROUP = "lfm2_mm.routes"
_CLIENT_CLOSED = 499
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def create_app(options: ServerOptions, *, load: Callable[[str], Any] | None = None) -> Guard:
    """The ASGI application of one server.

    Args:
        options: How it is run.
        load: Name to model; by default `lfm2_mm.load`.
    """
    worker = Worker(options.limits)
    registry = Registry(options, worker, load)
    limits = options.limits
    fetcher = None
    if options.fetch:
        fetcher = PublicFetcher(
            max_bytes=limits.image_bytes, timeout=limits.fetch_seconds, hosts=options.fetch_hosts
        )
    context = Context(
        options=options,
        worker=worker,
        registry=registry,
        metrics=Metrics(worker, registry),
        fetcher=fetcher,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        loading = asyncio.create_task(registry.load_all())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.to_thread(worker.stop)
            if fetcher is not None:
                fetcher.close()

    app = FastAPI(
        title="lfm2_mm",
        version=__version__,
        summary="LFM2 multimodal models on this machine, behind OpenAI's interface.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.context = context
    app.include_router(status.router)
    app.include_router(chat.router)
    app.include_router(responses.router)
    for point in sorted(entry_points(group=ROUTE_GROUP), key=lambda found: found.name):
        try:
            plugin = point.load()
            app.include_router(plugin.router)
            context.answer_modes.update(getattr(plugin, "answer_modes", {}))
        except ImportError as problem:  # an extra that is not installed
            log.warning("the routes of %s are left out: %s", point.name, problem)
    web.mount(app)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.rstrip("/") for origin in options.origins],
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _say_errors(app)
    described(app)
    return Guard(app, options)


def _allowed(request: Request) -> list[str]:
    """The methods that some route at an address does."""

    def done(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in _METHODS if done(method)]


def _named(step: str | int) -> str:
    """A step on the way to a field; names that callers chose may be long or hold line breaks."""
    name = str(step)
    return (name if name.isprintable() else repr(name))[:80]


def _say_errors(app: FastAPI) -> None:
    """Every error in the form that OpenAI clients expect."""

    def told(problem: ApiError) -> Response:
        return JSONResponse(body_of(problem), problem.status, headers=problem.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(_named(step) for step in first["loc"] if step != "body") or "the body"
        if first["type"] == "json_invalid":
            return told(ApiError(400, "the body is not valid JSON; correct it", code="bad_json"))
        message = f"{place}: {first['msg'][:200].lower()}; correct the field"
        return told(ApiError(400, message, code="invalid_value", param=place))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # what the guard refused while a body was read
            return told(error.__cause__)
        if error.status_code == 404:
            problem = ApiError(404, "there is nothing at this address", code="not_found")
        elif error.status_code == 405:
            allowed = ", ".join(_allowed(request))
            message = f"{request.method[:20]} is not done at this address; use {allowed}"
            answer = told(ApiError(405, message, code="method_not_allowed"))
            answer.headers["allow"] = allowed
            return answer
        else:
            problem = ApiError(error.status_code, f"{str(error.detail).lower()}")
        return told(problem)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED)  # nobody reads it; the log does

    async def other(request: Request, error: Exception) -> Response:
        problem = from_exception(error)
        if problem.code == "internal":
            state = request.scope.get("state", {})
            logging.getLogger("lfm2_mm.server").error(
                "request %s failed", state.get("request_id"), exc_info=error
            )
        return told(problem)

    from lfm2_mm.errors import Lfm2Error

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(ApiError, other)
    app.add_exception_handler(Lfm2Error, other)
    app.add_exception_handler(Exception, other)
