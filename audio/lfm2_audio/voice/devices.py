"""Microphones and loudspeakers, through sounddevice: listed, picked, opened, and watched.

Everything that can be missing (the package, PortAudio, a device, the device in the midst of it) is
one sentence in a `DeviceError`. Knows blocks of samples; nothing of speech.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lfm2_mm.errors import DeviceError, Lfm2Error, MissingExtra

__all__ = ["Device", "Microphone", "Player", "list_devices", "pick", "play"]

_STALLED = 2.0  # seconds without a block after which a device counts as gone
_KEPT = 512  # blocks that wait at most for somebody to hear them

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the system names it.

    Attributes:
        number: What `pick` takes.
        inputs: Channels it hears.
        outputs: Channels it plays.
        rate: The sample rate it prefers.
        default: Whether it is the system's choice, as `input`, `output` or both.
    """

    number: int
    name: str
    inputs: int
    outputs: int
    rate: int
    default: tuple[Side, ...] = ()

    def line(self) -> str:
        """One line for a list."""
        sides = [side for side, n in (("in", self.inputs), ("out", self.outputs)) if n]
        chosen = f"  [default {' and '.join(self.default)}]" if self.default else ""
        return f"{self.number:>3}  {self.name} ({', '.join(sides)}, {self.rate} Hz){chosen}"


def _sounddevice() -> Any:
    try:
        return import_module("sounddevice")
    except ImportError:
        raise MissingExtra(
            "sounddevice is not installed; run pip install 'lfm2-mm[audio]'"
        ) from None
    except OSError:
        raise DeviceError(
            "the library PortAudio is not installed, so no sound device can be opened; install it "
            "(Debian, Ubuntu: apt install libportaudio2) or use files instead"
        ) from None


def list_devices() -> list[Device]:
    """Every device.

    Raises:
        MissingExtra: if sounddevice is not installed.
        DeviceError: if PortAudio is missing or broken.
    """
    sounddevice = _sounddevice()
    try:
        found = list(sounddevice.query_devices())
        chosen = sounddevice.default.device
        default = {"input": int(chosen[0]), "output": int(chosen[1])}
    except Exception as error:
        raise DeviceError(f"the sound devices cannot be listed ({_short(error)})") from None
    sides: tuple[Side, Side] = ("input", "output")
    return [
        Device(
            number,
            str(one["name"]),
            int(one["max_input_channels"]),
            int(one["max_output_channels"]),
            int(one["default_samplerate"]),
            tuple(side for side in sides if default[side] == number),
        )
        for number, one in enumerate(found)
    ]


def pick(wanted: str | int | None, side: Side) -> Device:
    """A device by its number or part of its name; None takes the system's choice.

    Raises:
        DeviceError: if there is none, or the name fits several.
    """
    fitting = [d for d in list_devices() if (d.inputs if side == "input" else d.outputs) > 0]
    what = "microphone" if side == "input" else "loudspeaker"
    if not fitting:
        raise DeviceError(
            f"no {what} was found; plug one in, or use files (--wav-in and --wav-out)"
        )
    if wanted is None:
        return next((d for d in fitting if side in d.default), fitting[0])
    text = str(wanted).strip()
    named = [d for d in fitting if text.casefold() in d.name.casefold()]
    if text.isdigit():
        named = [d for d in fitting if d.number == int(text)] or named
    named = [d for d in named if d.name.casefold() == text.casefold()] or named
    if len(named) == 1:
        return named[0]
    if not named:
        raise DeviceError(f"no {what} is called {text!r}; --list-devices shows what there is")
    listed = ", ".join(f"{d.number} ({d.name})" for d in named[:4])
    raise DeviceError(f"the name {text!r} fits several devices: {listed}; give the number of one")


