"""The voice loop: talk to a model, hear it answer, interrupt it.

`loop.VoiceLoop` is the loop, `live` runs it over devices, `simulate` over recordings. This face is
lazy: importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "EchoSettings",
    "Span",
    "TurnSettings",
    "VoiceLoop",
    "VoiceSettings",
    "converse",
    "simulate",
    "speech_spans",
]

_FACE = {
    "EchoSettings": "echo",
    "Span": "vad",
    "TurnSettings": "turns",
    "VoiceLoop": "loop",
    "VoiceSettings": "settings",
    "converse": "live",
    "simulate": "simulate",
    "speech_spans": "vad",
}

if TYPE_CHECKING:
    from lfm2_audio.voice.echo import EchoSettings
    from lfm2_audio.voice.live import converse
    from lfm2_audio.voice.loop import VoiceLoop
    from lfm2_audio.voice.settings import VoiceSettings
    from lfm2_audio.voice.simulate import simulate
    from lfm2_audio.voice.turns import TurnSettings
    from lfm2_audio.voice.vad import Span, speech_spans


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_audio.voice' has no attribute {name!r}")
    return getattr(import_module(f"lfm2_audio.voice.{_FACE[name]}"), name)
