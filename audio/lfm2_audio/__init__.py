"""lfm2_audio: speech in and out, for LFM2-Audio and LFM2.5-Audio.

This face is lazy: importing the package imports nothing else. The core finds
`lfm2_audio.frontend.frontend` by entry point.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "VOICES",
    "Audio",
    "AudioConfig",
    "AudioEncoder",
    "AudioFrontend",
    "AudioModel",
    "Codec",
    "Conversation",
    "Reply",
    "Segment",
    "Transcript",
    "read_audio",
]

_FACE = {
    "VOICES": "prompts",
    "Audio": "waveform",
    "AudioConfig": "config",
    "AudioEncoder": "encoder",
    "AudioFrontend": "frontend",
    "AudioModel": "model",
    "Codec": "codec",
    "Conversation": "conversation",
    "Reply": "results",
    "Segment": "segments",
    "Transcript": "results",
    "read_audio": "waveform",
}

if TYPE_CHECKING:
    from lfm2_audio.codec import Codec
    from lfm2_audio.config import AudioConfig
    from lfm2_audio.conversation import Conversation
    from lfm2_audio.encoder import AudioEncoder
    from lfm2_audio.frontend import AudioFrontend
    from lfm2_audio.model import AudioModel
    from lfm2_audio.prompts import VOICES
    from lfm2_audio.results import Reply, Transcript
    from lfm2_audio.segments import Segment
    from lfm2_audio.waveform import Audio, read_audio


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_audio' has no attribute {name!r}")
    return getattr(import_module(f"lfm2_audio.{_FACE[name]}"), name)
