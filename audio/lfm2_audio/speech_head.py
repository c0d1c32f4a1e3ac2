"""The step head of speech: text tokens and frames of codes, one after the other or interleaved.

Follows `generate_sequential` and `generate_interleaved` of liquid-audio 1.3.0 (seen through their
outputs), the odd corners included: see `SpeechState.left`. Knows hidden states and codes; neither
caches nor how codes sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm2_audio.depthformer import Choose
from lfm2_audio.frames import FrameEmbedding, frame_identities
from lfm2_mm.chat import Prompt
from lfm2_mm.errors import CheckpointError, Lfm2Error
from lfm2_mm.events import AudioFrame, FinishReason, TextDelta
from lfm2_mm.heads import StepResult, TextHead
from lfm2_mm.sampling import Sampler, Sampling
from lfm2_mm.text_stream import TextStream
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["DepthHead", "Mode", "Specials", "Speech", "SpeechHead", "SpeechState"]

_OVERFLOW = (
    "the scores of a frame of speech hold NaN or infinity: the computation overflowed, try dtype "
    "float32 or check the weights"
)

Mode = Literal["sequential", "interleaved"]


@runtime_checkable
class DepthHead(Protocol):
    """What makes frames of hidden states: a depthformer, or another model's part.

    Attributes:
        end: The first code of a frame that ends speech.
    """

    end: int

    def frames(self, hidden: Float[Tensor, "n d"], choose: Choose) -> Int[Tensor, "n k"]:
        """The next frame of each sequence; `choose` is called once for each codebook, in order."""
        ...

    def pack(self) -> Iterator[None]:
        """Lay out weights for inference, a little with each item; perhaps nothing."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Specials:
    """Ids of the tokens that steer speech."""

    audio_start: int
    text_end: int
    turn_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Specials:
        """Look them up by their strings.

        Raises:
            CheckpointError: if the tokenizer lacks one.
        """
        strings = {
            "audio_start": "<|audio_start|>",
            "text_end": "<|text_end|>",
            "turn_end": "<|im_end|>",
        }
        ids: dict[str, int] = {}
        for name, string in strings.items():
            found = tokenizer.token_id(string)
            if found is None:
                raise CheckpointError(
                    f"the tokenizer has no token {string!r}, without which speech cannot be "
                    "generated; use the tokenizer files of an LFM2-Audio checkpoint"
                )
            ids[name] = found
        return cls(**ids)


@dataclass(eq=False)
class SpeechState:
    """A sequence of text and speech between steps.

    Attributes:
        mode: When text and speech take turns.
        text: Chooses tokens.
        audio: Chooses codes.
        stream: Turns tokens into text.
        room: Tokens and frames to generate at most.
        max_frames: Frames to generate at most; None sets no limit.
        speaking: Whether the next step makes a frame.
        left: Steps until text and speech take turns (interleaved only). Speech that ends within
            its share does not start the count anew, and after the end of the text it is not read.
        text_done: Whether the model has ended its text.
        in_row: Frames since the last token.
        n_generated: Tokens and frames so far.
        n_frames: Frames so far, those that end speech included.
    """

    mode: Mode
    text: Sampler
    audio: Sampler
    stream: TextStream
    room: int
    max_frames: int | None
    left: int
    speaking: bool = False
    text_done: bool = False
    in_row: int = 0
    n_generated: int = 0
    n_frames: int = 0

    @property
    def full(self) -> bool:
        """Whether a limit is reached."""
        many = self.max_frames is not None and self.n_frames >= self.max_frames
        return many or self.n_generated >= self.room


