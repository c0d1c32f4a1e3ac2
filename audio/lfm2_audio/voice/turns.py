"""When a turn begins, is interrupted and ends: a state machine over windows of probabilities.

Time is a count of samples at 16 kHz, so that the same input always gives the same turns. Knows no
audio device, no detector and no model, and hears of the output only whether it is audible.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lfm2_audio.voice.vad import RATE, WINDOW
from lfm2_mm.errors import SettingError

__all__ = [
    "Continued",
    "Dismissed",
    "Ended",
    "Idle",
    "Onset",
    "Paused",
    "Signal",
    "Started",
    "TurnDetector",
    "TurnSettings",
    "ms",
    "samples",
]


def samples(milliseconds: float) -> int:
    """Milliseconds as samples at 16 kHz."""
    return round(milliseconds * RATE / 1000)


def ms(n: int) -> int:
    """Samples at 16 kHz as milliseconds."""
    return n * 1000 // RATE


@dataclass(frozen=True, kw_only=True)
class TurnSettings:
    """What makes a turn; the defaults are those of OpenAI's `server_vad` where it has them.

    Attributes:
        threshold: Probability from which a window is speech.
        release: Probability below which speech is over again; between the two nothing changes.
        prefix_ms: Kept of what came before the first window of speech.
        tail_ms: Kept of the silence behind the last one; then the turn can be computed already.
        silence_ms: Silence that ends a turn.
        min_speech_ms: Speech that makes a turn; less is a cough.
        onset_ms: Speech after which the output pauses, to hear what this will be; at most 200.
        interrupt_ms: Speech that interrupts the output for good.
        resume_ms: Silence after less speech than that, behind which the output goes on.
        recall_ms: What was dismissed so shortly before a turn belongs to it after all ("Wait …
            stop").
        max_turn_ms: A turn is ended when it is so long.
        idle_ms: Silence after which `Idle` is signalled once, or None.
        interrupt: Whether speech may interrupt the output at all.
    """

    threshold: float = 0.5
    release: float = 0.35
    prefix_ms: int = 300
    tail_ms: int = 200
    silence_ms: int = 500
    min_speech_ms: int = 250
    onset_ms: int = 64
    interrupt_ms: int = 500
    resume_ms: int = 300
    recall_ms: int = 1000
    max_turn_ms: int = 60_000
    idle_ms: int | None = None
    interrupt: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.release <= self.threshold < 1:
            raise SettingError(
                f"threshold is {self.threshold} and release {self.release}; it must be "
                "0 < release <= threshold < 1"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_ms") and value is not None and value < 0:
                raise SettingError(f"{field.name} is {value}; it must not be negative")
        if self.tail_ms > self.silence_ms:
            raise SettingError(
                f"tail_ms is {self.tail_ms}, but silence_ms only {self.silence_ms}; what is kept "
                "of the silence cannot be longer than it"
            )
        if self.onset_ms > 200:
            raise SettingError(
                f"onset_ms is {self.onset_ms}; the output must pause within 200 ms of speech"
            )


@dataclass(frozen=True, slots=True)
class Onset:
    """Somebody may be speaking; `at` is when this was known, `start` where it began."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class Dismissed:
    """It was no turn: a cough, a door, a short yes while the other speaks."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class Started:
    """It is a turn. Its audio begins at `start`, prefix included."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The turn may be over: what it will be if it is, is `start` to `end`."""

    at: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Continued:
    """It was not over."""

    at: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn is over.

    Attributes:
        at: When this was known.
        start: First sample of its audio, prefix included.
        end: Behind the last sample of its audio, tail included.
        spoken: Behind the last sample of speech.
        cut: Whether it was ended for its length.
    """

    at: int
    start: int
    end: int
    spoken: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Idle:
    """Nobody has spoken, and nothing was to be heard, since `start`."""

    at: int
    start: int


Signal = Onset | Dismissed | Started | Paused | Continued | Ended | Idle


class TurnDetector:
    """Probabilities in, signals out.

    After `Onset` comes `Dismissed` or `Started`; after `Started` comes, behind any number of
    `Paused` and `Continued` in turn, `Ended`.

    Args:
        settings: What makes a turn.
        start: Sample at which the first window begins.
    """

    def __init__(self, settings: TurnSettings | None = None, start: int = 0) -> None:
        self.settings = settings or TurnSettings()
        self.at = start
        self._low = start  # earlier audio belongs to an earlier turn
        self._quiet_since = start
        self._idle_said = False
        self._begin = self._first = self._end = -1
        self._amount = 0
        self._voiced = self._onset = self._turn = self._paused = self._held = False
        self._dismissed = (start, start - samples(self.settings.recall_ms) - 1)

    @property
    def speaking(self) -> bool:
        """Whether a turn is on."""
        return self._turn

    @property
    def wanted(self) -> int:
        """The first sample that a turn may still want; earlier ones can be let go."""
        if self._begin >= 0:
            return self._first
        return self._reach(self.at)

    def step(self, chance: float, *, playing: bool = False) -> list[Signal]:
        """Take the next window.

        Args:
            chance: How likely it holds speech.
            playing: Whether the output is audible, or was until it was paused for this.
        """
        s, begin = self.settings, self.at
        self.at += WINDOW
        if self._held:
            self._quiet_since = self.at
            too_long = self.at - self._first >= samples(s.max_turn_ms)
            return [self._finish(self.at, cut=True)] if too_long else []
        if chance >= s.threshold:
            self._voiced = True
        elif chance < s.release:
            self._voiced = False
        if playing and not s.interrupt and not self._turn:
            self._voiced = False
        if playing or self._begin >= 0 or self._voiced:
            self._quiet_since, self._idle_said = self.at, False
        if self._voiced:
            return self._speech(begin, playing)
        return self._silence(playing)

    def press(self) -> list[Signal]:
        """A turn begins by hand (push-to-talk), whatever is heard."""
        if self._turn:
            return []
        self._forget()
        self._begin = self._first = self._end = self.at
        self._turn = self._held = True
        return [Started(self.at, self._first)]

    def release(self) -> list[Signal]:
        """The turn ends by hand, with all that was heard until now."""
        if not self._turn:
            return self._dismiss() if self._begin >= 0 else []
        self._end = self.at
        return [self._finish(self.at)]

    def drop(self) -> None:
        """Forget the turn that is on; what follows is another."""
        self._low = self.at
        self._forget()

    # -- the two halves of a step ------------------------------------------------------------

    def _speech(self, begin: int, playing: bool) -> list[Signal]:
        s, out = self.settings, list[Signal]()
        if self._begin < 0:
            self._begin = begin
            self._first = self._reach(begin)
        if self._paused:
            self._paused = False
            out.append(Continued(self.at))
        self._end, self._amount = self.at, self._amount + WINDOW
        if not self._onset and self._amount >= samples(s.onset_ms):
            self._onset = True
            out.append(Onset(self.at, self._begin))
        needed = s.interrupt_ms if playing else s.min_speech_ms
        if not self._turn and self._onset and self._amount >= samples(needed):
            self._turn = True
            out.append(Started(self.at, self._first))
        if self._turn and self.at - self._first >= samples(s.max_turn_ms):
            out.append(self._finish(self.at, cut=True))
        return out

    def _silence(self, playing: bool) -> list[Signal]:
        s = self.settings
        if self._begin < 0:
            return self._rest()
        quiet = self.at - self._end
        if not self._turn:
            return self._dismiss() if quiet >= samples(s.resume_ms) else []
        out = list[Signal]()
        end = self._end + samples(s.tail_ms)
        if not self._paused and self.at >= end and quiet < samples(s.silence_ms):
            self._paused = True
            out.append(Paused(self.at, self._first, end))
        if quiet >= samples(s.silence_ms):
            out.append(self._finish(end))
        return out

    def _rest(self) -> list[Signal]:
        idle = self.settings.idle_ms
        if idle is None or self._idle_said or self.at - self._quiet_since < samples(idle):
            return []
        self._idle_said = True
        return [Idle(self.at, self._quiet_since)]

    def _reach(self, begin: int) -> int:
        """Where the audio of a turn begins whose speech begins here."""
        s, (first, end) = self.settings, self._dismissed
        recalled = begin - end <= samples(s.recall_ms) and begin - first < samples(s.max_turn_ms)
        prefix = begin - samples(s.prefix_ms)
        return max(self._low, min(first, prefix) if recalled else prefix)

    def _dismiss(self) -> list[Signal]:
        said: list[Signal] = [Dismissed(self.at, self._begin)] if self._onset else []
        if self._onset:
            self._dismissed = (self._first, self._end)
        self._forget()
        return said

    def _finish(self, end: int, *, cut: bool = False) -> Ended:
        ended = Ended(self.at, self._first, end, self._end, cut)
        self._low = end
        self._forget()
        return ended

    def _forget(self) -> None:
        self._begin = self._first = self._end = -1
        self._amount = 0
        self._voiced = self._onset = self._turn = self._paused = self._held = False
