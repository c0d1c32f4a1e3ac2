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

from lfm2_audio.serving.calling import CallingAnnouncer, CallingAnswer, Tools, no_item
from lfm2_audio.voice import events as say
from lfm2_audio.voice.answer import Answer, Warm
from lfm2_audio.voice.hearing import as_audio
from lfm2_audio.voice.latency import Stopwatch
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.notes import Notice
from lfm2_audio.voice.seam import Dialogue, VoiceModel
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.turns import Ended
from lfm2_audio.waveform import Audio
from lfm2_mm.engine import Engine
from lfm2_mm.events import TextDelta
from lfm2_mm.server.problems import ApiError

__all__ = ["RemoteLoop"]

_STEPS = 4  # of one conversation in a cycle of the worker, at most
_WAIT = 0.02  # seconds that the worker waits for a conversation that is hearing
_SLICE = 2400  # samples heard at a time, 100 ms
_SOUND = 64 << 20  # bytes of recordings in a conversation: 17 minutes at 16 kHz


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
        on_turn: Gets the id and the sound of each turn of the user's, and whether it is being
            answered; must not wait.

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
        on_turn: Callable[[str, Audio, bool], None],
    ) -> None:
        self.automatic, self.busy = True, True
        self._on_turn = on_turn
        # what an item became, by its id, as long as it is in the conversation
        self._turn_of: dict[str, Any] = {}
        self._reopened_item = ""  # whose turn was not over after all
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

    def instruct(self, how: Callable[[Dialogue], Dialogue]) -> None:
        """Change what the model is told from now on; an answer told otherwise keeps that."""
        with self._lock:
            if self._undo is None:
                self._change(how)
            else:
                self._settled, self._undo = how(self._settled), how

    def put(
        self,
        role: Literal["user", "assistant"],
        content: str | Audio | TextDelta,
        *,
        item_id: str | None = None,
        committed: bool = False,
        shown: dict[str, Any] | None = None,
        after: str | None = None,
    ) -> None:
        """Put in an item; an answer that is still heard is broken off.

        Args:
            role: Who said it; sound only from the user.
            content: What was said.
            item_id: The client's own name for it.
            committed: Whether it came through the input buffer.
            shown: The item as clients see it, without its id, where it is no message.
            after: The item behind which it stands, or `root`; None is behind all others.

        Raises:
            ApiError: 400 if there is no such item to stand behind, or there is one of its id.
        """
        with self._lock:
            self._settle()
            known = self._items.items
            if after not in (None, "root", *known):
                code = "item_create_invalid_previous_item_id"
                raise no_item(code, str(after), "previous_item_id")
            if item_id in known:
                taken = f"there is an item {item_id!r} already; choose another id"
                raise ApiError(400, taken, code="item_create_duplicate_id", param="item.id")
            self.stop()
            self._fold()
            self._turns.drop()
            last = after is None or after == next(reversed(known), "root")
            item = item_id or self._say.new_item()
            self._say.item = item
            if isinstance(content, Audio):
                self._on_turn(item, content, False)
            if committed:
                self._say.question(None)
            else:
                text = content if isinstance(content, str) else None
                row = say.user_item(item, text=text)
                if shown is not None:
                    row = {"id": item, "object": "realtime.item", "status": "completed", **shown}
                elif role == "assistant":
                    row = say.assistant_item(item, "completed", text)
                behind = self._say.last_item if after is None else after
                before = None if behind == "root" else behind
                self._say.tell(say.ItemAdded, item=row, previous_item_id=before)
                self._say.tell(say.ItemDone, item=row, previous_item_id=before)
                if after is None or last:
                    self._say.last_item = item
                else:
                    self._items.placed(item, after)
            settled = self._settled
            new = settled.user(content) if role == "user" else settled.assistant([content])
            self._stand(new, None if last else self._place(after))

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
            if item_id not in self._items.items:
                return False
            if self._reopened is not None and item_id == self._reopened_item:
                self._reopened = None
            turn = self._turn_of.pop(item_id, None)
            if turn is not None:
                self._change(partial(_without, turn=turn))
            self._forget(item_id)
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
            if self._answer is not None:
                return "an answer is already on its way; cancel it first"
            self._fold()
            turns = self._settled.turns
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
            self._fold()
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
                if item_id not in self._turn_of:  # nothing of it was given out
                    self._say.tell(say.ItemTruncated, item_id=item_id, audio_end_ms=0)
                    return None
            turns = self._settled.turns
            answered = bool(turns) and turns[-1].role == "assistant"
            mine = answered and turns[-1] is self._turn_of.get(item_id)
            if self._answer is not None or self._say.last_item != item_id or not mine:
                return "only the last answer can be truncated, and item_id names another item"
            self.truncate(audio_end_ms)
            self._turn_of[item_id] = self._settled.turns[-1]
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

    def _ended(self, signal: Ended) -> None:
        if self._reopened is not None:  # its words are part of this turn
            self._forget(self._reopened_item)
        super()._ended(signal)

    def _ask(
        self,
        conversation: Dialogue,
        said: np.ndarray | None,
        watch: Stopwatch | None = None,
        *,
        text: str | None = None,
    ) -> None:
        if said is not None:
            self._on_turn(self._say.item, as_audio(said), self.automatic)
        if self.automatic:
            self._turn_of[self._say.item] = conversation.turns[-1]
            super()._ask(conversation, said, watch, text=text)
        else:
            self._say.question(text)
            self._stand(conversation)

    def _stand(self, conversation: Any, place: int | None = None) -> None:
        """This was said, and waits until the client wants an answer.

        Args:
            conversation: With what is new at its end.
            place: Which turn that becomes, where it is not to stay there.
        """
        *before, new = conversation.turns
        if place is not None and place < len(before):
            turns = (*before[:place], new, *before[place:])
            conversation = replace(conversation, turns=turns)
        self._settled = conversation
        self._said = self._reopened = None
        self._turn_of[self._say.item] = new
        self._shed()
        self._set_warm(Warm(self.model, self._settled))

    def _place(self, after: str | None) -> int:
        """Which turn comes behind an item: behind the last turn up to it that still is there."""
        place, at = 0, {id(turn): n for n, turn in enumerate(self._settled.turns)}
        for item_id in self._items.items if after != "root" else ():
            place = max(place, at.get(id(self._turn_of.get(item_id)), -1) + 1)
            if item_id == after:
                break
        return place

    def _change(self, how: Callable[[Dialogue], Dialogue]) -> None:
        """Change the conversation itself; a running answer goes on."""
        self._settled = how(self._settled)
        if self._answer is not None:
            self._answer.conversation = how(self._answer.conversation)
        else:
            self._set_warm(Warm(self.model, self._settled))

    def _fold(self) -> None:
        """A turn that was not over after all is, for something else comes behind it."""
        if self._reopened is not None:
            self._settled = self._settled.user(as_audio(self._reopened))
            self._turn_of[self._reopened_item] = self._settled.turns[-1]
            self._reopened = None

    def _forget(self, item_id: str) -> None:
        """An item is no more."""
        if self._items.items.pop(item_id, None) is not None:
            if self._say.last_item == item_id:
                self._say.last_item = next(reversed(self._items.items), None)
            self._say.tell(_Deleted, item_id=item_id)

    def _leave(self, answer: Answer) -> None:
        super()._leave(answer)
        if self._reopened is not None:
            self._reopened_item = self._say.item
        turns, before = self._settled.turns, {id(turn) for turn in answer.conversation.turns}
        if turns and turns[-1].role == "assistant" and id(turns[-1]) not in before:
            self._turn_of[answer.item_id] = turns[-1]  # else nothing of it was heard
        self._shed()
        if self._undo is not None:
            undo, self._undo = self._undo, None
            self._change(undo)

    def _shed(self) -> None:
        """Leave out the oldest turns where recordings take more memory than they may."""
        self._prune()
        turns = self._settled.turns
        sizes = [_sound(turn) for turn in turns]
        whole, n = sum(sizes), 0
        while whole > _SOUND and n < len(turns) - 1:
            whole, n = whole - sizes[n], n + 1
        if n:
            self._settled = self._settled.drop(n)
            self._prune()
            text = f"{n} of the oldest turns are left out: recordings hold over {_SOUND >> 20} MiB"
            self._say.tell(Notice, message=text)

    def _fit(self, job: Warm | Answer) -> None:
        super()._fit(job)
        with self._lock:
            self._prune()

    def _prune(self) -> None:
        """Let go of turns that are no part of the conversation any more, and of their sound."""
        turns = [*self._settled.turns, *(self._answer.conversation.turns if self._answer else ())]
        there = {id(turn) for turn in turns}
        self._turn_of = {name: turn for name, turn in self._turn_of.items() if id(turn) in there}


def _without(conversation: Any, turn: Any) -> Any:
    kept = tuple(one for one in conversation.turns if one is not turn)
    return replace(conversation, turns=kept)


def _sound(turn: Any) -> int:
    """Bytes of the recordings of a turn."""
    return sum(part.samples.nbytes for part in turn.parts if isinstance(part, Audio))
