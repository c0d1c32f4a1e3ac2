"""A scripted model with the face that the voice loop needs, and conversations for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.simulate import Simulation, simulate
from lfm2_audio.waveform import read_audio
from lfm2_mm.events import AudioFrame, Done, Error, Event, TextDelta, Timings, Usage

RATE, FRAME, HELD = 24000, 1920, 480
CODEBOOKS = 8


@cache
def clip(name: str) -> np.ndarray:
    """Speech at 16 kHz; `python tools/make_voice_clips.py` made it."""
    path = Path(__file__).parent / "clips" / f"{name}.flac"
    audio = read_audio(path)
    assert audio.rate == 16000
    return np.asarray(audio.samples)


def value(number: int) -> float:
    """What every sample of a frame is, that one hears which frame it was."""
    return (number % 1000 + 1) / 1100


class FakeStream:
    """Holds the last samples back, as the detokenizer does."""

    def __init__(self) -> None:
        self._held = torch.zeros(0)

    def push(self, codes: Tensor) -> Tensor:
        assert codes.ndim == 2 and codes.shape[1] == CODEBOOKS
        assert int(codes.max()) < 2048, "the end of audio must never be decoded"
        sound = [torch.full((FRAME,), value(int(row[1]) * 2048 + int(row[0]))) for row in codes]
        whole = torch.cat([self._held, *sound])
        self._held = whole[-HELD:]
        return whole[:-HELD]

    def flush(self) -> Tensor:
        out, self._held = self._held, torch.zeros(0)
        return out


class FakeCodec:
    rate, samples_per_frame, codebooks, entries = RATE, FRAME, CODEBOOKS, 2048

    def decode(self, codes: Tensor) -> Tensor:
        stream = FakeStream()
        return torch.cat([stream.push(codes), stream.flush()])

    def stream(self) -> FakeStream:
        return FakeStream()


@dataclass(frozen=True)
class Turn:
    role: str
    content: Any

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it holds, as a real turn names it."""
        return self.content if isinstance(self.content, tuple) else (self.content,)

    @property
    def positions(self) -> int:
        if self.role == "assistant":
            return len(self.content) + 4
        if isinstance(self.content, str):
            return len(self.content.split()) + 4
        return int(self.content.duration * 12.5) + 4


@dataclass(frozen=True)
class Talk:
    """A conversation."""

    turns: tuple[Turn, ...] = ()

    def user(self, content: Any) -> Talk:
        return replace(self, turns=(*self.turns, Turn("user", content)))

    def assistant(self, segments: Sequence[Any]) -> Talk:
        return replace(self, turns=(*self.turns, Turn("assistant", tuple(segments))))

    def cut(self, n_frames: int) -> Talk:
        *before, last = self.turns
        assert last.role == "assistant"
        kept: list[Any] = []
        for piece in last.content:
            if isinstance(piece, AudioFrame):
                if n_frames == 0:
                    break
                n_frames -= 1
            kept.append(piece)
        while kept and isinstance(kept[-1], TextDelta):
            kept.pop()
        return replace(self, turns=(*before, Turn("assistant", tuple(kept))))

    def drop(self, n_turns: int) -> Talk:
        return replace(self, turns=self.turns[n_turns:])

    def to_prompt(self, model: Any) -> range:
        return range(10 + sum(turn.positions for turn in self.turns))

    def roles(self) -> str:
        """`ua` for a question and its answer."""
        return "".join(turn.role[0] for turn in self.turns)

    def frames(self, at: int = -1) -> list[Tensor]:
        """Frames of a turn."""
        return [p.codes for p in self.turns[at].content if isinstance(p, AudioFrame)]

    def seconds(self, at: int) -> float:
        """Length of a turn of the user's."""
        return float(self.turns[at].content.duration)


class FakeHandle:
    def __init__(self, events: Iterator[Event], positions: int) -> None:
        self._events, self._positions = events, positions
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        for event in self._events:
            if self.cancelled:
                yield Done("cancelled", Usage(self._positions), Timings())
                return
            yield event


Scripted = Callable[[int, Talk], Iterator[Event]]


def spoken(n_frames: int, *, fail_at: int | None = None, ends: bool = True) -> Scripted:
    """Answers of 6 pieces of text, 12 frames and so on, until there are so many frames."""

    def script(number: int, talk: Talk) -> Iterator[Event]:
        made = 0
        while made < n_frames:
            for i in range(6):
                yield TextDelta(f" w{made}.{i}")
            for _ in range(min(12, n_frames - made)):
                if made == fail_at:
                    yield Error(RuntimeError("the model fell over"))
                    return
                codes = torch.full((CODEBOOKS,), number)
                codes[0], codes[1] = made % 2048, made // 2048
                yield AudioFrame(codes)
                made += 1
        if ends:
            yield AudioFrame(torch.full((CODEBOOKS,), 2048))
        usage = Usage(len(talk.to_prompt(None)), completion_tokens=made)
        yield Done("stop" if ends else "length", usage, Timings(encode=0.01, prefill=0.02))

    return script


class FakeModel:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, script: Scripted | None = None, *, max_positions: int = 4096) -> None:
        self.codec, self.script = FakeCodec(), script or spoken(25)
        self.max_positions = max_positions
        self.asked: list[Talk] = []
        self.warmed: list[Talk] = []
        self.handles: list[FakeHandle] = []
        self.options: dict[str, Any] = {}

    def reply_stream(self, conversation: Talk, **options: Any) -> FakeHandle:
        self.asked.append(conversation)
        self.options = options
        events = self.script(len(self.asked), conversation)
        handle = FakeHandle(events, len(conversation.to_prompt(self)))
        self.handles.append(handle)
        return handle

    def warm(self, conversation: Talk) -> FakeHandle:
        self.warmed.append(conversation)
        n = len(conversation.to_prompt(self))
        return FakeHandle(iter([Done("stop", Usage(n), Timings())]), n)


class Loud:
    """A detector for made-up input: what is loud is speech."""

    name = "loud"

    def __call__(self, window: np.ndarray) -> float:
        return 0.95 if float(np.abs(window).max()) > 0.05 else 0.02

    def reset(self) -> None:
        pass


def run(
    model: FakeModel,
    samples: np.ndarray,
    *,
    settings: VoiceSettings | None = None,
    vad: Any = None,
    cost: float = 0.0,
    **options: Any,
) -> tuple[Simulation, VoiceLoop]:
    """A conversation from the beginning to the end."""
    loop = VoiceLoop(model, Talk(), settings=settings, vad=vad)
    return simulate(loop, samples, cost=lambda _: cost, **options), loop


def talk_of(loop: VoiceLoop) -> Talk:
    """The conversation of a loop over a scripted model."""
    talk = loop.conversation
    assert isinstance(talk, Talk)
    return talk