class SpeechHead:
    """Tokens by the text head, frames by the depth head.

    Args:
        text: Scores tokens.
        depthformer: Makes frames.
        frames: Turns frames into inputs of the backbone.
        tokenizer: Gives the steering tokens, and turns tokens into text.
        n_text: Tokens in a round of an interleaved answer.
        n_audio: Frames in a round.
    """

    def __init__(
        self,
        text: TextHead,
        depthformer: DepthHead,
        frames: FrameEmbedding,
        tokenizer: Tokenizer,
        *,
        n_text: int,
        n_audio: int,
    ) -> None:
        self.text, self.depthformer, self.frames = text, depthformer, frames
        self.tokenizer, self.specials = tokenizer, Specials.of(tokenizer)
        self.n_text, self.n_audio = n_text, n_audio
        self.sounds = depthformer.end
        self._packing = depthformer.pack()

    def step(self, hidden: Float[Tensor, "b d"], states: Sequence[SpeechState]) -> list[StepResult]:
        """A token for the sequences that write, a frame for those that speak."""
        results: dict[int, StepResult] = {}
        writing = [i for i, state in enumerate(states) if not state.speaking]
        speaking = [i for i, state in enumerate(states) if state.speaking]
        if writing:
            scores = self.text.logits(_rows(hidden, writing)).float()
            for i, row in zip(writing, scores, strict=True):
                results[i] = self._token(row, states[i])
        if speaking:
            made = self._frames(_rows(hidden, speaking), [states[i] for i in speaking])
            results |= dict(zip(speaking, made, strict=True))
        return [results[i] for i in range(len(states))]

    # -- text --------------------------------------------------------------------------------

    def _token(self, scores: Tensor, state: SpeechState) -> StepResult:
        try:
            token = state.text.pick(scores)
        except Lfm2Error as problem:
            return StepResult([], error=problem)
        state.n_generated += 1
        state.left -= 1
        state.in_row = 0
        if token == self.specials.turn_end:
            return _end(state, "stop", [])
        events = [TextDelta(state.stream.push(token), (token,))]
        if state.mode == "sequential":
            state.speaking = token == self.specials.audio_start
        else:
            state.text_done = state.text_done or token == self.specials.text_end
            if state.left == 0 or state.text_done:
                state.speaking, state.left = True, self.n_audio
        if state.full:
            return _end(state, "length", events)
        return StepResult(events, self.text.backbone.embed_tokens.weight[token], identity=token)

    # -- speech ------------------------------------------------------------------------------

    def _frames(self, hidden: Tensor, states: Sequence[SpeechState]) -> list[StepResult]:
        draw = _Draw(states, self.depthformer.end, self.sounds)
        codes = self.depthformer.frames(hidden, draw)
        next(self._packing, None)  # a layer a frame: costs no first answer anything
        embeddings = self.frames(codes)
        problems = draw.problems()
        identities = frame_identities(codes)
        results = []
        for i, state in enumerate(states):
            if (problem := problems[i]) is not None:
                results.append(StepResult([], error=problem))
            else:
                results.append(self._frame(codes[i].cpu(), embeddings[i], identities[i], state))
        return results

    def _frame(
        self, codes: Tensor, embedding: Tensor, identity: int, state: SpeechState
    ) -> StepResult:
        state.n_generated += 1
        state.n_frames += 1
        state.left -= 1
        state.in_row += 1
        if state.mode == "interleaved" and state.left == 0 and not state.text_done:
            state.speaking, state.left = False, self.n_text
        ended = int(codes[0]) == self.depthformer.end
        if ended:
            state.speaking = False
        events = [AudioFrame(codes)]
        if state.full:
            return _end(state, "length", events)
        boundary = ended or state.in_row % self.n_audio == 0
        return StepResult(events, embedding, identity=identity, boundary=boundary)


class _Draw:
    """Chooses one code for each sequence, codebook after codebook.

    A sequence whose speech has ended, or whose scores are of no use, is out of the draw: so it
    gets the same codes alone as beside others. Codes without a sound are not drawn, but for the one
    that ends speech; where the likeliest is taken, it is taken as it is.
    """

    def __init__(self, states: Sequence[SpeechState], end: int, sounds: int) -> None:
        self.states, self.end, self.sounds = states, end, sounds
        self._sampled = [i for i, s in enumerate(states) if not s.audio.sampling.greedy]
        self._errors: dict[int, Lfm2Error] = {}
        self._tops: list[Tensor] = []
        self._first: list[int] = []

    def __call__(self, book: int, scores: Float[Tensor, "n v"]) -> Tensor:
        """See `lfm2_audio.depthformer.Choose`."""
        rows = scores.float()
        top, codes = rows.max(-1)
        self._tops.append(top)
        if not self._sampled:
            allowed = None
        else:
            allowed = torch.arange(rows.shape[1], device=rows.device) < self.sounds
            if book == 0 and self.end < len(allowed):
                allowed[self.end] = True
        for i in self._sampled:
            if i in self._errors or (book and self._first[i] == self.end):
                continue
            try:
                codes[i] = self.states[i].audio.pick(rows[i], allowed)
            except Lfm2Error as problem:
                self._errors[i] = problem
        if book == 0:
            self._first = codes.tolist()
        return codes

    def problems(self) -> list[Lfm2Error | None]:
        """What went wrong with each sequence."""
        sound = torch.stack(self._tops).isfinite().all(0).tolist()
        return [
            self._errors.get(i) or (None if fine else Lfm2Error(_OVERFLOW))
            for i, fine in enumerate(sound)
        ]


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How a request speaks; a `lfm2_mm.heads.Generation`.

    Attributes:
        head: Shared by all requests of a model.
        mode: `sequential` (recognition, reading aloud) or `interleaved` (conversation).
        text: How tokens are chosen.
        audio: How codes are chosen; all codebooks alike.
        max_frames: Frames to generate at most, beside the request's own limit.
    """

    head: SpeechHead
    mode: Mode = "interleaved"
    text: Sampling = Sampling()
    audio: Sampling = Sampling()
    max_frames: int | None = None

    def start(self, prompt: Prompt, room: int) -> SpeechState:
        """See `Generation.start`: every answer begins with text."""
        return SpeechState(
            mode=self.mode,
            text=Sampler(self.text, prompt.ids.tolist()),
            audio=Sampler(self.audio),
            stream=TextStream(self.head.tokenizer.decode_output),
            room=room,
            max_frames=self.max_frames,
            left=self.head.n_text,
        )


def _rows(hidden: Tensor, which: Sequence[int]) -> Tensor:
    return hidden if len(which) == len(hidden) else hidden[list(which)]


def _end(
    state: SpeechState, finish: FinishReason, events: Sequence[TextDelta | AudioFrame]
) -> StepResult:
    rest = state.stream.flush()
    return StepResult([*events, *([TextDelta(rest)] if rest else [])], None, finish)
