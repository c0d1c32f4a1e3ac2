"""The voice loop over a microphone and a loudspeaker: three threads around three calls.

The caller's thread reads events; one thread hears, one thinks, and the loudspeaker's own plays. A
device that goes away ends the conversation with an error; what was said and heard is kept.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from lfm2_audio.voice.devices import Microphone, Player
from lfm2_audio.voice.events import VoiceEvent
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.seam import Dialogue, VoiceModel
from lfm2_audio.voice.settings import VoiceSettings

__all__ = ["Live", "converse"]


class Live:
    """A running conversation; a context manager whose `events` come as they happen.

    Args:
        model: Who answers.
        conversation: What was said before.
        settings: How the loop behaves.
        input: Microphone, by number or name; None is the system's choice.
        output: Loudspeaker, likewise.
        options: For `model.reply_stream`.

    Attributes:
        loop: The loop itself.
    """

    def __init__(
        self,
        model: VoiceModel,
        conversation: Dialogue,
        *,
        settings: VoiceSettings | None = None,
        input: str | int | None = None,
        output: str | int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._events: queue.SimpleQueue[VoiceEvent | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._microphone = Microphone(input)
        try:
            self._player = Player(self._play, output, rate=model.codec.rate)
            settings = settings or VoiceSettings()
            if not settings.output_delay_ms:
                settings = replace(settings, output_delay_ms=self._player.delay_ms)
            self.loop = VoiceLoop(
                model, conversation, settings=settings, emit=self._events.put, options=options
            )
        except BaseException:
            self.close()
            raise
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), daemon=True, name=f"lfm2-{name}")
            for name, work in (("hear", self._hear), ("think", self._think))
        ]

    def __enter__(self) -> Live:
        try:
            self._player.start()
            self._microphone.start()
        except BaseException:
            self.close()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def events(self) -> Iterator[VoiceEvent]:
        """What happens, until `close`.

        Raises:
            DeviceError: if a device goes away; the conversation up to then is in `loop`, and how
                it came to its end is told before.
        """
        problem: BaseException | None = None
        while (event := self._events.get()) is not None:
            if isinstance(event, BaseException):
                problem = problem or event
                self.close()
            else:
                yield event
        if problem is not None:
            raise problem

    def close(self) -> None:
        """End it; may be called from any thread, and again."""
        if self._stop.is_set():
            return
        self._stop.set()
        for part in ("_microphone", "_player"):
            if hasattr(self, part):
                getattr(self, part).close()
        if hasattr(self, "loop"):
            self.loop.close()
        for thread in getattr(self, "_threads", ()):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout=10)
        self._events.put(None)

    # -- the threads -------------------------------------------------------------------------

    def _guard(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            if not self._stop.is_set():
                self._events.put(error)

    def _hear(self) -> None:
        for block in self._microphone.blocks():
            if self._stop.is_set():
                return
            self._player.check()
            if block is not None:
                self.loop.hear(block, self._microphone.rate)

    def _think(self) -> None:
        while not self._stop.is_set():
            if not self.loop.think():
                self.loop.wait(0.02)

    def _play(self, n: int) -> Any:
        return self.loop.play(n) if hasattr(self, "loop") else np.zeros(n, dtype=np.float32)


def converse(
    model: VoiceModel,
    conversation: Dialogue,
    *,
    settings: VoiceSettings | None = None,
    input: str | int | None = None,
    output: str | int | None = None,
    **options: Any,
) -> Live:
    """A live conversation, to be entered with `with`; its `events()` come as they happen.

    Args:
        model: Who answers.
        conversation: What was said before; with it the system prompt.
        settings: How the loop behaves.
        input: Microphone, by number or name; None is the system's choice.
        output: Loudspeaker, likewise.
        **options: For `model.reply_stream`.

    Raises:
        MissingExtra: if sounddevice is not installed.
        DeviceError: if there is no microphone or loudspeaker that can be opened.
    """
    return Live(model, conversation, settings=settings, input=input, output=output, options=options)
