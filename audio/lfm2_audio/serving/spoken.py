"""Chat answers that are spoken: `modalities: ["text", "audio"]` of `/v1/chat/completions`.

The route of chat hands such requests over. Answers are kept for an hour under their id, so that a
conversation that names one goes on with the very sound that was said. Knows conversations and
OpenAI's objects; how speech is made is the model's.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lfm2_audio.conversation import Conversation
from lfm2_audio.prompts import CONVERSATION
from lfm2_audio.serving.schema import refused, voice_of
from lfm2_audio.serving.sounding import RATE, spoken
from lfm2_audio.voice.events import pcm16
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm.errors import AudioTooLong
from lfm2_mm.events import Done
from lfm2_mm.server.chat_schema import ChatRequest, wanted_tokens
from lfm2_mm.server.context import Context, context_of, until_gone
from lfm2_mm.server.inputs import safe_messages
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.registry import Served
from lfm2_mm.server.streaming import EventStream, event_line
from lfm2_mm.server.worker import Ticket

__all__ = ["Said", "conversation_of", "instructed", "spoken_chat", "system_of"]

_KEPT, _SECONDS = 256, 3600  # answers, and how long each may be referred to


def system_of(text: str | None) -> str:
    """The system prompt that makes a model speak, with what a caller wants said in it."""
    words = (text or "").strip()
    if not words:
        return CONVERSATION
    return words if "interleaved" in words.lower() else f"{CONVERSATION} {words}"


def instructed(conversation: Any, text: str) -> Any:
    """The conversation under other instructions, where it has any."""
    if not isinstance(conversation, Conversation):
        return conversation
    return replace(conversation, system=system_of(text))


class Said:
    """Answers that can be referred to by their id; the oldest go first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[float, list[Any]]] = OrderedDict()

    def keep(self, id: str, segments: list[Any]) -> int:
        """Keep an answer; returns the Unix time at which it goes."""
        until = time.time() + _SECONDS
        self._answers[id] = (until, segments)
        while len(self._answers) > _KEPT:
            self._answers.popitem(last=False)
        return int(until)

    def find(self, id: str) -> list[Any] | None:
        """What was said, if it is still there."""
        until, segments = self._answers.get(id, (0.0, []))
        return segments if until > time.time() else None

    @classmethod
    def of(cls, context: Context) -> Said:
        """Those of this server."""
        made = context.extras.setdefault("audio.said", cls())
        assert isinstance(made, Said)
        return made


def conversation_of(body: ChatRequest, model: Any, limits: Limits, said: Said) -> Conversation:
    """The messages of a request as a conversation.

    Raises:
        ApiError: 400 if a message cannot be part of a spoken conversation, 413 if a recording is
            too long.
        AudioError: if a recording cannot be read.
    """
    messages = safe_messages(body.messages, fetcher=None, limits=limits)
    instructions: list[str] = []
    conversation: Conversation = model.conversation(None)
    for index, (message, given) in enumerate(zip(messages, body.messages, strict=True)):
        role, parts = message.get("role"), _parts(message.get("content"), index, limits)
        if role in ("system", "developer"):
            instructions += [part for part in parts if isinstance(part, str)]
        elif role == "user":
            conversation = conversation.user(parts)
        elif role == "assistant":
            conversation = conversation.assistant(_answer(given, parts, index, said))
        else:
            raise refused(
                f"messages[{index}].role",
                f"messages[{index}] has the role {str(role)[:40]!r}; spoken conversations have "
                "system, user and assistant",
            )
    conversation = replace(conversation, system=system_of("\n".join(instructions)))
    conversation.to_prompt(model)  # now, while nobody waits: turns remember what they became
    return conversation


def _parts(content: Any, index: int, limits: Limits) -> list[str | Audio]:
    found: list[str | Audio] = []
    for place, part in enumerate([content] if isinstance(content, str) else content or []):
        if isinstance(part, str):
            found.append(part)
        elif part["type"] == "text":
            found.append(part["text"])
        elif part["type"] == "audio":
            try:
                found.append(read_audio(part["audio"], max_seconds=limits.audio_seconds))
            except AudioTooLong as problem:
                raise ApiError(413, str(problem), code="audio_too_long") from None
        else:
            where = f"messages[{index}].content[{place}]"
            raise refused(where, f"{where} is no text and no sound; leave it out")
    return found


def _answer(given: Any, parts: list[str | Audio], index: int, said: Said) -> list[Any]:
    """Segments of an earlier answer: by its id, or its text."""
    audio = given.get("audio")
    if isinstance(audio, dict) and isinstance(audio.get("id"), str):
        segments = said.find(audio["id"])
        if segments is None:
            raise ApiError(
                400,
                f"messages[{index}].audio.id names an answer that is not kept here any more; send "
                "its transcript as content",
                code="audio_expired",
                param=f"messages[{index}].audio.id",
            )
        return segments
    return [part for part in parts if isinstance(part, str)]


