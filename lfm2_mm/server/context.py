"""What routes share: options, models, the worker, metrics; and callers who go away.

A route, ours or a frontend's, gets all it needs through `context_of(request)`. Knows no route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import HTTPConnection

from lfm2_mm.server.chat_schema import ChatRequest
from lfm2_mm.server.metrics import Metrics
from lfm2_mm.server.options import ServerOptions
from lfm2_mm.server.registry import Registry
from lfm2_mm.server.safe_fetch import PublicFetcher
from lfm2_mm.server.worker import Worker

__all__ = ["AnswerMode", "Context", "Gone", "context_of", "until_gone"]

_T = TypeVar("_T")

AnswerMode = Callable[[ChatRequest, Request], Awaitable[Response]]
"""Answers a chat request in a modality beside text."""


class Gone(Exception):
    """The caller closed the connection before there was an answer."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One server's parts.

    Attributes:
        options: How it is run.
        worker: Runs models.
        registry: Finds models.
        metrics: Counts.
        fetcher: Reads public URLs; None if none are read.
        extras: What frontends' routes keep, by their name.
        answer_modes: Who answers a chat in a modality beside text, by its name in `modalities`.
    """

    options: ServerOptions
    worker: Worker
    registry: Registry
    metrics: Metrics
    fetcher: PublicFetcher | None
    extras: dict[str, Any] = field(default_factory=dict)
    answer_modes: dict[str, AnswerMode] = field(default_factory=dict)


def context_of(connection: HTTPConnection) -> Context:
    """The context of a request or a socket."""
    return cast(Context, connection.app.state.context)


async def until_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work`, but cancel it when the caller goes away.

    Raises:
        Gone: if the caller went away first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
