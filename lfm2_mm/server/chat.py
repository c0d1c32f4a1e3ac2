"""`POST /v1/chat/completions`: a conversation goes in, an answer or a stream of it comes out.

Turns a checked body into engine requests and their events into OpenAI's objects. Knows prompts,
tickets and deltas; how steps are made is the worker's.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import Constraint, from_response_format
from lfm2_mm.events import Done, TextDelta, TokenScore
from lfm2_mm.model import Model
from lfm2_mm.request import Request as EngineRequest
from lfm2_mm.sampling import Sampling
from lfm2_mm.server.chat_schema import ChatRequest, stops_of, tools_of, wanted_tokens
from lfm2_mm.server.context import Context, context_of, until_gone
from lfm2_mm.server.deltas import Delta, Splitter
from lfm2_mm.server.inputs import safe_messages
from lfm2_mm.server.logprobs import logprobs_of
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.registry import Served
from lfm2_mm.server.worker import Ticket
from lfm2_mm.toolcalls import Parsed, ToolCall, parse_output

__all__ = ["router"]

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One request, understood."""

    id: str
    served: Served
    body: ChatRequest
    prompt: Prompt
    tickets: list[Ticket]
    forced: bool

    def head(self, kind: str) -> dict[str, Any]:
        """Fields that every object of this answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.served.id,
        }


@router.post("/v1/chat/completions", tags=["chat"])
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
        first: list[AsyncIterator[Any]] = [aiter(ticket) for ticket in job.tickets]
        return StreamingResponse(
            _stream(job, first, context),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
    return JSONResponse(await until_gone(request, _whole(job, context)))


async def _begin(body: ChatRequest, context: Context) -> _Job:
    limits = context.options.limits
    body.check(limits)
    served = context.registry.find(body.model, "chat")
    model: Model = served.model
    max_tokens, stops = wanted_tokens(body, limits), stops_of(body)
    tools, call = tools_of(body)
    constraint = from_response_format(body.response_format)
    if call is not None:
        constraint = Constraint.json_schema(call)
    messages = await asyncio.to_thread(
        safe_messages, body.messages, fetcher=context.fetcher, limits=limits
    )
    prompt = await served.prepare(lambda: model.prompt(messages, tools=tools or None))
    tickets: list[Ticket] = []
    try:
        for index in range(body.n):
            engine_request = EngineRequest(
                prompt=prompt,
                sampling=_sampling(body, model.sampling, index),
                max_tokens=max_tokens,
                stop=stops,
                constraint=constraint,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            )
            tickets.append(context.worker.submit(model.engine, engine_request))
        for ticket in tickets:
            if (refused := await ticket.begun) is not None:  # has a status, also before a stream
                raise refused
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return _Job(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        served=served,
        body=body,
        prompt=prompt,
        tickets=tickets,
        forced=call is not None,
    )


def _sampling(body: ChatRequest, base: Sampling, index: int) -> Sampling:
    """The checkpoint's own way, with what the caller said in its place; each choice differs."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if index and body.seed is not None:
        given["seed"] = (body.seed + index) % 2**63
    return replace(base, **given)


# --- whole answers -----------------------------------------------------------------------------


async def _whole(job: _Job, context: Context) -> dict[str, Any]:
    try:
        texts = await asyncio.gather(*(_collect(ticket) for ticket in job.tickets))
    except BaseException as problem:
        for ticket in job.tickets:
            ticket.cancel()
        if isinstance(problem, Exception):
            context.metrics.failed(job.served.id)
        raise
    choices = []
    tokenizer = job.served.model.tokenizer
    for index, (raw, scores, done) in enumerate(texts):
        context.metrics.ended(job.served.id, done)
        parsed = _parsed(job, raw)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.text, "refusal": None}
        if parsed.thinking is not None:
            message["reasoning_content"] = parsed.thinking
        if parsed.tool_calls:
            message["content"] = parsed.text or None
            message["tool_calls"] = [call.to_openai() for call in parsed.tool_calls]
        choices.append(
            {
                "index": index,
                "message": message,
                "finish_reason": _reason(done, bool(parsed.tool_calls)),
                "logprobs": logprobs_of(tokenizer, scores) if job.body.logprobs else None,
            }
        )
    dones = [done for _, _, done in texts]
    own = {"choices": choices, "usage": _usage(dones), "lfm2_mm": _own(job, dones)}
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


def _parsed(job: _Job, raw: str) -> Parsed:
    if job.forced:
        call = _forced_call(raw)
        if call is not None:
            return Parsed(text="", tool_calls=(call,))
    return parse_output(raw, thinking_open=job.prompt.thinking_open)


def _forced_call(raw: str) -> ToolCall | None:
    """The call of an answer that had to be one; None if it was cut short."""
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return ToolCall(
        name=found["name"], arguments=found["arguments"], id=f"call_{uuid.uuid4().hex[:24]}"
    )


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


def _own(job: _Job, dones: list[Done]) -> dict[str, Any]:
    """What our own clients show beside OpenAI's fields: how attachments were cut, and times."""
    infos = [slot.prepared.info for slot in job.prompt.slots]
    return {
        "attachments": [{k: v for k, v in info.items() if k != "source"} for info in infos],
        "first_token_seconds": round(min(done.timings.first_token for done in dones), 4),
        "tokens_per_second": round(dones[0].tokens_per_second, 1),
    }


# --- streams -----------------------------------------------------------------------------------


async def _stream(
    job: _Job, events: list[AsyncIterator[Any]], context: Context
) -> AsyncIterator[bytes]:
    """Server-sent events, ended by `[DONE]`; what fails on the way is an event, too."""
    queue: _Queue = asyncio.Queue()
    tokenizer = job.served.model.tokenizer
    head = job.head("chat.completion.chunk")
    tasks = [
        asyncio.create_task(_pump(job, index, ticket, queue)) for index, ticket in enumerate(events)
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
                yield _line(body_of(from_exception(found)))
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
            own = {"choices": [], "usage": _usage(dones), "lfm2_mm": _own(job, dones)}
            yield _line({**head, **own})
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for ticket in job.tickets:
            ticket.cancel()


_Queue = asyncio.Queue[tuple[int, Delta | Done | Exception, list[TokenScore]]]
"""Which choice, what is new of it, and the scores of its tokens."""


async def _pump(job: _Job, index: int, ticket: AsyncIterator[Any], queue: _Queue) -> None:
    """Read one answer's events into the queue that the stream is written from."""
    splitter = Splitter(thinking_open=job.prompt.thinking_open)
    forced: list[str] = []
    scores: list[TokenScore] = []  # of tokens whose text is not shown yet
    try:
        async for event in ticket:
            if isinstance(event, TextDelta):
                scores += event.scores
            if isinstance(event, TextDelta) and job.forced:
                forced.append(event.text)
            elif isinstance(event, TextDelta):
                if delta := splitter.push(event.text):
                    queue.put_nowait((index, delta, scores))
                    scores = []
            elif isinstance(event, Done):
                last = splitter.end()
                if job.forced:
                    parsed = _parsed(job, "".join(forced))
                    last = Delta(parsed.text, tool_calls=parsed.tool_calls)
                if last or scores:
                    queue.put_nowait((index, last, scores))
                queue.put_nowait((index, event, []))
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
    return _line({**head, "choices": [choice]})


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
