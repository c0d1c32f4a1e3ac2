"""The voice loop as a client at the other end of a line steers it, and the server's worker runs it.

Adds to the loop what the Realtime API has and a microphone does not need: items that a client puts
into the conversation and takes out, answers on demand, calls of functions, settings that change on
the way. Knows no socket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from lfm2_audio.serving.calling import CallingAnnouncer, CallingAnswer, Tools
from lfm2_audio.voice import events as say
from lfm2_audio.voice.answer import Answer, Warm
from lfm2_audio.voice.hearing import as_audio
from lfm2_audio.voice.latency import Stopwatch
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.seam import Dialogue, VoiceModel
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.waveform import Audio
from lfm2_mm.engine import Engine
from lfm2_mm.events import TextDelta

__all__ = ["RemoteLoop"]

_STEPS = 4  # of one conversation in a cycle of the worker, at most
_WAIT = 0.02  # seconds that the worker waits for a conversation that is hearing
_SLICE = 2400  # samples heard at a time, 100 ms


@dataclass(frozen=True, kw_only=True)
class _Deleted(say.VoiceEvent):
    """An item is no part of the conversation any more."""

    type: ClassVar[str] = "conversation.item.deleted"
    item_id: str


class RemoteLoop(VoiceLoop):
    """One conversation with a client.

    Args:
        model: Who answers.
        conversation: What was said before; with it the system prompt.
        settings: How the loop behaves.
        emit: Takes each event as it happens; must not wait.
        on_turn: Gets the id and the sound of each turn of the user's; must not wait.

    Attributes:
        automatic: Whether a turn is answered when it ends, or when the client asks for it.
        busy: Whether there is something to think, to play or to hear to its end.
    """

    _answering = CallingAnswer

    def __init__(
        self,
        model: VoiceModel,
        conversation: Dialogue,
        *,
        settings: VoiceSettings,
        emit: Callable[[say.VoiceEvent], None],
        on_turn: Callable[[str, Audio], None],
    ) -> None:
        self.automatic, self.busy = True, True
        self._on_turn = on_turn
        self._turn_of: dict[str, Any] = {}  # what an item became, by its id
        self._undo: Callable[[Dialogue], Dialogue] | None = None  # what held for one answer only
        self._items = CallingAnnouncer(emit)
        super().__init__(model, conversation, settings=settings, emit=emit)
        self._say = self._items

    # -- what the client says ----------------------------------------------------------------

    def listen(self, samples: np.ndarray, rate: int) -> None:
        """Hear sound of any length, in slices, so that nobody waits long for the loop."""
        for at in range(0, len(samples), _SLICE):
            self.hear(samples[at : at + _SLICE], rate)

    def configure(
        self,
        settings: VoiceSettings,
        *,
        automatic: bool,
        max_tokens: int | None = None,
        tools: Tools | None = None,
    ) -> None:
        """Behave otherwise from now on."""
        with self._lock:
            self._options["tools"] = tools or Tools()
            self.settings, self.automatic = settings, automatic
            self._turns.settings = settings.turns
            self._options.pop("max_tokens", None)
            if max_tokens is not None:
                self._options["max_tokens"] = max_tokens

    def change(self, how: Callable[[Dialogue], Dialogue]) -> None:
        """Change the conversation itself, its system prompt say; a running answer goes on."""
        with self._lock:
            self._settled = how(self._settled)
            if self._answer is not None:
                self._answer.conversation = how(self._answer.conversation)
            else:
                self._set_warm(Warm(self.model, self._settled))

    def put(
        self,
        role: Literal["user", "assistant"],
        content: str | Audio | TextDelta,
        *,
        item_id: str | None = None,
        committed: bool = False,
        shown: dict[str, Any] | None = None,
    ) -> None:
        """Put an item behind the others; an answer that is still heard is broken off.

        Args:
            role: Who said it; sound only from the user.
            content: What was said.
            item_id: The client's own name for it.
            committed: Whether it came through the input buffer.
            shown: The item as clients see it, without its id, where it is no message.
        """
        with self._lock:
            self.stop()
            if self._reopened is not None:
                self._settled = self._settled.user(as_audio(self._reopened))
            self._turns.drop()
            item = self._say.item = item_id or self._say.new_item()
            if isinstance(content, Audio):
                self._on_turn(item, content)
            if committed:
                self._say.question(None)
            else:
                text = content if isinstance(content, str) else None
                row = say.user_item(item, text=text)
                if shown is not None:
                    row = {"id": item, "object": "realtime.item", "status": "completed", **shown}
                elif role == "assistant":
                    row = say.assistant_item(item, "completed", text)
                before, self._say.last_item = self._say.last_item, item
                self._say.tell(say.ItemAdded, item=row, previous_item_id=before)
                self._say.tell(say.ItemDone, item=row, previous_item_id=before)
            if role == "user":
                self._stand(self._settled.user(content))
            else:
                self._stand(self._settled.assistant([content]))

    def item(self, item_id: str) -> dict[str, Any] | None:
        """An item as it stands; None if there is none of this id."""
        with self._lock:
            self._settle()
            return self._items.items.get(item_id)

    def called(self, call_id: str) -> str | None:
        """Name of the function of a call; None if there is no such call."""
        with self._lock:
            for item in self._items.items.values():
                if item["type"] == "function_call" and item["call_id"] == call_id:
                    return str(item["name"])
            return None

    def delete(self, item_id: str) -> bool:
        """Take an item out of the conversation; False if it is not there."""
        with self._lock:
            self._settle()
            if self._answer is not None and self._answer.item_id == item_id:
                self.stop()
            if self._items.items.pop(item_id, None) is None:
                return False
            turn = self._turn_of.pop(item_id, None)
            if turn is not None:
                self.change(partial(_without, turn=turn))
            if self._say.last_item == item_id:
                self._say.last_item = next(reversed(self._items.items), None)
            self._say.tell(_Deleted, item_id=item_id)
            return True

    def respond(
        self,
        tools: Tools | None = None,
        how: Callable[[Dialogue], Dialogue] | None = None,
        undo: Callable[[Dialogue], Dialogue] | None = None,
    ) -> str | None:
        """Answer what was said; returns a sentence where there is nothing to be answered.

        Args:
            tools: What may be called in this answer; None leaves what was configured.
            how: Changes the conversation for this answer.
            undo: Changes it back.
        """
        with self._lock:
            self._settle()
            turns = self._settled.turns
            if self._answer is not None:
                return "an answer is already on its way; cancel it first"
            if not turns or turns[-1].role != "user":
                return "the user has said nothing that is not answered; put an item first"
            before = self._options.get("tools", Tools())
            self._options["tools"] = before if tools is None else tools
            self._plan(self._settled if how is None else how(self._settled), None)
            self._options["tools"], self._undo = before, undo
            return None

    def commit(self) -> bool:
        """End the turn that is on; False if there is none."""
        with self._lock:
            speaking = self._turns.speaking
            self.release()
            return speaking

    def drop(self) -> None:
        """Forget the turn that is on."""
        with self._lock:
            self._turns.drop()
            if self._warmed_for is not None:
                self._set_warm(None)
            self.speaker.resume()

    def cancel(self) -> bool:
        """Break off the answer; False if there is none."""
        with self._lock:
            self._settle()
            running = self._answer is not None
            self.stop()
            return running

    def cut(self, item_id: str, audio_end_ms: int) -> str | None:
        """Keep no more of an answer than was heard; returns a sentence if it cannot be found."""
        with self._lock:
            self._settle()
            answer = self._answer
            if answer is not None and answer.item_id == item_id:
                self.stop()
                if self._say.last_item != item_id:  # nothing of it was given out
                    self._say.tell(say.ItemTruncated, item_id=item_id, audio_end_ms=0)
                    return None
            if self._answer is not None or self._say.last_item != item_id:
                return "only the last answer can be truncated, and item_id names another item"
            self.truncate(audio_end_ms)
            self._note(item_id)
            return None

    # -- what the worker does ----------------------------------------------------------------

    def work(self) -> Engine | bool:
        """A cycle's part of the thinking; never waits for another conversation's steps."""
        if self._closed:
            return False
        for _ in range(_STEPS):
            if not self._lock.acquire(timeout=_WAIT):
                return False  # much is being heard; whoever does that nudges the worker
            try:
                self._settle()
                job = self._next_job()
            finally:
                self._lock.release()
            if job is None:
                break
            if not job.ready:
                engine = getattr(self.model, "engine", None)
                assert isinstance(engine, Engine)
                return engine
            self.think()
        else:
            return True
        self.busy = not self.idle
        return False

    # -- under the lock ----------------------------------------------------------------------

    def _next_job(self) -> Warm | Answer | None:
        """What `think` would do the next part of."""
        if self._warm is not None:
            return self._warm
        far = self.speaker.pending > self.settings.ahead_s * self.rate
        answer = self._answer
        return None if answer is None or answer.finished or far else answer

    def _ask(
        self,
        conversation: Dialogue,
        said: np.ndarray | None,
        watch: Stopwatch | None = None,
        *,
        text: str | None = None,
    ) -> None:
        self._turn_of[self._say.item] = conversation.turns[-1]
        if said is not None:
            self._on_turn(self._say.item, as_audio(said))
        if self.automatic:
            super()._ask(conversation, said, watch, text=text)
        else:
            self._say.question(text)
            self._stand(conversation)

    def _stand(self, conversation: Dialogue) -> None:
        """This was said, and waits until the client wants an answer."""
        self._settled = conversation
        self._said = self._reopened = None
        self._note(self._say.item)
        self._set_warm(Warm(self.model, conversation))

    def _leave(self, answer: Answer) -> None:
        super()._leave(answer)
        turns = self._settled.turns
        if turns and turns[-1].role == "assistant":
            self._note(answer.item_id)
        if self._undo is not None:
            undo, self._undo = self._undo, None
            self.change(undo)

    def _note(self, item_id: str) -> None:
        """The newest turn is what this item became."""
        self._turn_of[item_id] = self._settled.turns[-1]
        while len(self._turn_of) > len(self._items.items) + 8:  # of items that are forgotten
            del self._turn_of[next(iter(self._turn_of))]


def _without(conversation: Any, turn: Any) -> Any:
    kept = tuple(one for one in conversation.turns if one is not turn)
    return replace(conversation, turns=kept)
