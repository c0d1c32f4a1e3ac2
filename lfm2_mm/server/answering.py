"""What routes that answer in text share: a request becomes prompts and tickets, these deltas.

Knows prompts, engine requests and tickets; nothing of the objects that OpenAI's interfaces make of
them.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import Constraint
from lfm2_mm.errors import FetchError
from lfm2_mm.events import Done, TextDelta, TokenScore
from lfm2_mm.model import Model
from lfm2_mm.request import Request
from lfm2_mm.sampling import Sampling
from lfm2_mm.server.context import Context
from lfm2_mm.server.deltas import Delta, Splitter
from lfm2_mm.server.inputs import names_urls, safe_messages
from lfm2_mm.server.registry import Served
from lfm2_mm.server.worker import Ticket
from lfm2_mm.toolcalls import Parsed, ToolCall, parse_output

__all__ = ["Asked", "Job", "begin", "deltas", "own_fields", "parsed"]

_FETCHING = 16  # requests whose pictures are fetched at once
_PATIENCE = 4  # times the seconds of one picture, for all of a request


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is wanted.

    Attributes:
        messages: In OpenAI's form, as they came.
        names: What the request calls each of them, for errors; None is `messages[…]`.
        tools: What the prompt shows.
        call: Schema of the call that must be made, if one must.
        constraint: What the answer must fit otherwise.
        sampling: What of the checkpoint's own way of sampling is replaced.
        max_tokens: Length of an answer, at most.
        stops: Strings that end one.
        n: How many answers.
        logprobs: How many likely tokens are shown beside each; None shows no scores.
    """

    messages: Sequence[Mapping[str, Any]]
    names: Sequence[str] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    call: dict[str, Any] | None = None
    constraint: Constraint | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int
    stops: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request on its way.

    Attributes:
        served: Who answers.
        prompt: What is answered.
        tickets: One for each answer; the engine has taken them.
        forced: Whether an answer is the JSON of a call.
    """

    served: Served
    prompt: Prompt
    tickets: list[Ticket]
    forced: bool

    def cancel(self) -> None:
        """Nobody wants it any more."""
        for ticket in self.tickets:
            ticket.cancel()


async def begin(asked: Asked, served: Served, context: Context) -> Job:
    """Make the prompt and have the engine take it.

    Raises:
        ApiError: 400 if an attachment cannot be read, 429 or 503 where there is no time.
        Lfm2Error: if the model cannot be asked this.
    """
    model: Model = served.model
    messages = await _safe(asked, context)
    prompt = await served.prepare(lambda: model.prompt(messages, tools=asked.tools or None))
    constraint = asked.constraint if asked.call is None else Constraint.json_schema(asked.call)
    tickets: list[Ticket] = []
    job = Job(served=served, prompt=prompt, tickets=tickets, forced=asked.call is not None)
    try:
        for index in range(asked.n):
            request = Request(
                prompt=prompt,
                sampling=_sampling(asked.sampling, model.sampling, index),
                max_tokens=asked.max_tokens,
                stop=asked.stops,
                constraint=constraint,
                logprobs=asked.logprobs,
            )
            tickets.append(context.worker.submit(model.engine, request))
        for ticket in tickets:
            if (refused := await ticket.begun) is not None:  # has a status, also before a stream
                raise refused
    except BaseException:
        job.cancel()
        raise
    return job


async def _safe(asked: Asked, context: Context) -> list[dict[str, Any]]:
    """The messages with their attachments; those who fetch some wait for each other only."""
    limits, gone = context.options.limits, threading.Event()
    most = _PATIENCE * limits.fetch_seconds
    until = time.monotonic() + most

    def fetch(url: str) -> bytes:
        if gone.is_set() or time.monotonic() > until:
            raise FetchError(
                f"the pictures of this request took more than {most:g} seconds; send them as data "
                "URLs"
            )
        assert context.fetcher is not None
        return context.fetcher(url)

    pool = None
    if names_urls(asked.messages):
        pool = context.extras.get("fetching")
        if pool is None:
            pool = ThreadPoolExecutor(_FETCHING, thread_name_prefix="lfm2-fetch")
            context.extras["fetching"] = pool
    work = partial(
        safe_messages,
        asked.messages,
        fetcher=fetch if context.fetcher is not None else None,
        limits=limits,
        names=asked.names,
    )
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        gone.set()


def _sampling(given: Mapping[str, Any], base: Sampling, index: int) -> Sampling:
    """The checkpoint's own way, with what the caller said in its place; each choice differs."""
    changes = dict(given)
    if index and changes.get("seed") is not None:
        changes["seed"] = (changes["seed"] + index) % 2**63
    return replace(base, **changes)


async def deltas(
    job: Job, ticket: Ticket
) -> AsyncGenerator[tuple[Delta | Done, list[TokenScore]], None]:
    """One answer as it comes: what is new and the scores of its tokens, and how it ended.

    Raises:
        Exception: what the answer failed with.
    """
    splitter = Splitter(thinking_open=job.prompt.thinking_open)
    forced: list[str] = []
    scores: list[TokenScore] = []  # of tokens whose text is not shown yet
    async with aclosing(ticket.__aiter__()) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                scores += event.scores
                if job.forced:
                    forced.append(event.text)
                elif delta := splitter.push(event.text):
                    yield delta, scores
                    scores = []
            elif isinstance(event, Done):
                last = splitter.end()
                if job.forced:
                    found = parsed(job, "".join(forced))
                    last = Delta(found.text, tool_calls=found.tool_calls)
                if last or scores:
                    yield last, scores
                yield event, []


def parsed(job: Job, raw: str) -> Parsed:
    """A whole answer: text, thinking and calls."""
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


def own_fields(job: Job, dones: Sequence[Done]) -> dict[str, Any]:
    """What our own clients show beside OpenAI's fields: how attachments were cut, and times."""
    infos = [slot.prepared.info for slot in job.prompt.slots]
    return {
        "attachments": [{k: v for k, v in info.items() if k != "source"} for info in infos],
        "first_token_seconds": round(min(done.timings.first_token for done in dones), 4),
        "tokens_per_second": round(dones[0].tokens_per_second, 1),
    }
