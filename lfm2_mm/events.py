"""What a running request reports: text, audio, the end, an error, with counts and times.

Plain frozen dataclasses without torch, so that the command line, the server and the voice loop
can share them. This module knows nothing of the engine that emits them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AudioFrame",
    "Done",
    "Error",
    "Event",
    "FinishReason",
    "TextDelta",
    "Timings",
    "TokenScore",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: Positions of the prompt, images and audio included.
        attachment_tokens: Those filled by an input encoder (image or audio positions).
        cached_tokens: Those whose state came from the prefix cache and were not computed again.
        completion_tokens: Tokens and audio frames generated, those that end something included.
        encoded_parts: Content parts that an encoder really ran on (not served from a cache).
        audio_frames: Audio frames among those generated.
    """

    prompt_tokens: int = 0
    attachment_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    encoded_parts: int = 0
    audio_frames: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds.

    Attributes:
        prepare: Reading attachments and building the prompt.
        encode: Running input encoders.
        prefill: Running the backbone over the prompt.
        first_token: From the call to the first generated token.
        decode: From the first generated token to the last.
    """

    prepare: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely a generated token was, by the model's own scores before any sampling rule.

    Attributes:
        id: The token.
        logprob: Its natural logarithm of probability.
        top: The likeliest tokens with theirs, best first; as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of text: always whole characters.

    Attributes:
        text: The piece; where `ids` are given it may be empty.
        ids: Token ids that were generated since the last piece, from heads whose output becomes
            part of a later prompt as it is; empty from others.
        scores: Of the tokens generated since the last piece, where the request asks for them;
            `text` may then be empty.
    """

    text: str
    ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class AudioFrame:
    """The next frame of audio codes, int64 `[codebooks]`."""

    codes: Tensor


@dataclass(frozen=True, slots=True)
class Done:
    """The request ended; the last event of a handle that did not fail."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the first token not counted; 0.0 for fewer than two tokens."""
        steps = self.usage.completion_tokens - 1
        return steps / self.timings.decode if steps > 0 and self.timings.decode > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the form that `--json` prints."""
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 2)}


@dataclass(frozen=True, slots=True)
class Error:
    """The request failed; the last event of its handle."""

    exception: Exception


Event = TextDelta | AudioFrame | Done | Error
