"""The settings of a realtime session: what a client asks for, and what holds.

What cannot be honoured and would change the answers is refused; what is only a wish (noise
reduction, tracing, another voice) is left out and named, so that ordinary clients work. Knows the
JSON forms of the Realtime API; no socket and no loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lfm2_audio.serving.calling import Tools
from lfm2_audio.serving.schema import refused, voice_of
from lfm2_audio.serving.sounding import RATE
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.turns import TurnSettings
from lfm2_mm.errors import SettingError

__all__ = ["Detection", "SessionSettings"]

_FORMAT = {"type": "audio/pcm", "rate": RATE}
_UNDONE = ("tracing", "include", "prompt", "reasoning", "parallel_tool_calls")
_LONGEST = 20_000  # characters of instructions
_HOURS = 24


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How the server finds turns: OpenAI's `server_vad`."""

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Detection:
        """Read a `turn_detection` object; `semantic_vad` becomes this.

        Raises:
            ApiError: 400 if a field is of another kind or out of range.
        """
        fields: dict[str, Any] = {}
        if "threshold" in given:
            fields["threshold"] = _number(given["threshold"], "threshold", 0.05, 0.99)
        for name, most in (("prefix_padding_ms", 5000), ("silence_duration_ms", 10_000)):
            if name in given:
                fields[name] = int(_number(given[name], name, 0, most))
        if given.get("idle_timeout_ms") is not None:
            fields["idle_timeout_ms"] = int(
                _number(given["idle_timeout_ms"], "idle_timeout_ms", 1000, 3_600_000)
            )
        for name in ("create_response", "interrupt_response"):
            if name in given:
                if not isinstance(given[name], bool):
                    raise refused(name, f"{name} is {str(given[name])[:40]!r}; it is true or false")
                fields[name] = given[name]
        return cls(**fields)

    @property
    def turns(self) -> TurnSettings:
        """The same for the loop."""
        return TurnSettings(
            threshold=self.threshold,
            release=min(0.35, 0.7 * self.threshold),
            prefix_ms=self.prefix_padding_ms,
            silence_ms=self.silence_duration_ms,
            tail_ms=min(200, self.silence_duration_ms),
            idle_ms=self.idle_timeout_ms,
            interrupt=self.interrupt_response,
        )


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """One session.

    Attributes:
        instructions: What the model is told beside how it speaks.
        detection: How turns are found; None leaves that to the client.
        transcription: Whether what the user says is written down, too.
        language: What the user speaks, for that.
        max_tokens: Tokens and frames of an answer; None is the model's own limit.
        tools: What may be called.
    """

    instructions: str = ""
    detection: Detection | None = Detection()
    transcription: bool = False
    language: str | None = None
    max_tokens: int | None = None
    tools: Tools = Tools()

    @property
    def told(self) -> str:
        """What the model is told: the instructions, and which functions there are."""
        return "\n".join(text for text in (self.instructions, self.tools.words) if text)

    def for_answer(self, given: Any) -> SessionSettings:
        """These as a `response` object changes them for one answer.

        Raises:
            ApiError: 400 naming the field that cannot be honoured.
        """
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise refused("response", "response is no object; give one, or leave it out")
        for name in ("instructions", "input", "max_output_tokens", "prompt"):
            if given.get(name):
                raise refused(
                    f"response.{name}",
                    f"response.{name} is not done for one answer; set it with session.update",
                )
        wanted = given.get("output_modalities", ["audio"])
        if wanted != ["audio"] or given.get("conversation", "auto") != "auto":
            raise refused(
                "response", "answers are spoken, and part of the conversation; leave these out"
            )
        return self._called(given)

    def _called(self, given: Mapping[str, Any]) -> SessionSettings:
        if given.get("tools") is None and given.get("tool_choice") is None:
            return self
        functions = given.get("tools")
        if functions is None:
            functions = list(self.tools.functions)
        return replace(self, tools=Tools.of(functions, given.get("tool_choice", self.tools.choice)))

    def updated(self, given: Mapping[str, Any]) -> tuple[SessionSettings, list[str]]:
        """These with what a client asks for, and the names of what is left out.

        Raises:
            ApiError: 400 naming the field that cannot be honoured.
        """
        kind = given.get("type", "realtime")
        if kind != "realtime":
            raise refused(
                "session.type", f"session.type is {str(kind)[:40]!r}; only realtime is done here"
            )
        if given.get("output_modalities", ["audio"]) != ["audio"]:
            raise refused(
                "session.output_modalities",
                "answers of a realtime session are spoken, with their text; ask for ['audio']",
            )
        new, left_out = self._called(given), [name for name in _UNDONE if given.get(name)]
        if "instructions" in given:
            text = given["instructions"]
            if not isinstance(text, str) or len(text) > _LONGEST:
                raise refused(
                    "session.instructions",
                    f"instructions are no text of at most {_LONGEST:,} characters; shorten them",
                )
            new = replace(new, instructions=text)
        most = given.get("max_output_tokens", new.max_tokens)
        if most is not None:
            most = None if most == "inf" else int(_number(most, "max_output_tokens", 1, 8192))
        new = replace(new, max_tokens=most)
        audio = _mapping(given.get("audio"), "session.audio")
        new = new._heard(_mapping(audio.get("input"), "session.audio.input"), left_out)
        output = _mapping(audio.get("output"), "session.audio.output")
        _check_format(output.get("format"), "session.audio.output.format")
        if output.get("speed", 1) != 1:
            left_out.append("audio.output.speed")
        if voice_of(output.get("voice")) is not None:
            left_out.append("audio.output.voice")
        return new, left_out

    def _heard(self, given: Mapping[str, Any], left_out: list[str]) -> SessionSettings:
        new = self
        _check_format(given.get("format"), "session.audio.input.format")
        if given.get("noise_reduction"):
            left_out.append("audio.input.noise_reduction")
        if "transcription" in given:
            wish = given["transcription"]
            told = _mapping(wish, "session.audio.input.transcription")
            language = told.get("language")
            if language is not None and (not isinstance(language, str) or len(language) > 40):
                raise refused(
                    "session.audio.input.transcription.language", "language is no code or name"
                )
            new = replace(new, transcription=wish is not None, language=language)
        if "turn_detection" in given:
            wish = given["turn_detection"]
            kind = None if wish is None else _mapping(wish, "turn_detection").get("type")
            if wish is not None and kind not in ("server_vad", "semantic_vad"):
                raise refused(
                    "session.audio.input.turn_detection.type",
                    f"turn_detection.type is {str(kind)[:40]!r}; it is server_vad or, for turns by "
                    "hand, turn_detection is null",
                )
            if kind == "semantic_vad":
                left_out.append("audio.input.turn_detection.semantic_vad")
            new = replace(new, detection=None if wish is None else Detection.of(wish))
        return new

    def voice(self, base: VoiceSettings) -> VoiceSettings:
        """The settings of the loop.

        Raises:
            ApiError: 400 if they contradict each other.
        """
        try:
            turns = TurnSettings() if self.detection is None else self.detection.turns
        except SettingError as problem:
            raise refused("session.audio.input.turn_detection", str(problem)) from None
        return replace(base, turns=turns, manual=self.detection is None)

    def to_realtime(self, id: str, model: str) -> dict[str, Any]:
        """The session as it stands."""
        found = None
        if self.detection is not None:
            found = {"type": "server_vad", **vars(self.detection)}
        written = {"model": model, "language": self.language} if self.transcription else None
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": id,
            "model": model,
            "output_modalities": ["audio"],
            "instructions": self.instructions,
            "tools": list(self.tools.functions),
            "tool_choice": self.tools.choice,
            "max_output_tokens": self.max_tokens or "inf",
            "expires_at": int(time.time()) + _HOURS * 3600,
            "audio": {
                "input": {
                    "format": _FORMAT,
                    "turn_detection": found,
                    "transcription": written,
                    "noise_reduction": None,
                },
                "output": {"format": _FORMAT, "voice": "default", "speed": 1.0},
            },
        }


def _mapping(given: Any, name: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise refused(name, f"{name} is no object; give one")
    return given


def _number(given: Any, name: str, low: float, high: float) -> float:
    fits = isinstance(given, int | float) and not isinstance(given, bool)
    if not fits or not low <= given <= high:  # also not what is no number, and not infinity
        raise refused(
            name, f"{name} is {str(given)[:40]!r}; it must be a number from {low:g} to {high:g}"
        )
    return float(given)


def _check_format(given: Any, name: str) -> None:
    if given is None:
        return
    form = _mapping(given, name)
    if form.get("type") != "audio/pcm" or form.get("rate", RATE) != RATE:
        raise refused(name, f"{name} must be audio/pcm at {RATE} Hz: 16-bit mono samples")