class _Stream:
    """What microphone and player share: a PortAudio stream that is opened, watched and closed."""

    def __init__(self, side: Side, wanted: str | int | None, rate: int, block_ms: int) -> None:
        self._module = _sounddevice()
        self._side = side
        self._what = "microphone" if side == "input" else "loudspeaker"
        self.device = pick(wanted, side)
        self._stream: Any = None
        self._gone = False
        self._beat = time.monotonic()
        self.rate = self._open(rate, block_ms)

    def _open(self, rate: int, block_ms: int) -> int:
        kind = self._module.InputStream if self._side == "input" else self._module.OutputStream
        problem: Exception | None = None
        for tried in dict.fromkeys((rate, self.device.rate)):
            try:
                self._stream = kind(
                    samplerate=tried,
                    blocksize=max(1, tried * block_ms // 1000),
                    device=self.device.number,
                    channels=1,
                    dtype="float32",
                    callback=self._call,
                    finished_callback=self._finished,
                )
                return tried
            except Exception as error:
                problem = error
        raise DeviceError(
            f"the {self._what} {self.device.name!r} cannot be opened ({_short(problem)}); choose "
            "another with --list-devices, or close the program that uses it"
        )

    def start(self) -> None:
        """Begin.

        Raises:
            DeviceError: if the device refuses.
        """
        try:
            self._beat = time.monotonic()
            self._stream.start()
        except Exception as error:
            self.close()
            raise DeviceError(
                f"the {self._what} {self.device.name!r} cannot be started ({_short(error)}); "
                "choose another with --list-devices"
            ) from None

    def check(self) -> None:
        """Make sure that the device is still there.

        Raises:
            DeviceError: if it went away.
        """
        stalled = time.monotonic() - self._beat > _STALLED
        if self._stream is not None and (self._gone or stalled):
            raise DeviceError(
                f"the {self._what} {self.device.name!r} went away; plug it in again, or choose "
                "another with --list-devices"
            )

    def close(self) -> None:
        """Let go of the device; may be called again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.abort()
                stream.close()
            except Exception:  # a device that is gone cannot be closed either
                pass

    def _finished(self) -> None:
        self._gone = True

    def _call(self, data: Any, frames: int, times: Any, status: Any) -> None:
        raise AssertionError("each side has its own")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Microphone(_Stream):
    """What a device hears, in blocks.

    Args:
        wanted: Number or name; None is the system's choice.
        rate: Samples per second wanted; `rate` then tells what it is.
        block_ms: Length of a block.

    Attributes:
        lost: Blocks that nobody took in time.
    """

    def __init__(
        self, wanted: str | int | None = None, *, rate: int = 16000, block_ms: int = 32
    ) -> None:
        self._blocks: queue.Queue[np.ndarray] = queue.Queue(_KEPT)
        self.lost = 0
        super().__init__("input", wanted, rate, block_ms)

    def __enter__(self) -> Microphone:
        self.start()
        return self

    def blocks(self) -> Iterator[Float[np.ndarray, " n"] | None]:
        """What is heard, as it comes; None at least every 0.1 s, so that a reader can leave.

        Raises:
            DeviceError: if the device goes away.
        """
        while self._stream is not None:
            try:
                yield self._blocks.get(timeout=0.1)
            except queue.Empty:
                self.check()
                yield None

    def _call(self, data: Any, frames: int, times: Any, status: Any) -> None:
        self._beat = time.monotonic()
        try:
            self._blocks.put_nowait(np.array(data[:, 0], dtype=np.float32))
        except queue.Full:
            self.lost += 1


class Player(_Stream):
    """Plays what a callable gives.

    Args:
        source: Called with a number of samples, on the device's thread; must not wait.
        wanted: Number or name; None is the system's choice.
        rate: Samples per second of the source. A device that cannot play at this rate gets what
            it can, resampled.
        block_ms: Length of a block.
    """

    def __init__(
        self,
        source: Callable[[int], Float[np.ndarray, " n"]],
        wanted: str | int | None = None,
        *,
        rate: int = 24000,
        block_ms: int = 20,
    ) -> None:
        self._source, self._wanted_rate = source, rate
        self._resampler: Any = None
        self._spare = np.zeros(0, dtype=np.float32)
        self._owed = 0.0
        super().__init__("output", wanted, rate, block_ms)
        if self.rate != rate:
            soxr = import_module("soxr")
            self._resampler = soxr.ResampleStream(rate, self.rate, 1, dtype="float32")

    def __enter__(self) -> Player:
        self.start()
        return self

    @property
    def delay_ms(self) -> int:
        """What the device holds back between the source and the ear."""
        latency = getattr(self._stream, "latency", 0.0)
        return round(1000 * latency) if isinstance(latency, int | float) else 0

    def _call(self, data: Any, frames: int, times: Any, status: Any) -> None:
        self._beat = time.monotonic()
        data[:, 0] = self._next(frames)

    def _next(self, frames: int) -> np.ndarray:
        if self._resampler is None:
            return self._source(frames)
        while len(self._spare) < frames:
            self._owed += (frames - len(self._spare)) * self._wanted_rate / self.rate
            n = max(1, round(self._owed))
            self._owed -= n
            more = self._resampler.resample_chunk(self._source(n))
            self._spare = np.concatenate([self._spare, np.asarray(more, dtype=np.float32)])
        out, self._spare = self._spare[:frames], self._spare[frames:]
        return out


def play(
    chunks: Iterator[Float[np.ndarray, " n"]], rate: int, *, device: str | int | None = None
) -> float:
    """Play chunks as they come, and wait for the last; `speak --play` is this.

    Returns:
        Seconds of sound played.

    Raises:
        DeviceError: if there is no loudspeaker, or it goes away.
    """
    from lfm2_audio.voice.speaker import Speaker

    speaker = Speaker(rate)
    with Player(speaker.take, device, rate=rate) as player:
        for chunk in chunks:
            speaker.put(np.asarray(chunk, dtype=np.float32))
            player.check()
        while speaker.pending:
            player.check()
            time.sleep(0.02)
        time.sleep(player.delay_ms / 1000 + 0.02)
    return speaker.heard / rate


def _short(error: BaseException | None) -> str:
    if isinstance(error, Lfm2Error):
        return str(error)
    return " ".join(str(error).split())[:120] or type(error).__name__
