"""What was said: turns of text and speech, made into the prompt of the next answer.

A conversation never changes; every method gives a new one that shares its turns, and a turn is
turned into ids once. What the model said is kept to the very token and frame, so that the state it
was said in is found again. Lays prompts out as liquid-audio's `ChatState` does (seen through its
outputs). Knows no loop and no sound device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.frames import FRAMES_TYPE, FrameEncoder, frame_identities
from lfm2_audio.waveform import Audio
from lfm2_mm.chat import Prompt, Slot, content_identities
from lfm2_mm.errors import InputError, MessageError
from lfm2_mm.events import AudioFrame, TextDelta
from lfm2_mm.frontends import InputEncoder, Prepared
from lfm2_mm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Conversation", "Frames", "Hearing", "Turn", "Words"]

Role = Literal["user", "assistant"]


class Hearing(Protocol):
    """Whoever can be given a conversation: a model, as far as prompts need it."""

    tokenizer: Tokenizer
    encoders: dict[str, InputEncoder]
    frame_encoder: FrameEncoder


@dataclass(frozen=True, slots=True)
class Words:
    """Text.

    Attributes:
        text: As a person reads it.
        ids: The very tokens, where the model said them; None has the text tokenized.
    """

    text: str
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Frames:
    """Speech that the model said, int64 `[t, k]`, without a token in between."""

    codes: Int[Tensor, "t k"]

    @property
    def heard(self) -> int:
        """How many frames stand for sound: those that end speech do not."""
        return int((self.codes < END_OF_AUDIO).all(-1).sum())


@dataclass(eq=False, slots=True)
class _Block:
    """A turn in ids; slots as (encoder, prepared, first position)."""

    ids: list[int] = field(default_factory=list)
    identity: list[int] = field(default_factory=list)
    slots: list[tuple[InputEncoder, Prepared, int]] = field(default_factory=list)

    def tokens(self, ids: Iterable[int]) -> None:
        """Text."""
        before = len(self.ids)
        self.ids += ids
        self.identity += self.ids[before:]

    def content(
        self, encoder: InputEncoder, part: Mapping[str, Any], identity: list[int] | None = None
    ) -> None:
        """Positions that an encoder fills."""
        prepared = encoder.prepare(part)
        n = prepared.n_positions
        if identity is None:
            identity = content_identities(prepared.key, n).tolist()
        self.slots.append((encoder, prepared, len(self.ids)))
        self.ids += [encoder.token_id] * n
        self.identity += identity


@dataclass(frozen=True, eq=False)
class Turn:
    """What one side said before the other spoke.

    Attributes:
        role: Who.
        parts: In the order it was said; recordings from users only, frames from the model only.
    """

    role: Role
    parts: tuple[Words | Audio | Frames, ...]
    _made: list[tuple[Hearing, int, _Block]] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The written part of it."""
        return "".join(part.text for part in self.parts if isinstance(part, Words))

    @property
    def n_frames(self) -> int:
        """Frames of sound in it."""
        return sum(part.heard for part in self.parts if isinstance(part, Frames))

    def block(self, model: Hearing, chunk: int) -> _Block:
        """The turn in ids, without what stands around it; made once for a model."""
        for maker, size, made in self._made:
            if maker is model and size == chunk:
                return made
        block = _Block()
        for part in self.parts:
            if isinstance(part, Words):
                known = part.ids
                block.tokens(model.tokenizer.encode_plain(part.text) if known is None else known)
            elif isinstance(part, Audio):
                block.content(_hears(model), {"type": "audio", "audio": part})
            else:
                for codes in torch.split(part.codes, chunk):  # a state is kept where a slot ends
                    given = {"type": FRAMES_TYPE, "frames": codes}
                    block.content(model.frame_encoder, given, frame_identities(codes))
        self._made[:] = [(model, chunk, block)]
        return block


