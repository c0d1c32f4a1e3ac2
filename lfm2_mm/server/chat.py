"""`POST /v1/chat/completions`: a conversation goes in, an answer or a stream of it comes out.

Says what a checked body asks for, and turns what comes into OpenAI's objects. Knows deltas; how
prompts and answers are made is `answering`'s.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lfm2_mm.constrain import from_response_format
from lfm2_mm.events import Done, TextDelta, TokenScore
from lfm2_mm.server import answering
from lfm2_mm.server.answering import Asked, deltas, own_fields, parsed
from lfm2_mm.server.chat_schema import ChatRequest, stops_of, tools_of, wanted_tokens
from lfm2_mm.server.context import Context, context_of, until_gone
from lfm2_mm.server.deltas import Delta
from lfm2_mm.server.document import STREAMED
from lfm2_mm.server.logprobs import logprobs_of
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.streaming import EventStream, event_line
from lfm2_mm.server.worker import Ticket

__all__ = ["router"]

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class _Job(answering.Job):
    """One request, understood."""

    id: str
    body: ChatRequest

    def head(self, kind: str) -> dict[str, Any]:
        """Fields that every object of this answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.served.id,
        }


@router.post("/v1/chat/completions", tags=["chat"], responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Continue a conversation (text, images, tools, JSON schema, streaming)."""
    context = context_of(request)
    for modality in body.modalities or ():
        if modality != "text":
            mode = context.answer_modes.get(modality)
            if mode is None:
                raise ApiError(
                    400,
                    f"modalities asks for {modality}, which this server does not answer in; leave "
                    "it out",
                    code="unsupported_value",
                    param="modalities",
                )
            body.check(context.options.limits)
            return await mode(body, request)
    job = await until_gone(request, _begin(body, context))
    if body.stream:
        return EventStream(_stream(job, context), job.cancel)
    return JSONResponse(await until_gone(request, _whole(job, context)))


async def _begin(body: ChatRequest, context: Context) -> _Job:
    limits = context.options.limits
    body.check(limits)
    served = context.registry.find(body.model, "chat")
    tools, call = tools_of(body)
    asked = Asked(
        messages=body.messages,
        tools=tools,
        call=call,
        constraint=from_response_format(body.response_format),
        sampling=body.sampling,
        max_tokens=wanted_tokens(body, limits),
        stops=stops_of(body),
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    job = await answering.begin(asked, served, context)
    return _Job(**vars(job), id=f"chatcmpl-{uuid.uuid4().hex}", body=body)


# --- whole answers -----------------------------------------------------------------------------


async def _whole(job: _Job, context: Context) -> dict[str, Any]:
    try:
        texts = await asyncio.gather(*(_collect(ticket) for ticket in job.tickets))
    except BaseException as problem:
        job.cancel()
        if isinstance(problem, Exception):
            context.metrics.failed(job.served.id)
        raise
    choices = []
    tokenizer = job.served.model.tokenizer
    for index, (raw, scores, done) in enumerate(texts):
        context.metrics.ended(job.served.id, done)
        found = parsed(job, raw)
        message: dict[str, Any] = {"role": "assistant", "content": found.text, "refusal": None}
        if found.thinking is not None:
            message["reasoning_content"] = found.thinking
        if found.tool_calls:
            message["content"] = found.text or None
            message["tool_calls"] = [call.to_openai() for call in found.tool_calls]
        choices.append(
            {
                "index": index,
                "message": message,
                "finish_reason": _reason(done, bool(found.tool_calls)),
                "logprobs": logprobs_of(tokenizer, scores) if job.body.logprobs else None,
            }
        )
    dones = [done for _, _, done in texts]
    own = {"choices": choices, "usage": _usage(dones), "lfm2_mm": own_fields(job, dones)}
    return {**job.head("chat.completion"), **own}


async def _collect(ticket: Ticket) -> tuple[str, list[TokenScore], Done]:
    pieces: list[str] = []
    scores: list[TokenScore] = []
    async for event in ticket:
        if isinstance(event, TextDelta):
            pieces.append(event.text)
            scores += event.scores
    assert ticket.done is not None
    return "".join(pieces), scores, ticket.done


def _reason(done: Done, calls: bool) -> str:
    if calls and done.finish_reason == "stop":
        return "tool_calls"
    return "length" if done.finish_reason == "cancelled" else done.finish_reason


def _usage(dones: list[Done]) -> dict[str, Any]:
    prompt = max((done.usage.prompt_tokens for done in dones), default=0)
    cached = max((done.usage.cached_tokens for done in dones), default=0)
    generated = sum(done.usage.completion_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# --- streams -----------------------------------------------------------------------------------


async def _stream(job: _Job, context: Context) -> AsyncIterator[bytes]:
    """Server-sent events, ended by `[DONE]`; what fails on the way is an event, too."""
    queue: _Queue = asyncio.Queue()
    tokenizer = job.served.model.tokenizer
    head = job.head("chat.completion.chunk")
    tasks = [
        asyncio.create_task(_pump(job, index, ticket, queue))
        for index, ticket in enumerate(job.tickets)
    ]
    called: set[int] = set()
    dones: list[Done] = []
    try:
        for index in range(len(tasks)):
            yield _event(head, index, {"role": "assistant", "content": ""})
        while len(dones) < len(tasks):
            index, found, scores = await queue.get()
            if isinstance(found, Exception):
                context.metrics.failed(job.served.id)
                yield event_line(body_of(from_exception(found)))
                return
            if isinstance(found, Delta):
                if found.tool_calls:
                    called.add(index)
                likely = logprobs_of(tokenizer, scores) if scores else None
                yield _event(head, index, _fields(found), logprobs=likely)
                continue
            dones.append(found)
            context.metrics.ended(job.served.id, found)
            yield _event(head, index, {}, _reason(found, index in called))
        options = job.body.stream_options
        if options is not None and options.include_usage:
            own = {"choices": [], "usage": _usage(dones), "lfm2_mm": own_fields(job, dones)}
            yield event_line({**head, **own})
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        job.cancel()


_Queue = asyncio.Queue[tuple[int, Delta | Done | Exception, list[TokenScore]]]
"""Which choice, what is new of it, and the scores of its tokens."""


async def _pump(job: _Job, index: int, ticket: Ticket, queue: _Queue) -> None:
    """Read one answer into the queue that the stream is written from."""
    try:
        async with aclosing(deltas(job, ticket)) as found:
            async for new, scores in found:
                queue.put_nowait((index, new, scores))
    except Exception as problem:
        queue.put_nowait((index, problem, []))


def _fields(delta: Delta) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if delta.content:
        found["content"] = delta.content
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        found["tool_calls"] = [
            {"index": place, **call.to_openai()} for place, call in enumerate(delta.tool_calls)
        ]
    return found


def _event(
    head: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
    return event_line({**head, "choices": [choice]})