@dataclass(kw_only=True)
class _Job:
    """One request, understood."""

    served: Served
    body: ChatRequest
    ticket: Ticket
    form: str
    said: Said
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    audio_id: str = field(default_factory=lambda: f"audio_{uuid.uuid4().hex}")
    segments: list[Any] = field(default_factory=list)

    def head(self, kind: str) -> dict[str, Any]:
        """Fields that every object of this answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.served.id,
        }


async def spoken_chat(body: ChatRequest, request: Request) -> Response:
    """Answer in text and speech.

    Raises:
        ApiError: 400 if something is asked for that spoken answers do not have.
    """
    context = context_of(request)
    job = await until_gone(request, _begin(body, context))
    if body.stream:
        return EventStream(_stream(job, context), job.ticket.cancel)
    return JSONResponse(await until_gone(request, _whole(job, context)))


async def _begin(body: ChatRequest, context: Context) -> _Job:
    limits = context.options.limits
    _check(body)
    form = body.audio.format if body.audio is not None else "wav"
    if body.stream and form != "pcm16":
        raise refused("audio.format", f"audio.format is {form}; streams carry pcm16 only")
    served = context.registry.find(body.model, "speech")
    model, said, most = served.model, Said.of(context), wanted_tokens(body, limits)
    conversation = await served.prepare(lambda: conversation_of(body, model, limits, said))
    ticket = context.worker.queue(
        model.engine,
        lambda: model.reply_stream(
            conversation,
            max_tokens=most,
            text_temperature=body.temperature or 0.0,
            text_top_k=body.top_k or 0,
            seed=body.seed,
        ),
    )
    try:
        if (refused_with := await ticket.begun) is not None:  # has a status, also before a stream
            raise refused_with
    except BaseException:
        ticket.cancel()
        raise
    return _Job(served=served, body=body, ticket=ticket, form=form, said=said)


def _check(body: ChatRequest) -> None:
    asked = {
        "tools": body.tools,
        "response_format": (body.response_format or {}).get("type", "text") != "text",
        "stop": body.stop,
        "logprobs": body.logprobs,
        "n": body.n > 1,
    }
    for name, wanted in asked.items():
        if wanted:
            raise refused(name, f"{name} is not done in spoken answers; leave it or audio out")
    if body.audio is not None and (voice := voice_of(body.audio.voice)) is not None:
        raise refused(
            "audio.voice", f"there is no voice {voice[:60]!r} in conversations; use 'default'"
        )


async def _whole(job: _Job, context: Context) -> dict[str, Any]:
    texts: list[str] = []
    sounds: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
    done: Done | None = None
    try:
        async with aclosing(_events(job, context)) as events:
            async for one in events:
                if isinstance(one, str):
                    texts.append(one)
                elif isinstance(one, Done):
                    done = one
                else:
                    sounds.append(one)
    except Exception:
        context.metrics.failed(job.served.id)
        raise
    assert done is not None
    context.metrics.ended(job.served.id, done)
    samples = np.concatenate(sounds)
    audio = {
        "id": job.audio_id,
        "data": base64.b64encode(await asyncio.to_thread(_file, samples, job.form)).decode("ascii"),
        "transcript": "".join(texts),
        "expires_at": job.said.keep(job.audio_id, job.segments),
    }
    message = {"role": "assistant", "content": None, "refusal": None, "audio": audio}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": _reason(done),
        "logprobs": None,
    }
    return {
        **job.head("chat.completion"),
        "choices": [choice],
        "usage": _usage(done),
        "lfm2_mm": _own(done),
    }


def _file(samples: np.ndarray, form: str) -> bytes:
    if form == "pcm16":
        return pcm16(samples)
    return Audio(torch.from_numpy(samples), RATE).to_bytes(form)


def _events(job: _Job, context: Context) -> Any:
    return spoken(context, job.served.model, job.ticket, job.segments.append)


async def _stream(job: _Job, context: Context) -> AsyncIterator[bytes]:
    """Server-sent events, ended by `[DONE]`; what fails on the way is an event, too."""
    head = job.head("chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event_line({**head, "choices": [choice]})

    def audio(**fields: Any) -> bytes:
        return chunk({"audio": fields})

    yield chunk({"role": "assistant", "audio": {"id": job.audio_id, "transcript": ""}})
    try:
        async with aclosing(_events(job, context)) as events:
            async for one in events:
                if isinstance(one, str):
                    yield audio(transcript=one)
                elif isinstance(one, np.ndarray):
                    yield audio(data=base64.b64encode(pcm16(one)).decode("ascii"))
                else:
                    context.metrics.ended(job.served.id, one)
                    yield audio(expires_at=job.said.keep(job.audio_id, job.segments))
                    yield chunk({}, _reason(one))
                    options = job.body.stream_options
                    if options is not None and options.include_usage:
                        own = {"choices": [], "usage": _usage(one), "lfm2_mm": _own(one)}
                        yield event_line({**head, **own})
    except Exception as problem:
        context.metrics.failed(job.served.id)
        yield event_line(body_of(from_exception(problem)))
        return
    finally:
        job.ticket.cancel()
    yield b"data: [DONE]\n\n"


def _reason(done: Done) -> str:
    return "stop" if done.finish_reason == "stop" else "length"


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "audio_tokens": usage.attachment_tokens,
        },
        "completion_tokens_details": {
            "audio_tokens": usage.audio_frames,
            "text_tokens": usage.completion_tokens - usage.audio_frames,
        },
    }


def _own(done: Done) -> dict[str, Any]:
    return {
        "first_token_seconds": round(done.timings.first_token, 4),
        "tokens_per_second": round(done.tokens_per_second, 1),
    }
