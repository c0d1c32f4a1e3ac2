"""A request, the handle that reports on it, and its state between steps.

Whoever reads a handle drives the engine behind it. Knows events, prompts and caches; how steps are
made is the engine's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lfm2_mm.cache import SequenceCache
from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import Constraint
from lfm2_mm.events import Done, Error, Event, FinishReason, TextDelta, Timings, Usage
from lfm2_mm.heads import Generation, HeadState, StepHead
from lfm2_mm.sampling import Sampling

__all__ = ["Handle", "Request", "Running", "Steps"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        prompt: Token ids and the content parts between them.
        generation: How to generate; None generates text, as the next four say.
        sampling: How tokens are chosen.
        max_tokens: Tokens (and frames) to generate at most; cut to what the context leaves.
        stop: Strings that end the answer and are not part of it.
        constraint: A JSON schema or regex the answer must follow.
        logprobs: Report how likely each token was, and so many of the likeliest; None reports none.
        reuse: Whether prefixes computed earlier may be used, and this one's kept.
        prefill_only: Generate nothing: compute the prompt up to its last position and keep it, so
            that a request with this prompt or a longer one starts there.
        began: `time.perf_counter()` of the caller's start; first-token time counts from there.
    """

    prompt: Prompt
    generation: Generation | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    logprobs: int | None = None
    reuse: bool = True
    prefill_only: bool = False
    began: float = field(default_factory=time.perf_counter)


class Steps(Protocol):
    """What a handle needs of the engine."""

    def step(self) -> bool:
        """Run one step for everybody."""
        ...

    def sweep(self) -> None:
        """Let go of cancelled requests."""
        ...


class Handle:
    """One running request: iterate it for events, the last of which is `Done` or `Error`.

    Leaving the loop early cancels the request. Several handles may be read in any order, also from
    several threads, each by one of them.

    Attributes:
        prompt: What the model was given.
        cancelled: Whether the end was asked for.
        ended: Whether the last event is there; it may still wait to be read.
        done: The last event, once it is there and the request did not fail.
    """

    def __init__(self, engine: Steps, prompt: Prompt) -> None:
        self._engine, self.prompt = engine, prompt
        self._events: deque[Event] = deque()
        self.cancelled = self.ended = False
        self.done: Done | None = None

    def put(self, *events: Event) -> None:
        """For the engine: report events; nothing may follow the last one."""
        for event in events:
            self._events.append(event)
            if isinstance(event, Done):
                self.done = event
            self.ended = self.ended or isinstance(event, Done | Error)

    @property
    def ready(self) -> bool:
        """Whether the next event, or the end, can be read without running a step."""
        return self.ended or bool(self._events)

    def drain(self) -> list[Event]:
        """What was reported and not read yet; for whoever drives the engine itself."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def cancel(self) -> None:
        """Ask for the end; behind what was already there comes `Done` with reason "cancelled"."""
        if not self.ended:
            self.cancelled = True
            self._engine.sweep()

    def __iter__(self) -> Iterator[Event]:
        try:
            while True:
                while not self._events:
                    if self.ended:
                        return
                    self._engine.step()
                yield self._events.popleft()
        finally:
            self.cancel()

    def text(self) -> str:
        """Run to the end and return the whole text.

        Raises:
            Exception: whatever made the request fail.
        """
        pieces = []
        for event in self:
            if isinstance(event, Error):
                raise event.exception
            if isinstance(event, TextDelta):
                pieces.append(event.text)
        return "".join(pieces)


@dataclass(eq=False)
class Running:
    """One request in the making; the engine's own.

    Attributes:
        identity: Of every position in the cache and of the next one (see `Prompt.identity`).
        next_row: The input of the next step, `[d]`; None while the prompt is being computed.
        boundary: Whether the state behind that row is to be kept.
        features: Encoder outputs by index of the prompt's slot.
        cached: Prompt positions whose state was already there.
        encoded: Parts that an encoder really ran on.
        admitted: Whether prefix and features have been looked up.
    """

    request: Request
    handle: Handle
    head: StepHead[Any]
    state: HeadState
    cache: SequenceCache
    identity: list[int]
    next_row: Tensor | None = None
    boundary: bool = False
    features: dict[int, Tensor] = field(default_factory=dict)
    cached: int = 0
    encoded: int = 0
    admitted: bool = False
    prepared_at: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_at: float = 0.0

    @property
    def prefilling(self) -> bool:
        """Whether prompt positions are left to compute."""
        return self.next_row is None

    @property
    def keeps(self) -> bool:
        """Whether states of the prompt are to be found again."""
        return self.request.reuse

    @property
    def left(self) -> int:
        """Prompt positions left to compute."""
        request = self.request
        # of a prompt kept whole the last hidden state, which generates, would be missing
        return len(request.prompt) - request.prefill_only - self.cache.length

    def marks(self, n: int) -> list[int]:
        """Of the next `n` positions those, from 1 on, at which an attachment ends; not the last."""
        ends = (slot.end - self.cache.length for slot in self.request.prompt.slots)
        return [end for end in ends if 0 < end < n]

    @property
    def at_boundary(self) -> bool:
        """Whether an attachment ends here."""
        return any(slot.end == self.cache.length for slot in self.request.prompt.slots)

    def report(self, reason: FinishReason) -> Done:
        """The last event, with counts and times up to now."""
        now, first, request = time.perf_counter(), self.first_token_at, self.request
        usage = Usage(
            prompt_tokens=len(request.prompt),
            attachment_tokens=request.prompt.n_attachment_positions,
            cached_tokens=self.cached,
            completion_tokens=self.state.n_generated,
            encoded_parts=self.encoded,
            audio_frames=self.state.n_frames,
        )
        timings = Timings(
            prepare=(self.prepared_at or now) - request.began,
            encode=self.encode_seconds,
            prefill=self.prefill_seconds,
            first_token=first - request.began if first else 0.0,
            decode=now - first if first else 0.0,
        )
        return Done(reason, usage, timings)
