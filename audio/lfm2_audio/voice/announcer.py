"""Says what happens in the order that the Realtime API's clients expect, and numbers it.

Knows events and answers; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfm2_audio.voice import events as say
from lfm2_audio.voice.answer import Answer, Made, Warm, sentence
from lfm2_audio.voice.notes import Warmed
from lfm2_mm.errors import InputError

__all__ = ["Announcer"]


class Announcer:
    """Numbers events and items, and hands the events on.

    Args:
        emit: Takes each event.

    Attributes:
        now_ms: The time that events get.
        item: The user's turn that is on, or was last.
        last_item: The newest item of the conversation.
    """

    def __init__(self, emit: Callable[[say.VoiceEvent], None]) -> None:
        self._emit = emit
        self._counts = {"event": 0, "item": 0, "resp": 0}
        self._begun: Answer | None = None
        self.now_ms = 0
        self.item = ""
        self.last_item: str | None = None

    def number(self, kind: str) -> int:
        """The next number of a kind."""
        self._counts[kind] += 1
        return self._counts[kind]

    def tell(self, event: Callable[..., say.VoiceEvent], /, **fields: Any) -> None:
        """One event."""
        self._emit(event(event_id=f"event_{self.number('event'):06d}", at_ms=self.now_ms, **fields))

    def new_item(self) -> str:
        """The id of a further item of the user's."""
        return f"item_{self.number('item'):06d}"

    def question(self, text: str | None) -> None:
        """The user's turn `item` stands in the conversation; without text it was speech."""
        before, self.last_item = self.last_item, self.item
        self.tell(say.Committed, item_id=self.item, previous_item_id=before)
        item = say.user_item(self.item, text=text)
        self.tell(say.ItemAdded, item=item, previous_item_id=before)
        self.tell(say.ItemDone, item=item, previous_item_id=before)

    def idle(self, start_ms: int, end_ms: int) -> None:
        """Nobody has spoken for long."""
        item = self.new_item()
        self.tell(say.IdleTimeout, audio_start_ms=start_ms, audio_end_ms=end_ms, item_id=item)

    def warmed(self, warm: Warm) -> None:
        """A conversation was computed ahead; nothing is said of one that failed."""
        if warm.done is not None:
            usage = warm.done.usage
            computed = usage.prompt_tokens - usage.cached_tokens
            self.tell(Warmed, positions=usage.prompt_tokens, computed=computed)

    def made(self, answer: Answer, made: Made) -> None:
        """What a step of an answer brought."""
        ids = {"response_id": answer.response_id, "item_id": answer.item_id}
        if made.kind in ("text", "audio") and self._begun is not answer:
            self._begun = answer
            item = say.assistant_item(answer.item_id, "in_progress")
            self.tell(say.OutputItemAdded, response_id=answer.response_id, item=item)
            self.tell(say.ItemAdded, item=item, previous_item_id=self.last_item)
            self.tell(say.ContentPartAdded, **ids)
        if made.kind == "text":
            self.tell(say.TranscriptDelta, delta=made.text, **ids)
        elif made.samples is not None:
            self.tell(say.OutputAudioDelta, samples=made.samples, rate=answer.rate, **ids)
        elif made.kind == "done":
            reason = None if answer.done is None else answer.done.finish_reason
            if reason == "length":
                self.over(answer, "incomplete", reason="max_output_tokens")
            elif reason == "stop":
                self.over(answer, "completed")
            else:
                self.over(answer, "cancelled", reason="client_cancelled")
        elif made.error is not None:
            kind = "invalid_request_error" if isinstance(made.error, InputError) else "server_error"
            self.tell(say.VoiceError, message=sentence(made.error), kind=kind)
            self.over(answer, "failed", message=sentence(made.error))

    def over(
        self,
        answer: Answer,
        status: say.Status,
        *,
        reason: str | None = None,
        message: str | None = None,
    ) -> None:
        """No more comes of an answer."""
        item = usage = None
        if self._begun is answer:
            ids = {"response_id": answer.response_id, "item_id": answer.item_id}
            text = answer.text
            item = say.assistant_item(answer.item_id, status, text)
            self.tell(say.OutputAudioDone, **ids)
            self.tell(say.TranscriptDone, transcript=text, **ids)
            self.tell(say.ContentPartDone, transcript=text, **ids)
            self.tell(say.OutputItemDone, response_id=answer.response_id, item=item)
            self.tell(say.ItemDone, item=item, previous_item_id=self.last_item)
        if answer.done is not None:
            counts = answer.done.usage
            usage = (counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens)
        self.tell(
            say.ResponseDone,
            response_id=answer.response_id,
            status=status,
            reason=reason,
            message=message,
            item=item,
            usage=usage,
        )
