"""A recording is written down piece by piece, each piece a request of its own to the engine.

Cutting and the second look at pieces that loop are `lfm2_audio.segments`'; they run in a thread,
and wait there for the model. Knows the worker; no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from lfm2_audio.repetition import LoopWatch
from lfm2_audio.results import together
from lfm2_audio.segments import Cutting, Segment, hear
from lfm2_audio.waveform import Audio
from lfm2_mm.events import Done, TextDelta

if TYPE_CHECKING:
    from lfm2_mm.server.context import Context
    from lfm2_mm.server.registry import Served

__all__ = ["Listening", "heard_text", "threads"]


def threads(context: Context, use: Literal["recordings", "voices"]) -> ThreadPoolExecutor:
    """Where recordings are cut and voices heard: apart from each other, and from all others.

    A recording keeps its thread until it is written down; a voice cannot wait for that.
    """
    made = context.extras.get(f"audio.threads.{use}")
    if made is None:
        limits = context.options.limits
        n = limits.running if use == "recordings" else 2 * limits.sockets
        made = ThreadPoolExecutor(n, thread_name_prefix=f"lfm2-{use}")
        context.extras[f"audio.threads.{use}"] = made
    assert isinstance(made, ThreadPoolExecutor)
    return made


async def heard_text(
    context: Context,
    served: Served,
    piece: Audio,
    *,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[str, Done, bool]:
    """Text of one piece, how it ended, and whether the model was stopped because it repeated it.

    Args:
        context: The server's.
        served: The model.
        piece: Up to about half a minute.
        on_text: Gets the text as it comes.
        **options: For `model.transcribe_stream`.
    """
    model = served.model
    ticket = context.worker.queue(model.engine, lambda: model.transcribe_stream(piece, **options))
    text, watch, looped = "", LoopWatch(), False
    async with aclosing(ticket.__aiter__()) as events:
        async for event in events:
            if isinstance(event, TextDelta) and not looped:
                text += event.text
                if on_text is not None and event.text:
                    on_text(event.text)
                if watch.feed(event.text):
                    looped = True
                    ticket.cancel()
    assert ticket.done is not None
    context.metrics.ended(served.id, ticket.done)
    return text, ticket.done, looped


class Listening:
    """One transcription.

    Args:
        context: The server's.
        served: The model.
        audio: All of it.
        timed: Cut into short segments, whose times say when something was said.
        on_text: Gets text as it comes; together what the model wrote at first sight, pieces that
            were heard a second time left out.
        options: For `model.transcribe_stream`.

    Attributes:
        segments: What was said so far.
        done: Counts and times of all pieces, at the end.
    """

    def __init__(
        self,
        context: Context,
        served: Served,
        audio: Audio,
        *,
        timed: bool = False,
        on_text: Callable[[str], None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._context, self._served, self._audio = context, served, audio
        self._cutting = Cutting.for_subtitles() if timed else None
        self._on_text, self._options = on_text, options or {}
        self._again = self._stopped = self._apart = False
        self._asked: Future[str] | None = None
        self._dones: list[Done] = []
        self.segments: list[Segment] = []

    @property
    def done(self) -> Done:
        """Counts and times, all pieces together."""
        return together(self._dones)

    async def run(self) -> list[Segment]:
        """All of it; leaving early ends what runs.

        Raises:
            ApiError: 429 or 503 where the model has no time for it.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                threads(self._context, "recordings"), self._work, loop
            )
        finally:
            self._stopped = True
            if self._asked is not None:
                self._asked.cancel()

    def _work(self, loop: asyncio.AbstractEventLoop) -> list[Segment]:
        def listen(piece: Audio) -> str:
            if self._stopped:
                raise asyncio.CancelledError
            self._asked = asyncio.run_coroutine_threadsafe(self._listen(piece), loop)
            return self._asked.result(self._context.options.limits.seconds + 60)

        def settled(seconds: float) -> None:
            self._again = False

        for segment in hear(self._audio, listen, cutting=self._cutting, progress=settled):
            self.segments.append(segment)
        return self.segments

    async def _listen(self, piece: Audio) -> str:
        first = True

        def tell(text: str) -> None:
            nonlocal first
            if first:
                text = text.lstrip()
            if text and self._on_text is not None and not self._again:
                self._on_text(" " + text if first and self._apart else text)
                self._apart = True
            first = first and not text

        text, done, looped = await heard_text(
            self._context, self._served, piece, on_text=tell, **self._options
        )
        self._dones.append(done)
        self._again = self._again or looped
        return text
