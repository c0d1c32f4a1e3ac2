"""Bodies and form fields of the audio routes, and what of them is understood how.

What OpenAI's interface has and a model here cannot honour is refused by name. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lfm2_mm.server.problems import ApiError

__all__ = ["LANGUAGES", "SpeechRequest", "TranscriptionRequest", "refused", "voice_of"]

Number = Annotated[float, Field(allow_inf_nan=False)]

_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
_DEFAULT_VOICES = ("", "default", "alloy")  # alloy is what OpenAI's clients send unasked

LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": None,  # what models hear without being told
    "english": None,
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "zh": "Chinese",
}
"""Codes that clients send, as the words that models are told."""


def refused(param: str, message: str) -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, message, code="unsupported_value", param=param)


def voice_of(given: str | dict[str, Any] | None) -> str | None:
    """The voice that is asked for; None is the model's own.

    Raises:
        ApiError: 400 if it is no name.
    """
    name = given.get("id") if isinstance(given, dict) else given
    if name is not None and not isinstance(name, str):
        raise refused("voice", "voice has no name; give a string")
    return None if name is None or name.strip().lower() in _DEFAULT_VOICES else name


class SpeechRequest(BaseModel):
    """A text to be read aloud. `temperature`, `top_k`, `seed` are extensions."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: str = Field(min_length=1, max_length=16_384)
    model: str | None = None
    voice: str | dict[str, Any] | None = None
    instructions: str | None = None
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: Number = 1.0
    temperature: Number | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    seed: int | None = Field(None, ge=0, lt=2**63)

    def check(self) -> None:
        """Refuse what cannot be honoured.

        Raises:
            ApiError: 400, naming the field.
        """
        if not self.input.strip():
            raise refused("input", "input holds no words; give a text to be read aloud")
        if self.speed != 1:
            raise refused("speed", f"speed is {self.speed:g}, and only 1 is spoken; leave it out")
        if self.instructions:
            raise refused(
                "instructions", "instructions are not followed here; describe the voice in voice"
            )


@dataclass(frozen=True, kw_only=True)
class TranscriptionRequest:
    """The fields of a transcription form beside the file."""

    model: str | None
    language: str | None
    form: str
    stream: bool
    temperature: float

    @property
    def told(self) -> str | None:
        """The language as the model is told it."""
        given = (self.language or "").strip()
        return LANGUAGES.get(given.lower(), given or None)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TranscriptionRequest:
        """Read a form's fields.

        Raises:
            ApiError: 400, naming the field that cannot be understood or honoured.
        """

        def text(name: str) -> str | None:
            value = fields.get(name)
            return value if isinstance(value, str) and value else None

        for name in ("prompt", "include", "include[]", "known_speaker_names[]"):
            if text(name) is not None:
                raise refused(name, f"{name} is not done by this server; leave it out")
        for name in ("timestamp_granularities[]", "timestamp_granularities"):
            if text(name) not in (None, "segment"):
                raise refused(name, f"{name} is {text(name)!r}; times are given of segments only")
        form = text("response_format") or "json"
        if form not in _FORMATS:
            raise refused(
                "response_format",
                f"response_format is {form[:40]!r}; it must be one of {', '.join(_FORMATS)}",
            )
        said = (text("stream") or "false").lower()
        if said not in ("true", "false", "1", "0"):
            raise refused("stream", f"stream is {said[:40]!r}; it must be true or false")
        stream = said in ("true", "1")
        if stream and form not in ("json", "text"):
            raise refused("response_format", f"{form} cannot be streamed; ask for json")
        try:
            temperature = float(text("temperature") or 0)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature <= 2:
            raise refused("temperature", "temperature is no number from 0 to 2; correct it")
        language = text("language")
        if language is not None and (len(language) > 40 or not language.isprintable()):
            raise refused("language", "language is no name or code of a language; correct it")
        return cls(
            model=text("model"),
            language=language,
            form=form,
            stream=stream,
            temperature=temperature,
        )
