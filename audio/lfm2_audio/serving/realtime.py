"""`WS /v1/realtime`: one conversation on one socket, in the events of OpenAI's Realtime API (GA).

Reads a client's events and writes the loop's. Hearing runs in a thread, in order; thinking in the
server's worker; a clock of its own plays, so that the loop knows what was heard, while sound goes
to the client as soon as it is made. Knows sockets and events; what makes a turn is the loop's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import WebSocket
from fastapi.responses import JSONResponse
from starlette.websockets import WebSocketDisconnect

from lfm2_audio.serving.calling import Call, no_item, said_call
from lfm2_audio.serving.items import item_of, sound_of
from lfm2_audio.serving.listening import threads
from lfm2_audio.serving.minutes import Minutes
from lfm2_audio.serving.remote import RemoteLoop
from lfm2_audio.serving.schema import refused
from lfm2_audio.serving.session import SessionSettings
from lfm2_audio.serving.sounding import RATE, Resampler
from lfm2_audio.serving.spoken import instructed, system_of
from lfm2_audio.voice import events as say
from lfm2_audio.voice.events import pcm16
from lfm2_audio.voice.notes import TurnLatency
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import Lfm2Error
from lfm2_mm.server.context import Context
from lfm2_mm.server.problems import ApiError, body_of, from_exception
from lfm2_mm.server.registry import Served

__all__ = ["realtime_socket"]

log = logging.getLogger("lfm2_mm.server")
_T = TypeVar("_T")

_TICK = 0.02  # seconds between two looks at what is to be played
_BUFFER = 60 * RATE * 2  # bytes that wait for a commit where turns are made by hand
_SHORTEST = RATE // 10 * 2  # bytes of a turn, at least
_GOODBYE = 5.0  # seconds for the last words to a client
_UNREAD = 4096  # events that a slow client may leave unread
_TOO_BIG, _TOO_SLOW, _GOING, _BROKEN = 1009, 1008, 1000, 1011


class _Close(Exception):
    """The conversation is to end."""

    def __init__(self, code: int, problem: ApiError) -> None:
        super().__init__(str(problem))
        self.code, self.problem = code, problem


async def realtime_socket(socket: WebSocket, context: Context) -> None:
    """Serve one client until one side goes."""
    open_: set[_Conversation] = context.extras.setdefault("audio.conversations", set())
    most = context.options.limits.sockets
    try:
        served = context.registry.find(socket.query_params.get("model"), "realtime")
        if len(open_) >= most:
            raise ApiError(
                429,
                f"{len(open_)} conversations are going on, and the limit is {most}; try again "
                "when one has ended",
                code="too_many_conversations",
                retry_after=10,
            )
    except ApiError as problem:
        answer = JSONResponse(body_of(problem), problem.status, headers=problem.headers)
        await socket.send_denial_response(answer)
        return
    wanted = socket.scope.get("subprotocols", ())
    conversation = _Conversation(socket, context, served)
    open_.add(conversation)
    try:
        await socket.accept("realtime" if "realtime" in wanted else None)
        await conversation.run()
    finally:
        open_.discard(conversation)


class _Conversation:
    """One client."""

    def __init__(self, socket: WebSocket, context: Context, served: Served) -> None:
        self._socket, self._context, self._served = socket, context, served
        self._id = f"sess_{uuid.uuid4().hex}"
        self._settings = SessionSettings()
        self._events: asyncio.Queue[dict[str, Any] | say.VoiceEvent] = asyncio.Queue()
        self._loop_of_events = asyncio.get_running_loop()
        self._buffer = bytearray()  # what waits for a commit, where turns are made by hand
        self._minutes = Minutes(context, served, self._tell)
        self._resampler: Resampler | None = None
        self._voice: RemoteLoop

    async def run(self) -> None:
        """Until one side goes."""
        self._tell("session.created", session=self._session())
        tasks = [asyncio.create_task(self._send())]
        try:
            self._voice = await self._open()
            self._context.worker.invite(self._voice.work)
            tasks.append(asyncio.create_task(self._play()))
            tasks.append(asyncio.create_task(self._receive()))
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        except WebSocketDisconnect:
            return
        except _Close as why:
            await self._say_goodbye(tasks[0], why.problem, why.code)
        except Exception as problem:
            told = from_exception(problem)
            if told.code == "internal":
                log.exception("a realtime conversation failed")
            await self._say_goodbye(tasks[0], told, _BROKEN)
        finally:
            self._minutes.close()
            await self._close([*tasks, *self._minutes.tasks])

    async def _open(self) -> RemoteLoop:
        model = self._served.model
        await self._context.worker.run(lambda: model.codec, guarded=False)
        made = partial(
            RemoteLoop,
            model,
            model.conversation(system_of(None)),
            settings=self._settings.voice(VoiceSettings()),
            emit=partial(self._from_loop, self._queue),
            on_turn=partial(self._from_loop, self._take_turn),
        )
        return await self._threaded(made)

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "_voice"):
            self._context.worker.dismiss(self._voice.work)
            await asyncio.shield(self._threaded(self._voice.close))

    async def _say_goodbye(self, sender: asyncio.Task[None], problem: ApiError, code: int) -> None:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
        self._fail(problem)
        with suppress(Exception):  # the client may be gone, or read nothing any more
            async with asyncio.timeout(_GOODBYE):
                while not self._events.empty():
                    await self._socket.send_text(self._written(self._events.get_nowait()))
                await self._socket.close(code, str(problem)[:100])

    async def _threaded(self, work: Callable[[], _T]) -> _T:
        return await self._loop_of_events.run_in_executor(threads(self._context, "voices"), work)

    # -- from the loop to the client ---------------------------------------------------------

    def _from_loop(self, take: Callable[..., None], *given: Any) -> None:
        """For other threads: hand something to the event loop."""
        with suppress(RuntimeError):  # the event loop is gone, and with it whoever would read
            self._loop_of_events.call_soon_threadsafe(take, *given)

    def _take_turn(self, item_id: str, audio: Audio, answered: bool) -> None:
        if self._settings.transcription:
            language = self._settings.language
            self._minutes.take(item_id, audio, answered=answered, language=language)

    def _queue(self, event: dict[str, Any] | say.VoiceEvent) -> None:
        self._events.put_nowait(event)

    def _tell(self, kind: str, **fields: Any) -> None:
        self._queue({"type": kind, "event_id": f"event_{uuid.uuid4().hex}", **fields})

    def _fail(self, problem: ApiError, event_id: str | None = None) -> None:
        error = {**body_of(problem)["error"], "event_id": event_id}
        self._tell("error", error=error)

    def _session(self) -> dict[str, Any]:
        return self._settings.to_realtime(self._id, self._served.id)

    async def _send(self) -> None:
        while True:
            event = await self._events.get()
            await self._socket.send_text(self._written(event))
            if isinstance(event, say.OutputAudioDelta | say.ResponseDone):
                self._minutes.begin()

    def _written(self, event: dict[str, Any] | say.VoiceEvent) -> str:
        if isinstance(event, dict):
            return json.dumps(event)  # ASCII, so that a lone surrogate can be sent, too
        form = event.to_realtime()
        if isinstance(event, say.OutputAudioDelta) and event.rate != RATE:
            self._resampler = self._resampler or Resampler(event.rate)
            sound = pcm16(self._resampler.push(event.samples))
            form["delta"] = base64.b64encode(sound).decode("ascii")
        elif isinstance(event, say.OutputAudioDone):
            self._resampler = None
        elif isinstance(event, TurnLatency):
            form["text"] = event.line()
        if form["type"].startswith("lfm2_mm."):
            form["at_ms"] = event.at_ms
        return json.dumps(form)

    # -- the clock ---------------------------------------------------------------------------

    async def _play(self) -> None:
        began, played = time.monotonic(), 0
        while True:
            await asyncio.sleep(_TICK)
            if self._events.qsize() > _UNREAD:
                text = "the client does not read what is sent; read faster"
                raise _Close(_TOO_SLOW, ApiError(408, text, code="too_slow"))
            if not self._context.worker.invited(self._voice.work):  # it failed; the log has it
                text = "the model failed in this conversation; connect again"
                raise _Close(_BROKEN, ApiError(503, text, code="model_failed"))
            due = int((time.monotonic() - began) * self._voice.rate)
            self._voice.play(due - played)
            played = due
            if self._voice.busy:
                self._context.worker.nudge()

    # -- from the client to the loop ---------------------------------------------------------

    async def _receive(self) -> None:
        limits = self._context.options.limits
        while True:
            try:
                message = await asyncio.wait_for(self._socket.receive(), limits.idle_seconds)
            except TimeoutError:
                text = f"nothing was sent for {limits.idle_seconds:g} seconds; connect again"
                raise _Close(_GOING, ApiError(408, text, code="idle")) from None
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1000))
            data = message.get("text") or message.get("bytes") or b""
            if len(data) > limits.frame_bytes:
                text = f"a message is larger than {limits.frame_bytes:,} bytes; send less at a time"
                raise _Close(_TOO_BIG, ApiError(413, text, code="message_too_large"))
            await self._handle(data)

    async def _handle(self, data: str | bytes) -> None:
        event_id = None
        try:
            try:
                event = json.loads(data)
            except (ValueError, RecursionError):
                raise _bad("the message is not valid JSON; correct it", "bad_json") from None
            if not isinstance(event, dict) or not isinstance(event.get("type"), str):
                raise _bad("the message is no event; send an object with a type", "bad_event")
            if isinstance(event.get("event_id"), str):
                event_id = event["event_id"][:200]
            handler = _HANDLERS.get(event["type"])
            if handler is None:
                raise _bad(
                    f"there is no event {event['type'][:60]!r} here; see docs/serving.md",
                    "unknown_event",
                )
            await handler(self, event)
        except (ApiError, Lfm2Error) as problem:
            self._fail(from_exception(problem), event_id)
        self._voice.busy = True
        self._context.worker.nudge()

    async def _update(self, event: dict[str, Any]) -> None:
        given = event.get("session")
        if not isinstance(given, dict):
            raise refused("session", "session is no object; give one")
        new, left_out = self._settings.updated(given)
        if new.transcription and not hasattr(self._served.model, "transcribe_stream"):
            new = replace(new, transcription=False)
            left_out.append("audio.input.transcription")
        voice, detection = new.voice(self._voice.settings), new.detection
        change = partial(instructed, text=new.told)
        self._check_tools(new)

        def apply() -> None:
            if (new.detection is None) != (self._settings.detection is None):
                self._voice.drop()
            self._voice.configure(
                voice,
                automatic=detection is not None and detection.create_response,
                max_tokens=new.max_tokens,
                tools=new.tools,
            )
            if new.told != self._settings.told:
                self._voice.instruct(change)

        await self._threaded(apply)
        self._settings = new
        self._tell("session.updated", session=self._session())
        if left_out:
            names = ", ".join(left_out)
            self._tell("lfm2_mm.notice", message=f"left out, for it is not done here: {names}")

    async def _append(self, event: dict[str, Any]) -> None:
        text = event.get("audio")
        try:
            data = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
        except (binascii.Error, ValueError):
            raise refused("audio", "audio is not valid base64; encode the bytes again") from None
        if len(data) % 2:
            raise refused("audio", f"audio holds {len(data)} bytes, but samples have two; send all")
        if self._settings.detection is not None:
            samples = np.frombuffer(data, dtype="<i2")
            await self._threaded(partial(self._voice.listen, samples, RATE))
        elif len(self._buffer) + len(data) > _BUFFER:
            raise refused("audio", "the buffer is full (one minute); commit it, or clear it")
        else:
            self._buffer += data

    async def _commit(self, event: dict[str, Any]) -> None:
        if self._settings.detection is not None:
            if not await self._threaded(self._voice.commit):
                raise _bad(
                    "no turn is on that could be committed; speak, or turn turn_detection off",
                    "input_audio_buffer_commit_empty",
                )
            return
        if len(self._buffer) < _SHORTEST:
            raise _bad(
                f"the buffer holds {len(self._buffer) // 48} ms of sound; append at least 100 ms "
                "before it is committed",
                "input_audio_buffer_commit_empty",
            )
        data, self._buffer = bytes(self._buffer), bytearray()
        put = partial(self._voice.put, "user", sound_of(data), committed=True)
        await self._threaded(put)

    async def _clear(self, event: dict[str, Any]) -> None:
        self._buffer.clear()
        await self._threaded(self._voice.drop)
        self._tell("input_audio_buffer.cleared")

    async def _create_item(self, event: dict[str, Any]) -> None:
        def put() -> None:
            item = item_of(event, self._voice.called)
            said, model = item.content, self._served.model
            self._voice.put(
                item.role,
                said_call(model, said) if isinstance(said, Call) else said,
                item_id=item.id,
                shown=item.shown,
                after=item.after,
            )

        await self._threaded(put)

    async def _retrieve(self, event: dict[str, Any]) -> None:
        item_id = str(event.get("item_id"))
        item = await self._threaded(partial(self._voice.item, item_id))
        if item is None:
            raise no_item("item_retrieve_invalid_item_id", item_id)
        self._tell("conversation.item.retrieved", item=item)

    async def _delete(self, event: dict[str, Any]) -> None:
        item_id = str(event.get("item_id"))
        if not await self._threaded(partial(self._voice.delete, item_id)):
            raise no_item("item_delete_invalid_item_id", item_id)

    async def _truncate(self, event: dict[str, Any]) -> None:
        item_id, end = event.get("item_id"), event.get("audio_end_ms")
        if not isinstance(item_id, str) or not isinstance(end, int) or not 0 <= end < 10**9:
            raise refused("item_id", "truncating needs item_id and audio_end_ms; give both")
        if why := await self._threaded(partial(self._voice.cut, item_id, end)):
            raise _bad(why, "item_truncate_invalid_item_id")

    async def _respond(self, event: dict[str, Any]) -> None:
        own = self._settings.for_answer(event.get("response"))
        self._check_tools(own)
        respond = self._voice.respond
        if own is not self._settings:
            how = partial(instructed, text=own.told)
            undo = partial(instructed, text=self._settings.told)
            respond = partial(respond, own.tools, how, undo)
        if why := await self._threaded(respond):
            active = why.startswith("an answer")
            raise _bad(
                why,
                "conversation_already_has_active_response" if active else "nothing_to_answer",
            )

    def _check_tools(self, settings: SessionSettings) -> None:
        if settings.tools.schema is not None and not hasattr(self._served.model, "engine"):
            raise refused("tool_choice", "this model cannot be made to call; leave it at auto")

    async def _cancel(self, event: dict[str, Any]) -> None:
        if not await self._threaded(self._voice.cancel):
            raise _bad("no answer is on its way", "response_cancel_not_active")

    async def _stop_output(self, event: dict[str, Any]) -> None:
        await self._threaded(self._voice.cancel)


_HANDLERS: dict[str, Callable[[_Conversation, dict[str, Any]], Any]] = {
    "session.update": _Conversation._update,
    "input_audio_buffer.append": _Conversation._append,
    "input_audio_buffer.commit": _Conversation._commit,
    "input_audio_buffer.clear": _Conversation._clear,
    "conversation.item.create": _Conversation._create_item,
    "conversation.item.delete": _Conversation._delete,
    "conversation.item.retrieve": _Conversation._retrieve,
    "conversation.item.truncate": _Conversation._truncate,
    "response.create": _Conversation._respond,
    "response.cancel": _Conversation._cancel,
    "output_audio_buffer.clear": _Conversation._stop_output,
}


def _bad(message: str, code: str) -> ApiError:
    return ApiError(400, message, code=code)
