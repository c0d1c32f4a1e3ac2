"""A running answer that speaks, read on the event loop: text, sound, and the end, as they come.

Codes are decoded by the server's worker between two steps, a few frames at a time, so that nobody
else's answer waits for them. Knows tickets and codecs; no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lfm2_audio.sounding import CHUNKS, audible
from lfm2_mm.events import AudioFrame, Done, TextDelta

if TYPE_CHECKING:
    from lfm2_mm.server.context import Context
    from lfm2_mm.server.worker import Ticket

__all__ = ["RATE", "Resampler", "spoken"]

RATE = 24_000
"""Samples a second of what clients get: that of OpenAI's `pcm`."""


class Resampler:
    """Sound of a codec, chunk by chunk, at `RATE`.

    Args:
        rate: The codec's.
    """

    def __init__(self, rate: int) -> None:
        self._stream: Any = None
        if rate != RATE:
            import soxr  # type: ignore[import-untyped]

            self._stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32")

    def push(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        """The samples that are settled now."""
        samples = np.asarray(samples, dtype=np.float32)
        if self._stream is None:
            return samples
        return np.asarray(self._stream.resample_chunk(samples, last=last), dtype=np.float32)


async def spoken(
    context: Context, model: Any, ticket: Ticket, keep: Callable[[Any], None] | None = None
) -> AsyncGenerator[str | np.ndarray | Done, None]:
    """Text, samples at `RATE`, and at last how it ended.

    Args:
        context: The server's.
        model: Whose codec decodes.
        ticket: The answer; leaving the iterator cancels it.
        keep: Gets the events that a conversation is continued with.
    """

    async def decoded(work: Callable[[], Tensor]) -> np.ndarray:
        samples = await context.worker.run(work, guarded=False)
        return np.asarray(samples.detach().cpu().float().numpy())

    stream = await context.worker.run(lambda: model.codec.stream(), guarded=False)
    resampler = Resampler(model.codec.rate)
    waiting: list[Tensor] = []
    n = 0
    end: Done | None = None
    async with aclosing(ticket.__aiter__()) as events:
        async for event in events:
            if keep is not None and isinstance(event, TextDelta | AudioFrame):
                keep(event)
            if isinstance(event, TextDelta):
                if event.text:
                    yield event.text
            elif isinstance(event, AudioFrame) and audible(event):
                waiting.append(event.codes)
                if len(waiting) >= CHUNKS[min(n, len(CHUNKS) - 1)]:
                    codes, waiting, n = torch.stack(waiting), [], n + 1
                    samples = resampler.push(await decoded(partial(stream.push, codes)))
                    if len(samples):
                        yield samples
            elif isinstance(event, Done):
                end = event
    if waiting:
        codes = torch.stack(waiting)
        yield resampler.push(await decoded(partial(stream.push, codes)))
    last = resampler.push(await decoded(stream.flush), last=True)
    if len(last):
        yield last
    assert end is not None
    yield end
