"""What a voice loop reports, one to one with the events of OpenAI's Realtime API (GA).

Plain frozen dataclasses; `to_realtime()` gives the JSON form. Events that the API does not have
are in `notes`. Knows nothing of the loop.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

__all__ = [
    "Committed",
    "ContentPartAdded",
    "ContentPartDone",
    "IdleTimeout",
    "ItemAdded",
    "ItemDone",
    "ItemTruncated",
    "OutputAudioDelta",
    "OutputAudioDone",
    "OutputCleared",
    "OutputItemAdded",
    "OutputItemDone",
    "OutputStarted",
    "OutputStopped",
    "ResponseCreated",
    "ResponseDone",
    "SpeechStarted",
    "SpeechStopped",
    "Status",
    "TranscriptDelta",
    "TranscriptDone",
    "VoiceError",
    "VoiceEvent",
    "assistant_item",
    "pcm16",
    "user_item",
]

Status = Literal["in_progress", "completed", "cancelled", "failed", "incomplete"]


def pcm16(samples: Float[np.ndarray, " n"]) -> bytes:
    """Samples as little-endian 16-bit integers, the Realtime API's `audio/pcm`; NaN is silence."""
    return bytes((np.clip(np.nan_to_num(samples), -1, 1) * 32767).astype("<i2").tobytes())


def user_item(item_id: str, *, text: str | None = None) -> dict[str, Any]:
    """What a user said, as a Realtime conversation item; without text it was speech."""
    content: dict[str, Any] = {"type": "input_audio", "transcript": None}
    if text is not None:
        content = {"type": "input_text", "text": text}
    return _item(item_id, "user", "completed", [content])


def assistant_item(item_id: str, status: Status, transcript: str | None = None) -> dict[str, Any]:
    """What the model said; without a transcript it has not begun."""
    content = []
    if transcript is not None:
        content = [{"type": "output_audio", "transcript": transcript}]
    done: Status = status if status in ("in_progress", "completed") else "incomplete"
    return _item(item_id, "assistant", done, content)


def _item(item_id: str, role: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": content,
    }


@dataclass(frozen=True, kw_only=True)
class VoiceEvent:
    """Base of all of them.

    Attributes:
        event_id: Unique within a loop.
        at_ms: When it happened, in milliseconds of audio heard; no part of the Realtime form.
    """

    type: ClassVar[str]

    event_id: str = ""
    at_ms: int = 0

    def to_realtime(self) -> dict[str, Any]:
        """The JSON form: what OpenAI's clients read, or for our own events the like of it."""
        return {"type": self.type, "event_id": self.event_id, **self._body()}

    def _body(self) -> dict[str, Any]:
        own = {"event_id", "at_ms"}
        return {name: value for name, value in vars(self).items() if name not in own}


@dataclass(frozen=True, kw_only=True)
class SpeechStarted(VoiceEvent):
    """A user's turn has begun, `audio_start_ms` into what was heard, prefix included."""

    type: ClassVar[str] = "input_audio_buffer.speech_started"
    audio_start_ms: int
    item_id: str


@dataclass(frozen=True, kw_only=True)
class SpeechStopped(VoiceEvent):
    """A user's turn is over."""

    type: ClassVar[str] = "input_audio_buffer.speech_stopped"
    audio_end_ms: int
    item_id: str


@dataclass(frozen=True, kw_only=True)
class Committed(VoiceEvent):
    """What was said is an item of the conversation now."""

    type: ClassVar[str] = "input_audio_buffer.committed"
    item_id: str
    previous_item_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class IdleTimeout(VoiceEvent):
    """Nobody has spoken for as long as the settings say."""

    type: ClassVar[str] = "input_audio_buffer.timeout_triggered"
    audio_start_ms: int
    audio_end_ms: int
    item_id: str


@dataclass(frozen=True, kw_only=True)
class ItemAdded(VoiceEvent):
    """An item stands in the conversation."""

    type: ClassVar[str] = "conversation.item.added"
    item: dict[str, Any]
    previous_item_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ItemDone(VoiceEvent):
    """An item is complete."""

    type: ClassVar[str] = "conversation.item.done"
    item: dict[str, Any]
    previous_item_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ItemTruncated(VoiceEvent):
    """An answer was cut to what was heard of it."""

    type: ClassVar[str] = "conversation.item.truncated"
    item_id: str
    audio_end_ms: int
    content_index: int = 0


@dataclass(frozen=True, kw_only=True)
class ResponseCreated(VoiceEvent):
    """An answer is in the making."""

    type: ClassVar[str] = "response.created"
    response_id: str

    def _body(self) -> dict[str, Any]:
        return {"response": _response(self.response_id, "in_progress", [], None)}


