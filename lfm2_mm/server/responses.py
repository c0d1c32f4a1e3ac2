"""`POST /v1/responses`: what the Responses API asks of a model, as far as it needs no memory.

Knows requests and events; how answers are made is `answering`'s, what they look like
`response_events`'.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lfm2_mm.events import Done
from lfm2_mm.server import answering
from lfm2_mm.server.answering import Job, deltas, own_fields
from lfm2_mm.server.context import Context, context_of, until_gone
from lfm2_mm.server.document import STREAMED
from lfm2_mm.server.problems import from_exception
from lfm2_mm.server.response_events import ResponseWriter
from lfm2_mm.server.responses_schema import ResponsesRequest
from lfm2_mm.server.streaming import EventStream, event_line, json_bytes

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/responses", tags=["responses"], responses=STREAMED)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer an input (text, images, tools, JSON schema, streaming); nothing is kept."""
    context = context_of(request)
    job = await until_gone(request, _begin(body, context))
    writer = ResponseWriter(body, job.served.id)
    if body.stream:
        return EventStream(_stream(job, writer, context), job.cancel)
    whole = await until_gone(request, _whole(job, writer, context))
    return Response(json_bytes(whole), media_type="application/json")


async def _begin(body: ResponsesRequest, context: Context) -> Job:
    asked = body.asked(context.options.limits)
    served = context.registry.find(body.model, "chat")
    return await answering.begin(asked, served, context)


async def _whole(job: Job, writer: ResponseWriter, context: Context) -> dict[str, Any]:
    try:
        async with aclosing(_written(job, writer, context)) as events:
            async for _ in events:
                pass
    except Exception:
        context.metrics.failed(job.served.id)
        raise
    finally:
        job.cancel()
    return writer.response


async def _stream(job: Job, writer: ResponseWriter, context: Context) -> AsyncIterator[bytes]:
    """Server-sent events; what fails on the way is the last of them."""
    for event in writer.begin():
        yield event_line(event, event["type"])
    try:
        async with aclosing(_written(job, writer, context)) as events:
            async for event in events:
                yield event_line(event, event["type"])
    except Exception as problem:
        context.metrics.failed(job.served.id)
        for event in writer.fail(from_exception(problem)):
            yield event_line(event, event["type"])


async def _written(
    job: Job, writer: ResponseWriter, context: Context
) -> AsyncGenerator[dict[str, Any], None]:
    (ticket,) = job.tickets
    async with aclosing(deltas(job, ticket)) as found:
        async for new, _ in found:
            if isinstance(new, Done):
                context.metrics.ended(job.served.id, new)
                thought = len(job.served.model.tokenizer.encode_plain(writer.reasoning))
                for event in writer.end(new, thought, lfm2_mm=own_fields(job, [new])):
                    yield event
            else:
                for event in writer.push(new):
                    yield event
