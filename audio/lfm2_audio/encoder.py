"""Recordings in, rows of embeddings out: the `InputEncoder` of speech.

Puts reading, mel features, conformer and adapter together; each is a module of its own. The chat
template knows nothing of audio: its positions carry it alone, without tokens around them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lfm2_audio.adapter import Adapter
from lfm2_audio.config import MelConfig
from lfm2_audio.conformer import Conformer
from lfm2_audio.mel import MelFrontend
from lfm2_audio.subsampling import n_rows
from lfm2_audio.waveform import MAX_SECONDS, Audio, read_audio
from lfm2_mm import fused
from lfm2_mm.errors import AudioError
from lfm2_mm.frontends import Prepared

__all__ = ["AudioEncoder"]

_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .rf64 .w64".split()
)
_LAYERS_AT_ONCE = 4  # are packed with each call, so that no call takes much longer for it
_FRAMES_AT_ONCE = 12_000  # two minutes: bounds the memory of encoding several recordings


class AudioEncoder:
    """Speech to embeddings; an `InputEncoder` of the core.

    Args:
        conformer: The encoder with its weights.
        adapter: Encoder rows to embeddings.
        config: How waveforms become features.
        token_id: The id that stands at the positions; any will do, since nothing reads it.
        identity: Tells this encoder's features from another model's; part of every key.
        max_seconds: The longest recording that is accepted.
    """

    types = frozenset({"audio", "audio_url", "input_audio"})
    placeholder = ""

    def __init__(
        self,
        conformer: Conformer,
        adapter: Adapter,
        config: MelConfig,
        *,
        token_id: int,
        identity: str,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.conformer, self.adapter, self.config = conformer, adapter, config
        self.token_id, self.max_seconds = token_id, max_seconds
        self.frontend = MelFrontend(config)
        settings = json.dumps(config.to_dict(), sort_keys=True)
        self._key = hashlib.sha256(f"{identity}\n{settings}".encode()).hexdigest()[:16]
        self.seconds_encoded = 0.0
        self._packing = self._pack()

    def accepts(self, source: str) -> bool:
        """Whether a file name or URL looks like a recording; `-` does."""
        path = urlsplit(source).path if "://" in source else source
        return (
            source == "-"
            or source.startswith("data:audio/")
            or PurePath(path).suffix.lower() in _SUFFIXES
        )

    def open(self, part: Mapping[str, Any]) -> Audio:
        """The recording of one content part, in OpenAI or Hugging Face form.

        `{"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}` never opens a
        file: what is no base64 is refused.

        Raises:
            AudioError: if there is none, or it cannot be read.
            FetchError: if it is a URL that cannot be fetched.
        """
        given = next(
            (
                part[key]
                for key in ("audio", "input_audio", "audio_url", "path", "url")
                if part.get(key) is not None
            ),
            None,
        )
        if isinstance(given, Mapping):
            given = _decoded(given["data"]) if "data" in given else given.get("url")
        if given is None:
            raise AudioError(
                "an audio part has none of 'audio', 'input_audio', 'audio_url', 'path' or 'url', "
                f"only {sorted(part)}; name the recording"
            )
        return read_audio(given, rate=self.config.rate, max_seconds=self.max_seconds)

    def prepare(self, part: Mapping[str, Any]) -> Prepared:
        """Read one recording and compute its features. See `InputEncoder.prepare`."""
        audio = self.open(part)
        mel = self.frontend(audio.samples)
        return Prepared(
            text="",
            n_positions=n_rows(mel.shape[1], self.conformer.config.factor),
            tensors={"mel": mel},
            key=f"audio:{self._key}:{audio.digest}",
            info={"seconds": round(audio.duration, 3)},
        )

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """Features of each recording, `[n_positions, d]`. See `InputEncoder.encode`."""
        next(self._packing, None)
        mels = [part.tensors["mel"] for part in batch]
        rows: list[Tensor] = []
        start = 0
        while start < len(mels):
            end, frames = start + 1, mels[start].shape[1]
            while end < len(mels) and frames + mels[end].shape[1] <= _FRAMES_AT_ONCE:
                frames += mels[end].shape[1]
                end += 1
            device = self.conformer.pre_encode.device
            encoded = self.conformer([mel.to(device) for mel in mels[start:end]])
            adapted = self.adapter(torch.cat(encoded))
            rows += torch.split(adapted, [len(part) for part in encoded])
            self.seconds_encoded += frames * self.config.hop / self.config.rate
            start = end
        return rows

    def _pack(self) -> Iterator[None]:
        """Lay out the weights for inference where that helps, a few layers with each item."""
        layers = list(self.conformer.layers)
        for start in range(0, len(layers), _LAYERS_AT_ONCE):
            parts = layers[start : start + _LAYERS_AT_ONCE]
            fused.pack(layer for part in parts for layer in part.modules())
            yield
        fused.pack(self.adapter.modules())


def _decoded(data: Any) -> Any:
    """Bytes of base64 text, or of a data URL's; bytes and `Audio` as they are."""
    if not isinstance(data, str):
        return data
    text = data.partition(",")[2] if data.startswith("data:") else data
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise AudioError(
            f"the data of an input_audio part are no base64 ({error}); encode the bytes of a sound "
            "file"
        ) from None
