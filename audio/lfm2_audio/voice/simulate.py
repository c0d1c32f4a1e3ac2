"""The voice loop without a microphone: a recording is heard in simulated real time.

One thread calls `hear`, `think` and `play` in turn; the clock is the recording's. The time that
thinking takes is measured and passes on that clock too, or is given, for tests. Knows no device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from lfm2_audio.voice.events import VoiceEvent
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.vad import RATE, WINDOW
from lfm2_audio.waveform import Audio, AudioSource, read_audio

__all__ = ["Simulation", "simulate", "simulate_file"]

_PATIENCE = 120.0  # seconds of silence at most behind a recording, for the last answer


@dataclass
class Simulation:
    """What came of it.

    Attributes:
        events: All events, in order.
        heard: What was played, from the first sample of the recording on.
        rate: Its sample rate.
    """

    rate: int
    events: list[VoiceEvent] = field(default_factory=list)
    heard: Float[np.ndarray, " n"] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def of(self, *kinds: type[VoiceEvent]) -> list[VoiceEvent]:
        """The events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]


def simulate(
    loop: VoiceLoop,
    samples: Float[np.ndarray, " n"],
    rate: int = RATE,
    *,
    chunk: int | None = None,
    cost: Callable[[float], float] = float,
    finish: bool = True,
    take: Callable[[VoiceEvent], None] | None = None,
    into: Simulation | None = None,
) -> Simulation:
    """Let a loop hear a recording.

    Args:
        loop: A loop without an `emit` of its own.
        samples: Mono, fp32.
        rate: Samples per second.
        chunk: Samples heard at a time; by default 32 ms. The player takes as much at a time.
        cost: How long one step of thinking shall have taken, of the seconds that it took; 0 makes
            the model infinitely fast, and the simulation the same every time.
        finish: Whether to wait, in silence, for the end of the last answer, and close the loop.
        take: Gets each event as it happens.
        into: Where the outcome shall go; it holds what there is if this is interrupted.
    """
    out = into or Simulation(loop.rate)
    pieces: list[np.ndarray] = []
    chunk = chunk or max(1, WINDOW * rate // RATE)
    busy = played = heard = 0.0
    try:
        for piece in _pieces(samples, chunk, rate if finish else 0):
            if heard >= len(samples) and loop.idle:
                break
            left = len(piece) / rate
            while 0 < busy <= left:
                left -= busy
                busy = _think(loop, cost)
            busy = max(0.0, busy - left)
            loop.hear(piece, rate)
            heard += len(piece)
            busy = busy or _think(loop, cost)
            n = int(heard * loop.rate / rate - played)
            played += n
            pieces.append(loop.play(n))
            _drain(loop, out, take)
    finally:
        if finish:
            loop.close()
        _drain(loop, out, take)
        out.heard = np.concatenate([out.heard, *pieces])
    return out


def _think(loop: VoiceLoop, cost: Callable[[float], float]) -> float:
    """Begin the next step that takes time, and return how much; 0 if there is nothing to do.

    What a step makes is held back until the next begins, when the time for it has passed.
    """
    while True:
        loop.speaker.release()
        began = time.perf_counter()
        if not loop.think(hold=True):
            return 0.0
        if (seconds := cost(time.perf_counter() - began)) > 0:
            return seconds


def _pieces(samples: np.ndarray, chunk: int, silence: int) -> Iterator[np.ndarray]:
    """The recording in chunks, then silence for a while."""
    for at in range(0, len(samples), chunk):
        yield samples[at : at + chunk]
    quiet = np.zeros(chunk, dtype=np.float32)
    for _ in range(int(_PATIENCE * silence / chunk)):
        yield quiet


def _drain(
    loop: VoiceLoop, out: Simulation, take: Callable[[VoiceEvent], None] | None = None
) -> None:
    while loop.events:
        event = loop.events.popleft()
        out.events.append(event)
        if take is not None:
            take(event)


def simulate_file(
    loop: VoiceLoop,
    source: AudioSource,
    target: str | Path | None = None,
    *,
    take: Callable[[VoiceEvent], None] | None = None,
) -> Simulation:
    """Let a loop hear a sound file, and write what was to be heard meanwhile into another.

    What there is is also written when this is interrupted.

    Raises:
        AudioError: if a file cannot be read or written.
    """
    audio, out = read_audio(source), Simulation(loop.rate)
    try:
        simulate(loop, audio.samples.numpy(), audio.rate, take=take, into=out)
    finally:
        if target is not None:
            Audio(torch.from_numpy(out.heard), out.rate).save(target)
    return out
