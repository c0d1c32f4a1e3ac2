"""Output heads: what a hidden state becomes.

A step head turns the last hidden state of a sequence into events and the next embedding; text is
one, a depth transformer for audio codes will be another. Heads are batched over the sequences of
a step and know neither caches nor scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.constrain import Grammar
from lfm2_mm.events import FinishReason, TextDelta
from lfm2_mm.sampling import Sampler
from lfm2_mm.text_stream import TextStream

__all__ = ["StepHead", "StepResult", "TextHead", "TextState"]

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
    """

    events: list[TextDelta]
    embedding: Tensor | None = None
    finish: FinishReason | None = None
    error: Exception | None = None
    identity: int = 0


class StepHead(Protocol[_State]):
    """One step for several sequences at once; `_State` is what it remembers of each between."""

    def step(self, hidden: Float[Tensor, "b d"], states: Sequence[_State]) -> list[StepResult]:
        """Consume the last hidden state of each sequence; one's error is its result alone."""
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
    """

    sampler: Sampler
    stream: TextStream
    max_tokens: int
    grammar: Grammar | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def n_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens)


class TextHead:
    """Logits over the vocabulary, then a token.

    Args:
        backbone: Owns the token embedding.
        weight: `[v, d]`; the embedding itself when the head is tied.
        eos_ids: Tokens that end a turn.
    """

    def __init__(
        self, backbone: Backbone, weight: Float[Tensor, "v d"], eos_ids: Sequence[int]
    ) -> None:
        self.backbone, self.weight, self.eos_ids = backbone, weight, frozenset(eos_ids)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Raw scores of every token."""
        return F.linear(hidden, self.weight)

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
        if state.stream.stopped:
            return self._end(state, "stop", text)
        if grammar is not None and grammar.finished:
            return self._end(state, "stop", text + state.stream.flush())
        if state.n_generated >= state.max_tokens:
            return self._end(state, "length", text + state.stream.flush())
        return StepResult(
            [TextDelta(text)] if text else [],
            self.backbone.embed_tokens.weight[token],
            identity=token,
        )

    @staticmethod
    def _end(state: TextState, finish: FinishReason, text: str) -> StepResult:
        return StepResult([TextDelta(text)] if text else [], None, finish)
