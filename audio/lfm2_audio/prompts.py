"""What LFM2-Audio wants for each task: control strings of the system prompt, ways to draw codes.

Exactly as the model cards and the README of liquid-audio give them; a model does what it was
trained on only if they are right to the letter. Knows no tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_mm.errors import SettingError
from lfm2_mm.sampling import Sampling

__all__ = [
    "ASR",
    "CONVERSATION",
    "DEFAULT_VOICE",
    "READ",
    "SPOKEN",
    "TTS",
    "VOICES",
    "asr_prompt",
    "audio_sampling",
    "drawn",
    "tts_prompt",
]

CONVERSATION = "Respond with interleaved text and audio."
ASR = "Perform ASR."
TTS = "Perform TTS."

VOICES: tuple[str, ...] = ("US male", "US female", "UK male", "UK female")
"""The voices of LFM2.5-Audio."""

DEFAULT_VOICE = "US female"

SPOKEN = Sampling(temperature=1.0, top_k=4)
"""How codes of a conversation are drawn; its text is greedy."""

READ = Sampling(temperature=0.8, top_k=64)
"""How codes of a text read aloud are drawn."""

_APART = re.compile(r"[\s_\-]+")


def asr_prompt(language: str | None = None) -> str:
    """The system prompt of a transcription.

    Args:
        language: What is spoken, for models that were trained to be told; None says nothing.
    """
    named = " ".join((language or "").split())
    return f"Perform ASR in {named}." if named else ASR


def tts_prompt(
    voice: str | None = None, *, described: bool = False, voices: Sequence[str] = VOICES
) -> str:
    """The system prompt of reading aloud.

    Args:
        voice: Who speaks. LFM2.5 knows `VOICES`, in any case, `_` and `-` for spaces; LFM2 takes a
            description in plain words ("A male speaker delivers a very expressive …").
        described: Whether the model is an LFM2-Audio, whose voices are described.
        voices: Names that the model knows, if they are not described.

    Raises:
        SettingError: if the model has no such voice.
    """
    wanted = " ".join((voice or "").split())
    if described:
        return f"{TTS}\nUse the following voice: {wanted}" if wanted else TTS
    known = {_APART.sub(" ", name).casefold(): name for name in voices}
    name = known.get(_APART.sub(" ", wanted or DEFAULT_VOICE).strip().casefold())
    if name is None:
        raise SettingError(f"there is no voice {wanted!r}; use one of {', '.join(voices)}")
    return f"{TTS} Use the {name} voice."


def drawn(
    default: Sampling, temperature: float | None, top_k: int | None, seed: int | None
) -> Sampling:
    """How codes are chosen: what a call says, else the default."""
    return Sampling(
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k,
        seed=None if seed is None else (seed + 1) % 2**63,  # other draws than those of the text
    )


def audio_sampling(chosen: Mapping[str, Any], default: Sampling) -> Sampling:
    """What a `generation_config.json` says of codes; the official files say nothing."""
    return drawn(default, chosen.get("audio_temperature"), chosen.get("audio_top_k"), None)
