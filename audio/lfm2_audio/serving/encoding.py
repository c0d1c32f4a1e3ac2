"""What goes over the line: samples as bytes of a sound file while they are made, and events.

WAV, raw PCM, MP3 and Opus go out as they come; FLAC, whose head tells the length, only at the end.
Knows libsndfile's writers; no model and no HTTP.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from jaxtyping import Float

from lfm2_audio.voice.events import pcm16
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import MissingExtra

__all__ = ["MEDIA_TYPES", "Encoder", "wav_head"]

MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
"""By the name of the format in requests."""

_UNKNOWN = 0xFFFFFFFF  # the length of a WAV file that is still being made


def wav_head(rate: int) -> bytes:
    """The head of a WAV file of unknown length: mono, 16 bits."""
    size = _UNKNOWN.to_bytes(4, "little")
    fmt = b"fmt " + (16).to_bytes(4, "little") + b"\x01\x00\x01\x00"
    fmt += rate.to_bytes(4, "little") + (2 * rate).to_bytes(4, "little") + b"\x02\x00\x10\x00"
    return b"RIFF" + size + b"WAVE" + fmt + b"data" + size


class Encoder:
    """Takes samples, gives bytes.

    Args:
        form: `wav`, `pcm`, `flac`, `mp3` or `opus`.
        rate: Samples per second.

    Raises:
        MissingExtra: if soundfile is needed and not installed.
    """

    def __init__(self, form: str, rate: int) -> None:
        self._form, self._rate, self._begun = form, rate, False
        self._kept: list[np.ndarray] = []
        self._sink, self._file = _Sink(), None
        if form in ("mp3", "opus"):
            self._file = self._open()

    def push(self, samples: Float[np.ndarray, " n"]) -> bytes:
        """Bytes that are settled by these further samples; NaN, of which LAME dies, is silence."""
        samples = np.clip(np.nan_to_num(np.asarray(samples, dtype=np.float32)), -1, 1)
        if self._form == "flac":
            self._kept.append(samples)
            return b""
        if self._file is not None:
            self._file.write(samples)
            return self._sink.fresh()
        head = b"" if self._begun or self._form == "pcm" else wav_head(self._rate)
        self._begun = True
        return head + pcm16(samples)

    def finish(self) -> bytes:
        """What was held back."""
        if self._form == "flac":
            import torch

            whole = np.concatenate([np.zeros(0, dtype=np.float32), *self._kept])
            return Audio(torch.from_numpy(whole), self._rate).to_bytes("flac")
        if self._file is not None:
            self._file.close()
            return self._sink.fresh()
        return self.push(np.zeros(0, dtype=np.float32))  # the head, if nothing else came

    def _open(self) -> Any:
        try:
            import soundfile  # type: ignore[import-untyped]
        except (ImportError, OSError):
            raise MissingExtra(
                f"{self._form} needs soundfile, which is not installed; ask for wav, or run pip "
                "install 'lfm2-mm[audio]'"
            ) from None
        how: dict[str, Any] = {"format": "OGG", "subtype": "OPUS"}
        if self._form == "mp3":  # of one bit rate: what tells the length of others comes last
            how = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5}
        return soundfile.SoundFile(
            self._sink, "w", samplerate=self._rate, channels=1, closefd=False, **how
        )


class _Sink(io.RawIOBase):
    """A file that only grows: what was handed out stays as it was."""

    def __init__(self) -> None:
        self._data, self._at, self._out = bytearray(), 0, 0

    def fresh(self) -> bytes:
        """What was not handed out yet."""
        found, self._out = bytes(self._data[self._out :]), len(self._data)
        return found

    def write(self, data: Any) -> int:
        """Put bytes at the current place."""
        given = bytes(data)
        end = self._at + len(given)
        self._data.extend(bytes(max(0, end - len(self._data))))
        self._data[self._at : end] = given
        self._at = end
        return len(given)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def tell(self) -> int:
        """The current place."""
        return self._at

    def seekable(self) -> bool:
        """It is."""
        return True

    def writable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is not."""
        return False
