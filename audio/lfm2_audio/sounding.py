"""Events of a running answer become sound: whole, or in chunks as they come.

The first chunk is small, so that it is heard soon; later ones grow, for a codec decodes many frames
at less cost than one at a time. Knows events and codecs; nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import Lfm2Error
from lfm2_mm.events import AudioFrame, Done, Error, Event

if TYPE_CHECKING:
    from collections.abc import Generator

    from lfm2_audio.codec import Codec
    from lfm2_mm.request import Handle

__all__ = ["CHUNKS", "audible", "checked", "chunks", "finished", "sound"]

CHUNKS = (1, 2, 4, 8)
"""Frames of the first chunk of streamed speech, the second, …; the last repeats."""


def checked(handle: Handle) -> Generator[Event, None, None]:
    """Events of a handle; its error is raised."""
    for event in handle:
        if isinstance(event, Error):
            raise event.exception
        yield event


def finished(handle: Handle) -> Done:
    """The end of a handle that was read to it.

    Raises:
        Lfm2Error: if it was not.
    """
    if handle.done is None:
        raise Lfm2Error("the answer was broken off; ask again")
    return handle.done


def audible(frame: AudioFrame) -> bool:
    """Whether a codec can decode it: a frame that ends speech is not sound."""
    return int(frame.codes.max()) < END_OF_AUDIO


def sound(codec: Codec, events: Iterable[Event]) -> Audio:
    """All frames among some events, decoded whole."""
    codes = [e.codes for e in events if isinstance(e, AudioFrame) and audible(e)]
    samples = codec.decode(torch.stack(codes)) if codes else torch.zeros(0)
    return Audio(samples, codec.rate)


def chunks(codec: Codec, handle: Handle) -> Iterator[Audio]:
    """Sound as it comes; dropping the iterator cancels what is not made yet."""
    stream, waiting, n = codec.stream(), list[Tensor](), 0
    with closing(checked(handle)) as events:
        for event in events:
            if isinstance(event, AudioFrame) and audible(event):
                waiting.append(event.codes)
            if len(waiting) >= CHUNKS[min(n, len(CHUNKS) - 1)]:
                samples = stream.push(torch.stack(waiting))
                n, waiting = n + 1, []
                if len(samples):
                    yield Audio(samples, codec.rate)
    rest = [stream.push(torch.stack(waiting))] if waiting else []
    samples = torch.cat([*rest, stream.flush()])
    if len(samples):
        yield Audio(samples, codec.rate)