@dataclass(frozen=True, kw_only=True)
class ResponseDone(VoiceEvent):
    """No more comes of an answer; its sound may still be playing.

    Attributes:
        reason: Why it was cancelled (`turn_detected`, `client_cancelled`) or is incomplete
            (`max_output_tokens`).
        message: What failed, if it did.
        item: The answer as an item; None if there is none.
        usage: Positions of the prompt, those of them found computed, and generated ones.
    """

    type: ClassVar[str] = "response.done"
    response_id: str
    status: Status
    reason: str | None = None
    message: str | None = None
    item: dict[str, Any] | None = None
    usage: tuple[int, int, int] | None = None

    def _body(self) -> dict[str, Any]:
        details: dict[str, Any] | None = {"type": self.status}
        if self.reason is not None:
            details = {"type": self.status, "reason": self.reason}
        if self.message is not None:
            error = {"type": "server_error", "code": None, "message": self.message}
            details = {"type": self.status, "error": error}
        items = [] if self.item is None else [self.item]
        body = _response(self.response_id, self.status, items, details)
        if self.usage is not None:
            given, cached, made = self.usage
            body["usage"] = {
                "total_tokens": given + made,
                "input_tokens": given,
                "output_tokens": made,
                "input_token_details": {"cached_tokens": cached},
            }
        return {"response": body}


def _response(
    response_id: str, status: Status, output: list[dict[str, Any]], details: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "realtime.response",
        "status": status,
        "status_details": details,
        "output": output,
        "output_modalities": ["audio"],
        "usage": None,
    }


@dataclass(frozen=True, kw_only=True)
class _Output(VoiceEvent):
    """What belongs to the one item of an answer."""

    response_id: str
    item_id: str
    output_index: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputItemAdded(VoiceEvent):
    """The item of an answer exists."""

    type: ClassVar[str] = "response.output_item.added"
    response_id: str
    item: dict[str, Any]
    output_index: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputItemDone(VoiceEvent):
    """The item of an answer is complete."""

    type: ClassVar[str] = "response.output_item.done"
    response_id: str
    item: dict[str, Any]
    output_index: int = 0


@dataclass(frozen=True, kw_only=True)
class ContentPartAdded(_Output):
    """The spoken part of an answer exists."""

    type: ClassVar[str] = "response.content_part.added"
    content_index: int = 0

    def _body(self) -> dict[str, Any]:
        return {**super()._body(), "part": {"type": "audio", "transcript": ""}}


@dataclass(frozen=True, kw_only=True)
class ContentPartDone(_Output):
    """The spoken part of an answer is complete."""

    type: ClassVar[str] = "response.content_part.done"
    transcript: str
    content_index: int = 0

    def _body(self) -> dict[str, Any]:
        body = super()._body()
        part = {"type": "audio", "transcript": body.pop("transcript")}
        return {**body, "part": part}


@dataclass(frozen=True, kw_only=True)
class TranscriptDelta(_Output):
    """The next piece of the text of an answer."""

    type: ClassVar[str] = "response.output_audio_transcript.delta"
    delta: str
    content_index: int = 0


@dataclass(frozen=True, kw_only=True)
class TranscriptDone(_Output):
    """The text of an answer is complete."""

    type: ClassVar[str] = "response.output_audio_transcript.done"
    transcript: str
    content_index: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputAudioDelta(_Output):
    """The next piece of the sound of an answer.

    Attributes:
        samples: Mono, fp32 within -1 and 1.
        rate: Samples per second; the Realtime form holds them at this rate, as 16-bit PCM.
    """

    type: ClassVar[str] = "response.output_audio.delta"
    samples: Float[np.ndarray, " n"]
    rate: int
    content_index: int = 0

    def _body(self) -> dict[str, Any]:
        body = super()._body()
        del body["samples"], body["rate"]
        return {**body, "delta": base64.b64encode(pcm16(self.samples)).decode("ascii")}


@dataclass(frozen=True, kw_only=True)
class OutputAudioDone(_Output):
    """The sound of an answer is complete."""

    type: ClassVar[str] = "response.output_audio.done"
    content_index: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputStarted(VoiceEvent):
    """The first sample of an answer was given out."""

    type: ClassVar[str] = "output_audio_buffer.started"
    response_id: str


@dataclass(frozen=True, kw_only=True)
class OutputStopped(VoiceEvent):
    """The last sample of an answer was given out."""

    type: ClassVar[str] = "output_audio_buffer.stopped"
    response_id: str


@dataclass(frozen=True, kw_only=True)
class OutputCleared(VoiceEvent):
    """What waited of an answer was dropped."""

    type: ClassVar[str] = "output_audio_buffer.cleared"
    response_id: str


@dataclass(frozen=True, kw_only=True)
class VoiceError(VoiceEvent):
    """Something failed, in one sentence; the loop goes on.

    Attributes:
        kind: `invalid_request_error` for what was handed in, else `server_error`.
    """

    type: ClassVar[str] = "error"
    message: str
    kind: Literal["invalid_request_error", "server_error"] = "server_error"
    code: str | None = None

    def _body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "code": self.code, "message": self.message}}