@dataclass(frozen=True, eq=False)
class Conversation:
    """A system prompt and turns.

    Attributes:
        system: What the model shall do; None leaves the system turn out.
        turns: Oldest first.
        chunk: Frames in a round of interleaved speech; where an answer may be cut.

    Example:
        >>> said = Conversation("Respond with interleaved text and audio.").user("Good morning!")
        >>> said.turns[0].text
        'Good morning!'
    """

    system: str | None = None
    turns: tuple[Turn, ...] = ()
    chunk: int = 12

    def user(self, content: Any) -> Conversation:
        """With what the user said.

        Args:
            content: Text; an `Audio`, or something `read_audio` reads (a path, bytes); or a list of
                these, in order.

        Raises:
            InputError: if a recording cannot be read.
        """
        given = content if isinstance(content, list | tuple) else [content]
        return self._with(Turn("user", tuple(_user_part(one) for one in given)))

    def assistant(self, segments: Sequence[Any]) -> Conversation:
        """With what the model said.

        Args:
            segments: In the order they came: events of a handle (`TextDelta`, `AudioFrame`), or
                texts and codes int64, `[k]` or `[t, k]`. Only events of text keep the very tokens;
                a plain text is tokenized anew, and the state after it is not found again.
        """
        parts = (_said(one) for one in segments)
        return self._with(Turn("assistant", tuple(_joined(p for p in parts if p is not None))))

    def cut(self, n_frames: int) -> Conversation:
        """With no more of the model's last turn than so many frames, and the text said by then.

        The cut is made where a chunk of speech ends, at or before the place asked for: there the
        layout of rounds stays what the model knows, and its state was kept. What was written after
        that chunk goes; so does all of it, if less than a chunk was heard.

        Args:
            n_frames: Frames that were heard; those that end speech are not counted.
        """
        if not self.turns or self.turns[-1].role != "assistant":
            return self
        turn = self.turns[-1]
        if n_frames >= turn.n_frames:
            return self
        pieces: list[Words | Audio | Frames] = []
        for part in turn.parts:
            if isinstance(part, Frames):
                pieces += [Frames(codes) for codes in torch.split(part.codes, self.chunk)]
            else:
                pieces.append(part)
        heard = end = 0
        for i, piece in enumerate(pieces):
            if isinstance(piece, Frames):
                heard += piece.heard
                if heard > n_frames:
                    break
                end = i + 1
        kept = tuple(_joined(pieces[:end]))
        return replace(self, turns=(*self.turns[:-1], Turn("assistant", kept)))

    def drop(self, n_turns: int) -> Conversation:
        """Without so many of the oldest turns."""
        return replace(self, turns=self.turns[max(n_turns, 0) :])

    def to_prompt(self, model: Hearing) -> Prompt:
        """What the model is given: behind a user's turn the answer begins, else the next turn.

        Raises:
            InputError: if a turn holds what this model cannot hear.
        """
        tokenizer, whole = model.tokenizer, _Block()
        whole.tokens(tokenizer.encode("<|startoftext|>"))
        if self.system is not None:
            whole.tokens(tokenizer.encode("<|im_start|>system\n"))
            whole.tokens(tokenizer.encode_plain(self.system))
            whole.tokens(tokenizer.encode("<|im_end|>\n"))
        for turn in self.turns:
            whole.tokens(tokenizer.encode(f"<|im_start|>{turn.role}\n"))
            block, start = turn.block(model, self.chunk), len(whole.ids)
            whole.ids += block.ids
            whole.identity += block.identity
            whole.slots += [(who, what, start + at) for who, what, at in block.slots]
            whole.tokens(tokenizer.encode("<|im_end|>\n"))
        asked = bool(self.turns) and self.turns[-1].role == "user"
        whole.tokens(tokenizer.encode(f"<|im_start|>{'assistant' if asked else 'user'}\n"))
        slots = tuple(
            Slot(
                encoder=encoder,
                prepared=prepared,
                positions=torch.arange(at, at + prepared.n_positions),
                end=at + prepared.n_positions,
            )
            for encoder, prepared, at in whole.slots
        )
        return Prompt(
            ids=torch.tensor(whole.ids), identity=torch.tensor(whole.identity), slots=slots
        )

    def _with(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns, turn))


def _user_part(content: Any) -> Words | Audio:
    if isinstance(content, str):
        return Words(content)
    if isinstance(content, Audio):
        return content
    if isinstance(content, bytes | bytearray | Path):
        from lfm2_audio.waveform import read_audio

        return read_audio(content)
    raise MessageError(
        f"a user's turn holds a {type(content).__name__}; give text, an Audio, a path or bytes"
    )


def _said(segment: Any) -> Words | Frames | None:
    if isinstance(segment, Words | Frames):
        return segment
    if isinstance(segment, TextDelta):
        # without ids it is text that was held back: the tokens before it are those it came from
        return Words(segment.text, segment.ids)
    if isinstance(segment, str):
        return Words(segment) if segment else None
    codes = segment.codes if isinstance(segment, AudioFrame) else segment
    if isinstance(codes, np.ndarray):
        codes = torch.from_numpy(codes)
    if not isinstance(codes, Tensor) or codes.dim() not in (1, 2):
        raise InputError(
            f"an answer holds a {type(segment).__name__}; give texts, codes or the events of a "
            "handle"
        )
    frames = codes.to("cpu", torch.int64)
    return Frames(frames if frames.dim() == 2 else frames[None])


def _joined(parts: Iterable[Words | Audio | Frames]) -> Iterator[Words | Audio | Frames]:
    """Neighbours of one kind become one part."""

    def kind(part: Words | Audio | Frames) -> tuple[type, bool]:
        return type(part), isinstance(part, Words) and part.ids is None

    for _, run in groupby(parts, key=kind):
        same = list(run)
        if len(same) == 1:
            yield same[0]
        elif isinstance(same[0], Frames):
            yield Frames(torch.cat([part.codes for part in same if isinstance(part, Frames)]))
        else:
            words = [part for part in same if isinstance(part, Words)]
            ids = None if words[0].ids is None else sum((w.ids or () for w in words), ())
            yield Words("".join(w.text for w in words), ids)


def _hears(model: Hearing) -> InputEncoder:
    encoder = model.encoders.get("audio")
    if encoder is None:
        raise InputError("the conversation holds a recording, but this model hears nothing")
    return encoder
