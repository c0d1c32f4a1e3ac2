"""Output heads: what a hidden state becomes.

A step head turns the last hidden state of a sequence into events and the next embedding; text is
one, frontends bring others. Heads are batched over the sequences of a step and know neither caches
nor scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import Grammar
from lfm2_mm.events import AudioFrame, FinishReason, TextDelta, TokenScore
from lfm2_mm.sampling import Sampler
from lfm2_mm.text_stream import TextStream

if TYPE_CHECKING:
    from lfm2_mm.quantize.layers import Packed

__all__ = ["Generation", "HeadState", "StepHead", "StepResult", "TextHead", "TextState"]

_State = TypeVar("_State", contravariant=True)


@dataclass
class StepResult:
    """What one sequence got out of a step.

    Attributes:
        events: To hand to the caller, in order.
        embedding: The next input row `[d]`; None when the sequence has ended.
        finish: Why it ended; None while it goes on.
        error: What went wrong with this sequence; it ends.
        identity: What the next position is, for prefix reuse (see `Prompt.identity`).
        boundary: Whether a later prompt may end its likeness to this sequence behind the next
            position; the state there is then kept.
    """

    events: Sequence[TextDelta | AudioFrame]
    embedding: Tensor | None = None
    finish: FinishReason | None = None
    error: Exception | None = None
    identity: int = 0
    boundary: bool = False


class HeadState(Protocol):
    """What the engine reads of a sequence's state in its head."""

    @property
    def n_generated(self) -> int:
        """Tokens and frames generated so far."""
        ...

    @property
    def n_frames(self) -> int:
        """Audio frames among them."""
        ...


class StepHead(Protocol[_State]):
    """One step for several sequences at once; `_State` is what it remembers of each between."""

    def step(self, hidden: Float[Tensor, "b d"], states: Sequence[_State]) -> list[StepResult]:
        """Consume the last hidden state of each sequence; one's error is its result alone."""
        ...


class Generation(Protocol):
    """How a request generates: by which head, and from what state."""

    @property
    def head(self) -> StepHead[Any]:
        """One object for all requests that may share a step."""
        ...

    def start(self, prompt: Prompt, room: int) -> HeadState:
        """The state before the first step.

        Args:
            prompt: What the sequence begins with.
            room: Tokens and frames that may be generated at most, at least 1.
        """
        ...


@dataclass
class TextState:
    """A text sequence between steps.

    Attributes:
        sampler: Chooses the next token and remembers those chosen.
        stream: Turns tokens into whole characters and watches for stop strings.
        max_tokens: Tokens to generate at most.
        grammar: Allows only some next tokens; None allows all.
        tokens: What was generated so far, the end token included.
        logprobs: How many of the likeliest tokens to report at each step; None reports none, and
            not the chosen one either.
    """

    sampler: Sampler
    stream: TextStream
    max_tokens: int
    grammar: Grammar | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: int | None = None

    @property
    def n_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens)

    @property
    def n_frames(self) -> int:
        """None of them."""
        return 0


class TextHead:
    """Logits over the vocabulary, then a token.

    Args:
        backbone: Owns the token embedding.
        weight: `[v, d]`; the embedding itself when the head is tied. A packed one multiplies.
        eos_ids: Tokens that end a turn.
    """

    def __init__(
        self, backbone: Backbone, weight: Float[Tensor, "v d"] | Packed, eos_ids: Sequence[int]
    ) -> None:
        self.backbone, self.weight, self.eos_ids = backbone, weight, frozenset(eos_ids)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Raw scores of every token."""
        if isinstance(self.weight, Tensor):
            return F.linear(hidden, self.weight)
        out: Tensor = self.weight(hidden)
        return out

    def step(self, hidden: Float[Tensor, "b d"], states: Sequence[TextState]) -> list[StepResult]:
        """Choose a token for each sequence."""
        rows = self.logits(hidden).float()
        return [self._guarded(row, state) for row, state in zip(rows, states, strict=True)]

    def _guarded(self, logits: Tensor, state: TextState) -> StepResult:
        try:
            return self._one(logits, state)
        except Exception as problem:  # a constraint without a way on, say
            return StepResult([], error=problem)

    def _one(self, logits: Tensor, state: TextState) -> StepResult:
        grammar = state.grammar
        token = state.sampler.pick(logits, grammar.allowed() if grammar else None)
        state.tokens.append(token)
        if token in self.eos_ids:
            return self._end(state, "stop", state.stream.flush())
        if grammar is not None:
            grammar.accept(token)
        text = state.stream.push(token)
        scores = () if state.logprobs is None else (_score(logits, token, state.logprobs),)
        if state.stream.stopped:
            return self._end(state, "stop", text, scores)
        if grammar is not None and grammar.finished:
            return self._end(state, "stop", text + state.stream.flush(), scores)
        if state.n_generated >= state.max_tokens:
            return self._end(state, "length", text + state.stream.flush(), scores)
        return StepResult(
            [TextDelta(text, scores=scores)] if text or scores else [],
            self.backbone.embed_tokens.weight[token],
            identity=token,
        )

    @staticmethod
    def _end(
        state: TextState, finish: FinishReason, text: str, scores: tuple[TokenScore, ...] = ()
    ) -> StepResult:
        return StepResult([TextDelta(text, scores=scores)] if text or scores else [], None, finish)


def _score(logits: Float[Tensor, " v"], token: int, top: int) -> TokenScore:
    """How likely a token was, and the likeliest."""
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(min(top, logs.numel()))
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenScore(token, float(logs[token]), best)
