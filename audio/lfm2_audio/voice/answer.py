"""One answer in the making: what a handle reports becomes pieces of text and chunks of samples.

The first chunk is small, so that it is heard soon; later ones grow, for a codec decodes many frames
at less cost than one at a time. Knows the model's face and a codec; nothing of turns or playing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lfm2_audio.config import END_OF_AUDIO
from lfm2_mm.errors import Lfm2Error
from lfm2_mm.events import AudioFrame, Done, Error, TextDelta

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_audio.codec import CodecStream
    from lfm2_audio.voice.seam import Dialogue, VoiceModel
    from lfm2_mm.events import Event

__all__ = ["Answer", "Made", "Warm", "sentence"]


def sentence(error: BaseException) -> str:
    """What failed, as one sentence for a person."""
    if isinstance(error, Lfm2Error):
        return " ".join(str(error).split())
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"the turn failed ({said}); say it again"


@dataclass(frozen=True)
class Made:
    """What one step brought."""

    kind: Literal["text", "audio", "done", "error"]
    text: str = ""
    samples: np.ndarray | None = None
    done: Done | None = None
    error: BaseException | None = None


class Warm:
    """Computes a conversation ahead of its answer.

    Attributes:
        conversation: What is computed.
        key: Says of what audio it is made.
        cancelled: Whether it is not wanted any more.
    """

    def __init__(self, model: VoiceModel, conversation: Dialogue, key: object = None) -> None:
        self._model, self.conversation, self.key = model, conversation, key
        self._events: Iterator[Event] | None = None
        self._handle: Any = None
        self.cancelled = self.finished = False
        self.done: Done | None = None

    @property
    def ready(self) -> bool:
        """Whether `step` would not have to wait for the model."""
        return bool(getattr(self._handle, "ready", True))

    def cancel(self) -> None:
        """It is not wanted any more."""
        self.cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def step(self) -> None:
        """Do the next part of it; errors are left to the answer, which will meet them again."""
        try:
            if self._events is None:
                self._handle = self._model.warm(self.conversation)
                self._events = iter(self._handle)
                if self.cancelled:
                    self._handle.cancel()
                if not self.ready:
                    return
            event = next(self._events, None)
        except Exception:
            event = None
        if isinstance(event, Done):
            self.done = event
        if event is None or isinstance(event, Done | Error):
            self.finished = True


class Answer:
    """An answer, from the question to its last frame.

    Args:
        model: Who answers.
        conversation: Up to and with the question.
        number: Tells its ids from others'.
        chunks: Frames of the first chunk of samples, the second, …; the last repeats.
        options: For `model.reply_stream`.

    Attributes:
        segments: Events of text and frames in the order they came.
        frames: Frames that stand for sound.
        rate: Samples per second of what is made.
        busy: Seconds spent on it.
        finished: Whether no more comes.
    """

    def __init__(
        self,
        model: VoiceModel,
        conversation: Dialogue,
        *,
        number: int = 1,
        chunks: Sequence[int] = (1, 2, 4, 8),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self.conversation = model, conversation
        self.response_id, self.item_id = f"resp_{number:06d}", f"item_a{number:06d}"
        self._chunks, self._chunk, self._options = tuple(chunks), 0, dict(options or {})
        self._handle: Any = None
        self._events: Iterator[Event] | None = None
        self._stream: CodecStream | None = None
        self._waiting: list[Tensor] = []
        self.segments: list[TextDelta | AudioFrame] = []
        self.frames, self.rate, self.busy = 0, model.codec.rate, 0.0
        self.cancelled = self.finished = False
        self.done: Done | None = None
        self.error: BaseException | None = None
        self.first_text: float | None = None
        self.first_audio: float | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(one.text for one in self.segments if isinstance(one, TextDelta))

    @property
    def begun(self) -> bool:
        """Whether the model was asked."""
        return self._events is not None

    @property
    def ready(self) -> bool:
        """Whether `step` would not have to wait for the model."""
        return bool(getattr(self._handle, "ready", True))

    def cancel(self) -> None:
        """Ask for the end; nothing that still comes counts."""
        self.cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def step(self, pending: int = 0) -> list[Made]:
        """Wait for the next event of the model, and decode what is due.

        Args:
            pending: Samples that still wait to be played.
        """
        began = time.perf_counter()
        try:
            return self._step(pending)
        except Exception as error:
            return self._fail(error)
        finally:
            self.busy += time.perf_counter() - began

    def _step(self, pending: int) -> list[Made]:
        if self._events is None:
            self._handle = self._model.reply_stream(self.conversation, **self._options)
            if self.cancelled:
                self._handle.cancel()
            self._events, self._stream = iter(self._handle), self._model.codec.stream()
            if not self.ready:
                return []
        event = next(self._events, None)
        now = time.perf_counter()
        if isinstance(event, TextDelta):
            self.first_text = self.first_text or now
            self.segments.append(event)
            return [Made("text", text=event.text)] if event.text else []
        if isinstance(event, AudioFrame):
            self.first_text = self.first_text or now
            self.segments.append(event)
            if int(event.codes.max()) < END_OF_AUDIO:
                self._waiting.append(event.codes)
                self.frames += 1
            frame = self._model.codec.samples_per_frame
            due = self._chunks[min(self._chunk, len(self._chunks) - 1)]
            if len(self._waiting) >= due or (self._chunk and pending < 2 * frame):
                return self._decode()
            return []
        if isinstance(event, Error):
            return self._fail(event.exception)
        self.done = event if isinstance(event, Done) else None
        made = [*self._decode(), *self._flush()]
        self.finished = True
        return [*made, Made("done", done=self.done)]

    def _decode(self) -> list[Made]:
        if not self._waiting or self._stream is None:
            return []
        codes, self._waiting = torch.stack(self._waiting), []
        self._chunk += 1
        return self._sound(self._stream.push(codes))

    def _flush(self) -> list[Made]:
        return self._sound(self._stream.flush()) if self._stream is not None else []

    def _sound(self, samples: Tensor) -> list[Made]:
        if not len(samples):
            return []
        self.first_audio = self.first_audio or time.perf_counter()
        return [Made("audio", samples=samples.detach().cpu().float().numpy())]

    def _fail(self, error: BaseException) -> list[Made]:
        self.finished, self.error = True, error
        if self._handle is not None:
            self._handle.cancel()
        return [Made("error", error=error)]
