"""The voice loop: samples in, samples out, and between them turns, answers and interruptions.

Three calls, each from whatever thread it suits: `hear` takes what the microphone brings and never
waits for the model, `think` does the next part of the model's work, `play` gives what is to be
heard. All times are counts of samples, so that one thread that calls them in turn gets the same
conversation every time. Knows no device and no terminal.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from lfm2_audio.voice import events as say
from lfm2_audio.voice import notes
from lfm2_audio.voice.announcer import Announcer
from lfm2_audio.voice.answer import Answer, Warm
from lfm2_audio.voice.context import fitted, limit
from lfm2_audio.voice.echo import EchoGate
from lfm2_audio.voice.hearing import Hearing, as_audio
from lfm2_audio.voice.latency import Stopwatch
from lfm2_audio.voice.seam import Dialogue, VoiceModel
from lfm2_audio.voice.settings import State, VoiceSettings
from lfm2_audio.voice.speaker import Speaker
from lfm2_audio.voice.turns import (
    Continued,
    Dismissed,
    Ended,
    Idle,
    Onset,
    Paused,
    Signal,
    Started,
    TurnDetector,
    ms,
    samples,
)
from lfm2_audio.voice.vad import RATE, Vad, open_vad
from lfm2_mm.errors import InputError

__all__ = ["VoiceLoop"]


class VoiceLoop:
    """One conversation.

    Args:
        model: Who answers.
        conversation: What was said before; with it the system prompt.
        settings: How the loop behaves.
        vad: The detector, where it is not to be opened by the settings.
        emit: Takes each event as it happens, on the thread where it does; must not wait. Without
            it events wait in `events`, the newest 4096 of them.
        options: For `model.reply_stream` beside `max_frames`.

    Attributes:
        rate: Samples per second of what `play` gives.
        speaker: What is to be heard next.
        hearing: What was heard lately, and how loud it was.
        events: Events that nobody took.
    """

    _answering: type[Answer] = Answer

    def __init__(
        self,
        model: VoiceModel,
        conversation: Dialogue,
        *,
        settings: VoiceSettings | None = None,
        vad: Vad | None = None,
        emit: Callable[[say.VoiceEvent], None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.settings = model, settings or VoiceSettings()
        self.events: deque[say.VoiceEvent] = deque(maxlen=4096)
        self.rate = model.codec.rate
        self.speaker = Speaker(self.rate)
        self._options = {**(options or {}), "max_frames": self.settings.max_frames}
        self._say = Announcer(emit or self.events.append)
        self._vad = vad or open_vad(self.settings.vad)
        self._turns = TurnDetector(self.settings.turns)
        self._echo = EchoGate(self.settings.echo)
        self.hearing = Hearing()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._settled = conversation  # what is final
        self._answer: Answer | None = None
        self._watch = Stopwatch()
        self._started = False  # whether it was said that the answer is heard
        self._warm: Warm | None = Warm(model, conversation)  # the system prompt
        self._warmed_for: Warm | None = None  # the turn that may be over, while that is not known
        self._said: np.ndarray | None = None  # of the turn that is being answered
        self._reopened: np.ndarray | None = None  # a turn that was not over after all
        self._closed = False
        if vad is None and self.settings.vad == "auto" and self._vad.name == "energy":
            self._say.tell(notes.Notice, message=notes.NO_SILERO)

    # -- how it stands -----------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Samples heard, at 16 kHz: the time."""
        return self._turns.at

    @property
    def state(self) -> State:
        """What the loop is doing."""
        with self._lock:
            if self._turns.speaking:
                return "hearing"
            if self._answer is None:
                return "listening"
            if self.speaker.paused:
                return "paused"
            return "speaking" if self.speaker.heard else "thinking"

    @property
    def idle(self) -> bool:
        """Whether nothing is to be thought, played or heard to its end."""
        with self._lock:
            return self._answer is None and self._warm is None and not self._turns.speaking

    @property
    def conversation(self) -> Dialogue:
        """What was said, the running answer as far as it was heard."""
        with self._lock:
            return self._settled if self._answer is None else self._as_heard(self._answer)

    # -- the three calls ---------------------------------------------------------------------

    def hear(self, frames: np.ndarray, rate: int = RATE) -> None:
        """Take what a microphone or socket brings.

        Args:
            frames: `[n]` or `[n, channels]`, floats within -1 and 1 or int16; any length. What is
                no number counts as silence and is reported once.
            rate: Samples per second; must stay the same.

        Raises:
            InputError: if it is no such array, or the rate changed, or the loop is closed.
        """
        with self._lock:
            if self._closed:
                raise InputError("the voice loop is closed; make a new one")
            windows, broken = self.hearing.take(frames, rate)
            if broken:
                self._say.tell(say.VoiceError, message=broken, kind="invalid_request_error")
            for window in windows:
                self._window(window)

    def play(self, n: int) -> Float[np.ndarray, " n"]:
        """The next `n` samples to be heard, at `rate`; silence where there is nothing to say."""
        out = self.speaker.take(n)
        if self.speaker.heard and self._watch.heard_at is None:
            self._watch.heard_at = self._turns.at
        self._echo.played(out, self._turns.at)
        return out

    def think(self, *, hold: bool = False) -> bool:
        """Do the next part of the model's work, if there is any; this is what may take long.

        Args:
            hold: Whether samples made here shall wait for `speaker.release`.

        Returns:
            Whether there was something to do.
        """
        with self._lock:
            warm, answer = self._warm, self._answer
            far = self.speaker.pending > self.settings.ahead_s * self.rate
            if warm is None and (answer is None or answer.finished or far):
                return False
        if warm is not None:
            self._fit(warm)
            warm.step()
            with self._lock:
                if warm.finished and self._warm is warm:
                    self._warm = None
                    self._say.warmed(warm)
        elif answer is not None:
            if not answer.begun:
                self._fit(answer)
            made = answer.step(self.speaker.pending)
            with self._lock:
                for one in made if self._answer is answer else ():
                    if one.samples is not None:
                        self.speaker.put(one.samples, hold=hold)
                    self._say.made(answer, one)
        return True

    def wait(self, seconds: float) -> None:
        """Until there may be something to think about; for a thread that does nothing else."""
        with self._work:
            self._work.wait(seconds)

    # -- by hand -----------------------------------------------------------------------------

    def press(self) -> None:
        """A turn begins now; what is being said stops (push-to-talk)."""
        with self._lock:
            self._on(*self._turns.press())

    def release(self) -> None:
        """The turn ends now."""
        with self._lock:
            self._on(*self._turns.release())

    def stop(self) -> None:
        """Break off the answer; what was heard of it stays."""
        with self._lock:
            self._break_off("client_cancelled")

    def ask(self, text: str) -> None:
        """A turn of the user's in writing; the answer is spoken."""
        with self._lock:
            self.stop()
            if self._reopened is not None:
                self._settled = self._settled.user(as_audio(self._reopened))
            self._turns.drop()
            self._set_warm(None)
            self._say.item = self._say.new_item()
            self._ask(self._settled.user(text), None, text=text)

    def truncate(self, audio_end_ms: int) -> None:
        """Cut the last answer to what a client says was heard of it; it can only become less."""
        with self._lock:
            if self._answer is not None or self._say.last_item is None or audio_end_ms < 0:
                return
            frames = audio_end_ms * self.rate // 1000 // self.model.codec.samples_per_frame
            self._settled = self._settled.cut(frames)
            item_id = self._say.last_item
            self._say.tell(say.ItemTruncated, item_id=item_id, audio_end_ms=audio_end_ms)

    def close(self) -> None:
        """The end: stops what runs, keeps what was said and heard. May be called again."""
        with self._lock:
            if self._closed:
                return
            if self._turns.speaking:
                self._on(*self._turns.release())
            self.stop()
            self._set_warm(None)
            self._closed = True

    # -- hearing, under the lock -------------------------------------------------------------

    def _window(self, window: np.ndarray) -> None:
        self._say.now_ms = ms(self.clock)
        self._settle()
        passes = self._echo.passes(window, self.clock)
        # the detector always gets it, for it remembers what came before
        chance = 0.0 if self.settings.manual else self._vad(window)
        self._on(*self._turns.step(chance if passes else 0.0, playing=self._audible))
        self.hearing.forget(self._turns.wanted)

    @property
    def _audible(self) -> bool:
        return self._answer is not None and self.speaker.heard > 0

    def _on(self, *signals: Signal) -> None:
        self._say.now_ms = ms(self.clock)
        for signal in signals:
            if isinstance(signal, Onset):
                self._pause()
            elif isinstance(signal, Dismissed):
                self._resume(signal)
            elif isinstance(signal, Started):
                self._break_off("turn_detected")
                self._say.item = self._say.new_item()
                start = ms(signal.start)
                self._say.tell(say.SpeechStarted, audio_start_ms=start, item_id=self._say.item)
            elif isinstance(signal, Paused):
                self._speculate(signal)
            elif isinstance(signal, Continued):
                self._set_warm(None)
            elif isinstance(signal, Ended):
                self._ended(signal)
            elif isinstance(signal, Idle):
                self._say.idle(ms(signal.start), ms(signal.at))

    def _pause(self) -> None:
        self.speaker.pause()
        if self._audible and self._answer is not None:
            heard = self.speaker.heard * 1000 // self.rate
            response = self._answer.response_id
            self._say.tell(notes.OutputPaused, response_id=response, heard_ms=heard)

    def _resume(self, signal: Dismissed) -> None:
        self._say.tell(notes.TurnDismissed, audio_start_ms=ms(signal.start))
        if self.speaker.paused and self._audible and self._answer is not None:
            self._say.tell(notes.OutputResumed, response_id=self._answer.response_id)
        self.speaker.resume()

    def _speculate(self, signal: Paused) -> None:
        if self.settings.speculate:
            heard = self._joined(signal.start, signal.end)
            key = (signal.start, signal.end)
            self._set_warm(Warm(self.model, self._settled.user(as_audio(heard)), key))

    def _ended(self, signal: Ended) -> None:
        said = self._joined(signal.start, signal.end)
        self._reopened = None
        end = ms(signal.end)
        self._say.tell(say.SpeechStopped, audio_end_ms=end, item_id=self._say.item)
        warm = self._warmed_for
        if warm is not None and warm.key == (signal.start, signal.end):
            conversation = warm.conversation  # the very same audio, perhaps computed by now
        else:
            self._set_warm(None)
            conversation = self._settled.user(as_audio(said))
        self._ask(conversation, said, Stopwatch(signal.at, signal.spoken))

    def _joined(self, start: int, end: int) -> np.ndarray:
        """What was heard, behind the turn that was not over after all."""
        heard = self.hearing.piece(start, end)
        return heard if self._reopened is None else np.concatenate([self._reopened, heard])

    # -- answering, under the lock -----------------------------------------------------------

    def _ask(
        self,
        conversation: Dialogue,
        said: np.ndarray | None,
        watch: Stopwatch | None = None,
        *,
        text: str | None = None,
    ) -> None:
        """A question stands."""
        self._say.question(text)
        self._plan(conversation, said, watch)

    def _plan(
        self, conversation: Dialogue, said: np.ndarray | None, watch: Stopwatch | None = None
    ) -> None:
        """Plan the answer."""
        self._said, self._reopened, self._warmed_for = said, None, None
        self.speaker.begin()  # before the watch, which would else see what was heard before
        self._watch = watch or Stopwatch(self.clock, self.clock)
        self._started = False
        self._answer = self._answering(
            self.model,
            conversation,
            number=self._say.number("resp"),
            chunks=self.settings.chunk_frames,
            options=self._options,
        )
        self._say.tell(say.ResponseCreated, response_id=self._answer.response_id)
        self._work.notify_all()

    def _set_warm(self, warm: Warm | None) -> None:
        if self._warm is not None:
            self._warm.cancel()
        self._warm = self._warmed_for = warm
        self._work.notify_all()

    def _settle(self) -> None:
        """Note that output began, and that it ended."""
        answer = self._answer
        if answer is None:
            return
        if self.speaker.heard and not self._started:
            self._started = True
            self._say.tell(say.OutputStarted, response_id=answer.response_id)
        if not answer.finished or self.speaker.pending:
            return
        if self._started:
            self._say.tell(say.OutputStopped, response_id=answer.response_id)
        if answer.error is None:
            self._settled = answer.conversation.assistant(list(answer.segments))
            self._say.last_item = answer.item_id
        elif self._heard_frames(answer):
            self._settled = self._as_heard(answer)
        self._leave(answer)

    def _heard_frames(self, answer: Answer) -> int:
        delay = self.settings.output_delay_ms * self.rate // 1000
        whole = max(0, self.speaker.heard - delay) // self.model.codec.samples_per_frame
        return min(whole, answer.frames)

    def _as_heard(self, answer: Answer) -> Dialogue:
        """The conversation, with no more of the answer than was heard."""
        frames = self._heard_frames(answer)
        if not frames:
            return answer.conversation
        return answer.conversation.assistant(list(answer.segments)).cut(frames)

    def _break_off(self, reason: str) -> None:
        """Stop the running answer, if there is one, and keep what was heard of it."""
        self._settle()
        answer = self._answer
        if answer is None:
            self.speaker.resume()
            return
        answer.cancel()
        if self.speaker.clear() and self._started:
            self._say.tell(say.OutputCleared, response_id=answer.response_id)
        if not answer.finished:
            self._say.over(answer, "cancelled", reason=reason)
        frames, said = self._heard_frames(answer), self._said
        longest = samples(self.settings.turns.max_turn_ms)
        if frames:
            self._settled = self._as_heard(answer)
            self._say.last_item = answer.item_id
            heard = frames * self.model.codec.samples_per_frame * 1000 // self.rate
            self._say.tell(say.ItemTruncated, item_id=answer.item_id, audio_end_ms=heard)
        elif reason == "turn_detected" and said is not None and len(said) < longest:
            self._reopened = said  # nothing was heard of the answer: the turn before goes on
        else:
            self._settled = answer.conversation
        self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        """The answer is over."""
        frame_seconds = self.model.codec.samples_per_frame / self.rate
        gaps = self.speaker.gaps / self.rate
        fields = self._watch.report(answer, frame_seconds=frame_seconds, gaps=gaps)
        self._say.tell(notes.TurnLatency, **fields)
        self._answer = self._said = None
        if answer.done is not None:
            used = answer.done.usage.prompt_tokens + answer.done.usage.completion_tokens
            if used > self._limit:  # compute what is left while nobody waits for it
                self._set_warm(Warm(self.model, self._settled))

    # -- the context -------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return limit(self.model, self.settings.reserve)

    def _fit(self, job: Warm | Answer) -> None:
        """Drop the oldest turns of a conversation that has outgrown the context."""
        fit = fitted(self.model, job.conversation, self._limit, self.settings.keep)
        if fit is None:
            return
        with self._lock:
            if job is self._warm or job is self._answer:
                job.conversation = fit.conversation
                self._settled = self._settled.drop(min(fit.dropped, len(self._settled.turns)))
                self._say.tell(
                    notes.ContextDropped,
                    turns=fit.dropped,
                    positions_before=fit.before,
                    positions_after=fit.after,
                )
