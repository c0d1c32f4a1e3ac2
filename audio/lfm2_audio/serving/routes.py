"""`/v1/audio/transcriptions`, `/v1/audio/speech` and `/v1/realtime`: speech over HTTP.

Found by the server through the entry point `lfm2_mm.routes`. Knows requests and answers; how speech
is heard, made and encoded is others'.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from lfm2_audio.segments import RATE as HEARD_RATE
from lfm2_audio.segments import joined
from lfm2_audio.serving.encoding import MEDIA_TYPES, Encoder
from lfm2_audio.serving.listening import Listening, threads
from lfm2_audio.serving.realtime import realtime_socket
from lfm2_audio.serving.recordings import Recordings
from lfm2_audio.serving.schema import SpeechRequest, TranscriptionRequest, voice_of
from lfm2_audio.serving.sounding import RATE, spoken
from lfm2_audio.serving.spoken import spoken_chat
from lfm2_audio.speaking import text_pieces
from lfm2_audio.subtitles import as_srt, as_txt, as_vtt
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm.errors import AudioTooLong
from lfm2_mm.events import Done
from lfm2_mm.server.context import Context, context_of, until_gone
from lfm2_mm.server.document import gives
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.registry import Served
from lfm2_mm.server.streaming import EventStream, event_line

__all__ = ["answer_modes", "read_upload", "router"]

router = APIRouter()
answer_modes = {"audio": spoken_chat}

_PAUSE = 0.2  # seconds between two pieces of a long text
_NO_STORE = {"cache-control": "no-store", "x-accel-buffering": "no"}


# --- speech in ---------------------------------------------------------------------------------


@router.post(
    "/v1/audio/transcriptions",
    tags=["audio"],
    responses=gives(
        "application/json", "text/plain", "application/x-subrip", "text/vtt", "text/event-stream"
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "model": {"type": "string"},
                            "language": {"type": "string"},
                            "response_format": {
                                "enum": ["json", "text", "srt", "vtt", "verbose_json"]
                            },
                            "stream": {"type": "boolean"},
                            "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                        },
                    }
                }
            },
        }
    },
)
async def transcriptions(request: Request) -> Response:
    """Write down what is said in a recording (text, subtitles, segments with times, streaming)."""
    context = context_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            415,
            f"the body is {kind[:60]!r}; send multipart/form-data with the recording in file",
            code="unsupported_media_type",
        )
    limits = context.options.limits
    async with request.form(max_files=1, max_fields=40) as form:
        file = form.get("file")
        wanted = TranscriptionRequest.of(form)
        served = context.registry.find(wanted.model, "transcription")
        if not isinstance(file, UploadFile):
            raise ApiError(
                400, "the form has no recording; send it in the field file", code="no_file"
            )
        if (file.size or 0) > limits.audio_bytes:
            raise ApiError(
                413,
                f"the recording holds {file.size:,} bytes, and the limit is "
                f"{limits.audio_bytes:,}; send a shorter or compressed one",
                code="audio_too_large",
                param="file",
            )
        recordings = Recordings.of(context)
        reading = partial(_decoded, file, context)
        audio = await until_gone(request, recordings.take(reading))
    given = partial(recordings.give, audio)
    if wanted.stream:
        options = {"language": wanted.told, "temperature": wanted.temperature}
        return EventStream(_transcript_events(context, served, audio, options), given)
    try:
        return await _transcript(request, served, audio, wanted)
    finally:
        given()


async def _decoded(file: UploadFile, context: Context) -> Audio:
    reading = partial(read_upload, await file.read(), context.options.limits)
    pool = threads(context, "recordings")
    return await asyncio.get_running_loop().run_in_executor(pool, reading)


async def _transcript(
    request: Request, served: Served, audio: Audio, wanted: TranscriptionRequest
) -> Response:
    """All of it at once, in the form that is wanted."""
    context = context_of(request)
    options = {"language": wanted.told, "temperature": wanted.temperature}
    timed = wanted.form in ("srt", "vtt", "verbose_json")
    listening = Listening(context, served, audio, timed=timed, options=options)
    try:
        segments = await until_gone(request, listening.run())
    except Exception:
        context.metrics.failed(served.id)
        raise
    duration = round(audio.duration, 3)
    if wanted.form == "text":
        return PlainTextResponse(as_txt(segments, duration))
    if wanted.form == "srt":
        return PlainTextResponse(as_srt(segments, duration), media_type="application/x-subrip")
    if wanted.form == "vtt":
        return PlainTextResponse(as_vtt(segments, duration), media_type="text/vtt")
    text = joined(segments)
    if wanted.form == "json":
        return JSONResponse({"text": text, "usage": _usage(listening.done)})
    rows = [
        {"id": i, "start": round(s.start, 3), "end": round(s.end, 3), "text": s.text}
        for i, s in enumerate(segments)
    ]
    return JSONResponse(
        {
            "task": "transcribe",
            "language": wanted.language or "unknown",
            "duration": duration,
            "text": text,
            "segments": rows,
            "usage": {"type": "duration", "seconds": duration},
        }
    )


@router.post("/v1/audio/translations", tags=["audio"])
async def translations(request: Request) -> Response:
    """Not done: a refusal that says what to do."""
    raise ApiError(
        400,
        "speech is not translated here; transcribe it with /v1/audio/transcriptions and ask a chat "
        "model to translate the text",
        code="unsupported",
    )


def read_upload(data: bytes, limits: Limits) -> Audio:
    """A recording that somebody sent, at 16 kHz.

    Raises:
        ApiError: 413 if it is too long.
        AudioError: if it cannot be read.
    """
    try:
        return read_audio(data, rate=HEARD_RATE, max_seconds=limits.audio_seconds)
    except AudioTooLong:
        raise ApiError(
            413,
            f"the recording is longer than {limits.audio_seconds / 60:g} minutes; cut it into "
            "parts",
            code="audio_too_long",
            param="file",
        ) from None


async def _transcript_events(
    context: Context, served: Served, audio: Audio, options: dict[str, Any]
) -> AsyncIterator[bytes]:
    """`transcript.text.delta` as text comes, and `transcript.text.done` with all of it."""
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    listening = Listening(context, served, audio, on_text=queue.put_nowait, options=options)
    task = asyncio.ensure_future(listening.run())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (text := await queue.get()) is not None:
            yield event_line({"type": "transcript.text.delta", "delta": text})
        try:
            segments = task.result()
        except Exception as problem:
            context.metrics.failed(served.id)
            yield event_line({"type": "error", **body_of(from_exception(problem))})
            return
        usage = _usage(listening.done)
        whole = {"type": "transcript.text.done", "text": joined(segments), "usage": usage}
        yield event_line(whole)
        yield b"data: [DONE]\n\n"
    finally:
        task.cancel()


# --- speech out --------------------------------------------------------------------------------


@router.post(
    "/v1/audio/speech",
    tags=["audio"],
    response_class=Response,
    responses=gives(*MEDIA_TYPES.values(), "text/event-stream"),
)
async def speech(body: SpeechRequest, request: Request) -> Response:
    """Read a text aloud; the sound is sent while it is made."""
    context = context_of(request)
    body.check()
    served = context.registry.find(body.model, "speech")
    chunks = _said(context, served, body)
    first = await until_gone(request, _first(chunks))  # an error still has a status
    sse = body.stream_format == "sse"
    return StreamingResponse(
        _sound_events(chunks, first, body) if sse else _sound(chunks, first, body),
        media_type="text/event-stream" if sse else MEDIA_TYPES[body.response_format],
        headers=_NO_STORE,
    )


async def _first(chunks: AsyncIterator[np.ndarray | Done]) -> np.ndarray | Done | None:
    return await anext(chunks, None)


async def _said(
    context: Context, served: Served, body: SpeechRequest
) -> AsyncIterator[np.ndarray | Done]:
    """Samples as they come, with a short pause between pieces of a long text, and the ends."""
    model, voice = served.model, voice_of(body.voice)
    names = ("temperature", "top_k", "seed")
    options = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    pieces = text_pieces(body.input)
    for place, piece in enumerate(pieces):
        if place:
            yield np.zeros(int(_PAUSE * RATE), dtype=np.float32)
        ticket = context.worker.queue(
            model.engine, partial(model.speak_stream, piece, voice=voice, **options)
        )
        try:
            async with aclosing(spoken(context, model, ticket)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        context.metrics.ended(served.id, event)
                    if not isinstance(event, str):
                        yield event
        except Exception:
            context.metrics.failed(served.id)
            raise


async def _sound(
    chunks: AsyncIterator[np.ndarray | Done], first: np.ndarray | Done | None, body: SpeechRequest
) -> AsyncIterator[bytes]:
    encoder = Encoder(body.response_format, RATE)
    async for samples in _with_first(chunks, first):
        if isinstance(samples, np.ndarray) and (data := encoder.push(samples)):
            yield data
    yield encoder.finish()


async def _sound_events(
    chunks: AsyncIterator[np.ndarray | Done], first: np.ndarray | Done | None, body: SpeechRequest
) -> AsyncIterator[bytes]:
    """`speech.audio.delta` with bytes of the sound file in base64, then `speech.audio.done`."""
    encoder = Encoder(body.response_format, RATE)
    made = given = 0

    def delta(data: bytes) -> bytes:
        text = base64.b64encode(data).decode("ascii")
        return event_line({"type": "speech.audio.delta", "audio": text})

    try:
        async for one in _with_first(chunks, first):
            if isinstance(one, Done):
                given += one.usage.prompt_tokens
                made += one.usage.completion_tokens
            elif data := encoder.push(one):
                yield delta(data)
    except Exception as problem:
        yield event_line({"type": "error", **body_of(from_exception(problem))})
        return
    if data := encoder.finish():
        yield delta(data)
    usage = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
    yield event_line({"type": "speech.audio.done", "usage": usage})
    yield b"data: [DONE]\n\n"


async def _with_first(
    chunks: AsyncIterator[np.ndarray | Done], first: np.ndarray | Done | None
) -> AsyncIterator[np.ndarray | Done]:
    if first is not None:
        yield first
    async for one in chunks:
        yield one


# --- both --------------------------------------------------------------------------------------


@router.websocket("/v1/realtime")
async def realtime(socket: WebSocket) -> None:
    """A voice conversation in the events of OpenAI's Realtime API (GA)."""
    await realtime_socket(socket, context_of(socket))


def _usage(done: Done) -> dict[str, Any]:
    given, made = done.usage.prompt_tokens, done.usage.completion_tokens
    heard = done.usage.attachment_tokens
    return {
        "type": "tokens",
        "input_tokens": given,
        "output_tokens": made,
        "total_tokens": given + made,
        "input_token_details": {"audio_tokens": heard, "text_tokens": given - heard},
    }
