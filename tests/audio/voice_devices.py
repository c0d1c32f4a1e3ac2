"""A stand-in for the package sounddevice: devices whose streams a test drives by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class PortAudioError(Exception):
    pass


class FakeStream:
    """A stream that calls back when the test says so."""

    latency = 0.05

    def __init__(self, owner: FakeSounddevice, side: str, options: dict[str, Any]) -> None:
        self._owner, self.side, self.options = owner, side, options
        self.started = self.closed = False

    def start(self) -> None:
        if self._owner.refuse_start:
            raise PortAudioError("Device unavailable [PaErrorCode -9985]")
        self.started = True

    def abort(self) -> None:
        if self._owner.unplugged:
            raise PortAudioError("Unanticipated host error")

    def close(self) -> None:
        self.closed = True

    def feed(self, samples: np.ndarray) -> None:
        """The microphone hears this."""
        self.options["callback"](samples[:, None], len(samples), None, None)

    def pull(self, n: int) -> np.ndarray:
        """The loudspeaker plays this."""
        data = np.full((n, 1), np.nan, dtype=np.float32)
        self.options["callback"](data, n, None, None)
        return data[:, 0]


class FakeSounddevice:
    """The module."""

    PortAudioError = PortAudioError

    def __init__(self, *names: str, rates: tuple[int, ...] = (16000, 24000, 48000)) -> None:
        self.names = names or ("Built-in Microphone", "Built-in Speaker", "USB Headset")
        self.rates, self.default = rates, SimpleNamespace(device=[0, 1])
        self.refuse_start = self.unplugged = False
        self.streams: list[FakeStream] = []

    def query_devices(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "max_input_channels": int("Speaker" not in name),
                "max_output_channels": 2 * int("Microphone" not in name),
                "default_samplerate": 48000.0,
            }
            for name in self.names
        ]

    def InputStream(self, **options: Any) -> FakeStream:
        return self._open("input", options)

    def OutputStream(self, **options: Any) -> FakeStream:
        return self._open("output", options)

    def _open(self, side: str, options: dict[str, Any]) -> FakeStream:
        if options["samplerate"] not in self.rates:
            raise PortAudioError("Invalid sample rate [PaErrorCode -9997]")
        self.streams.append(FakeStream(self, side, options))
        return self.streams[-1]

    def pull_out(self, *sides: str) -> None:
        """The cable of these sides, or of all: streams end, and cannot be stopped any more."""
        self.unplugged = True
        for stream in self.streams:
            if not sides or stream.side in sides:
                stream.options["finished_callback"]()

    def stream(self, side: str) -> FakeStream:
        """The newest stream of a side."""
        return next(s for s in reversed(self.streams) if s.side == side)
