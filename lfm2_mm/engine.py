"""The engine: the only place that runs steps.

`submit` takes a request and gives a handle; whoever reads a handle drives the engine. Requests
join and leave between steps, and one step runs the next rows of all of them packed behind each
other: prompts in chunks, running answers one row each. Chunks end where attachments end, and
those boundaries are kept, so that the next question about the same picture starts behind it. The
engine knows prompts, caches and heads; it knows no chat, no modality and no network.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import SequenceCache
from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import Constraint, compile_constraint
from lfm2_mm.errors import ContextOverflow
from lfm2_mm.events import Done, Error, Event, FinishReason, TextDelta, Timings, Usage
from lfm2_mm.features import FeatureCache
from lfm2_mm.heads import TextHead, TextState
from lfm2_mm.mixing import Ragged, Whole
from lfm2_mm.prefix import PrefixCache
from lfm2_mm.sampling import Sampler, Sampling
from lfm2_mm.text_stream import TextStream
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["Engine", "Handle", "Request"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        prompt: Token ids and the content parts between them.
        sampling: How tokens are chosen.
        max_tokens: Tokens to generate at most; cut to what the context leaves.
        stop: Strings that end the answer and are not part of it.
        constraint: A JSON schema or regex the answer must follow.
        reuse: Whether prefixes computed earlier may be used, and this one's kept.
        began: `time.perf_counter()` of the caller's start; first-token time counts from there.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    reuse: bool = True
    began: float = field(default_factory=time.perf_counter)


class Handle:
    """One running request: iterate it for events, the last of which is `Done` or `Error`."""

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        self._engine, self.prompt = engine, prompt
        self._events: deque[Event] = deque()
        self._cancelled = False
        self.done: Done | None = None

    def cancel(self) -> None:
        """Ask for the end; the next event is `Done` with reason "cancelled"."""
        self._cancelled = True

    def __iter__(self) -> Iterator[Event]:
        ended = False
        try:
            while not ended:
                while not self._events:
                    self._engine.step()
                event = self._events.popleft()
                ended = isinstance(event, Done | Error)
                yield event
        finally:
            if not ended:
                self.cancel()
                self._engine.step()

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


@dataclass
class _Sequence:
    """One request in the making."""

    request: Request
    handle: Handle
    state: TextState
    cache: SequenceCache
    identity: list[int]
    next_row: Tensor | None = None
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
        return self.next_row is None


class Engine:
    """Runs requests over one backbone.

    Args:
        backbone: In evaluation mode.
        head: Turns hidden states into text.
        tokenizer: Used only to turn tokens back into text and to compile constraints.
        features: Shared encoder outputs.
        prefixes: Shared boundaries of earlier prompts.
        prefill_chunk: Most prompt rows in one step.
        max_running: Most sequences in one step; further requests wait.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: TextHead,
        tokenizer: Tokenizer,
        *,
        features: FeatureCache | None = None,
        prefixes: PrefixCache | None = None,
        prefill_chunk: int = 2048,
        max_running: int = 32,
    ) -> None:
        self.backbone, self.head, self.tokenizer = backbone, head, tokenizer
        self.features = features if features is not None else FeatureCache()
        self.prefixes = prefixes if prefixes is not None else PrefixCache()
        self.prefill_chunk, self.max_running = prefill_chunk, max_running
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._lock = threading.RLock()

    @property
    def _weight(self) -> Tensor:
        return self.backbone.embed_tokens.weight

    def submit(self, request: Request) -> Handle:
        """Queue a request. Nothing runs before a handle is read.

        Raises:
            ContextOverflow: if the prompt leaves no room for a token.
            ConstraintError: if the constraint cannot be compiled.
        """
        n, limit = len(request.prompt), self.backbone.config.max_positions
        if n >= limit:
            raise ContextOverflow(
                f"the prompt has {n} tokens but the model's context holds {limit}; shorten it or "
                "lower the image-token budget"
            )
        grammar = None
        if request.constraint is not None:
            grammar = compile_constraint(
                request.constraint, self.tokenizer, vocab_size=self.head.weight.shape[0]
            )
        ids = request.prompt.ids.tolist()
        state = TextState(
            sampler=Sampler(request.sampling, ids),
            stream=TextStream(self.tokenizer.decode_output, stop=request.stop),
            max_tokens=max(1, min(request.max_tokens, limit - n)),
            grammar=grammar,
        )
        handle = Handle(self, request.prompt)
        weight = self._weight
        cache = SequenceCache(
            self.backbone.config,
            capacity=n + min(state.max_tokens, 256),
            dtype=weight.dtype,
            device=weight.device,
        )
        identity = request.prompt.identity.tolist()
        with self._lock:
            self._waiting.append(_Sequence(request, handle, state, cache, identity))
        return handle

    def step(self) -> bool:
        """Run one step for whoever is waiting or running; False if there was nothing to do."""
        with self._lock, torch.inference_mode():
            self._drop_cancelled()
            while self._waiting and len(self._running) < self.max_running:
                self._running.append(self._waiting.popleft())
            for sequence in list(self._running):
                if not sequence.admitted:
                    self._guard([sequence], lambda s=sequence: self._admit(s))
            if not self._running:
                return False
            plan = self._plan()
            self._guard([s for s, _ in plan], lambda: self._run(plan))
            return True

    def run_until_idle(self) -> None:
        """Step until every submitted request has ended."""
        while self.step():
            pass

    def logits(self, prompt: Prompt) -> Float[Tensor, "n v"]:
        """Raw scores after every position of a prompt, fp32, computed whole, without a cache."""
        with self._lock, torch.inference_mode():
            parts = [slot.prepared for slot in prompt.slots]
            features = dict(enumerate(self._encode(prompt, range(len(parts)))))
            x = self._embed(prompt, features, 0, len(prompt))[None]
            hidden = self.backbone(x, Whole(1, len(prompt), device=x.device))
            return self.head.logits(hidden[0]).float()

    # -- one step, in the order it happens ---------------------------------------------------

    def _drop_cancelled(self) -> None:
        for queue in (self._running, self._waiting):
            for sequence in [s for s in queue if s.handle._cancelled]:
                queue.remove(sequence)
                self._finish(sequence, "cancelled")

    def _admit(self, sequence: _Sequence) -> None:
        """Find a computed prefix, then encode the attachments behind it."""
        sequence.prepared_at = time.perf_counter()
        prompt = sequence.request.prompt
        if sequence.request.reuse:
            snapshot = self.prefixes.find(prompt.identity)
            if snapshot is not None:
                sequence.cache.restore(snapshot)
                sequence.cached = snapshot.length
        needed = [i for i, slot in enumerate(prompt.slots) if slot.end > sequence.cached]
        before = self.features.encoded
        rows = self._encode(prompt, needed)
        sequence.features = dict(zip(needed, rows, strict=True))
        sequence.encoded = self.features.encoded - before
        sequence.encode_seconds = time.perf_counter() - sequence.prepared_at
        sequence.admitted = True

    def _encode(self, prompt: Prompt, which: Sequence[int]) -> list[Tensor]:
        """Features of these slots; neighbours of one encoder go in one batch."""
        out: list[Tensor] = []
        for _, run in groupby(which, key=lambda i: id(prompt.slots[i].encoder)):
            slots = [prompt.slots[i] for i in run]
            out += self.features.get(slots[0].encoder, [slot.prepared for slot in slots])
        return out

    def _plan(self) -> list[tuple[_Sequence, int]]:
        """Which sequences run, and how many rows each: decoding first, then prompts in turn."""
        plan, budget = [(s, 1) for s in self._running if not s.prefilling], self.prefill_chunk
        for sequence in self._running:
            if sequence.prefilling and budget > 0:
                n = min(self._to_boundary(sequence), budget)
                plan.append((sequence, n))
                budget -= n
        return plan

    @staticmethod
    def _to_boundary(sequence: _Sequence) -> int:
        """Prompt rows left before the next attachment's end or the prompt's."""
        done, prompt = sequence.cache.length, sequence.request.prompt
        ends = [slot.end for slot in prompt.slots if slot.end > done]
        return min([*ends, len(prompt)]) - done

    def _run(self, plan: list[tuple[_Sequence, int]]) -> None:
        began = time.perf_counter()
        rows = []
        for sequence, n in plan:
            if sequence.next_row is not None:
                rows.append(sequence.next_row[None])
            else:
                start = sequence.cache.length
                prompt = sequence.request.prompt
                rows.append(self._embed(prompt, sequence.features, start, start + n))
        x = rows[0] if len(rows) == 1 else torch.cat(rows)
        mixing = Ragged([(sequence.cache, n) for sequence, n in plan])
        hidden = self.backbone(x, mixing)
        mixing.commit()
        ready, last, end = [], [], -1
        for sequence, n in plan:
            end += n
            if sequence.prefilling:
                self._keep_boundary(sequence)
                if sequence.cache.length < len(sequence.request.prompt):
                    continue
            ready.append(sequence)
            last.append(end)
        if ready:
            results = self.head.step(hidden[last], [s.state for s in ready])
        spent = time.perf_counter() - began
        for sequence, _ in plan:
            if sequence.prefilling:
                sequence.prefill_seconds += spent
        for sequence, result in zip(ready, results if ready else (), strict=True):
            if not sequence.first_token_at:
                sequence.first_token_at = time.perf_counter()
            sequence.handle._events.extend(result.events)
            sequence.next_row = result.embedding
            if result.finish is not None:
                self._running.remove(sequence)
                self._finish(sequence, result.finish)
            else:
                sequence.identity.append(result.identity)

    def _embed(
        self, prompt: Prompt, features: dict[int, Tensor], start: int, end: int
    ) -> Float[Tensor, "n d"]:
        """Input rows of some positions of a prompt: token embeddings, or features at slots."""
        weight = self._weight
        x = self.backbone.embed(prompt.ids[start:end].to(weight.device))
        for i, rows in features.items():
            positions = prompt.slots[i].positions
            inside = (positions >= start) & (positions < end)
            if inside.any():
                where = (positions[inside] - start).to(x.device)
                x[where] = rows[inside.to(rows.device)].to(x)
        return x

    def _keep_boundary(self, sequence: _Sequence) -> None:
        """Remember the state where an attachment ends."""
        request, done = sequence.request, sequence.cache.length
        if request.reuse and any(slot.end == done for slot in request.prompt.slots):
            self.prefixes.keep(request.prompt.identity, sequence.cache.snapshot())

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        now = time.perf_counter()
        request, state = sequence.request, sequence.state
        if request.reuse and state.n_generated and reason != "cancelled":
            identity = torch.tensor(sequence.identity[: sequence.cache.length])
            self.prefixes.keep(identity, sequence.cache.snapshot())
        first = sequence.first_token_at
        prepared = sequence.prepared_at or now
        usage = Usage(
            prompt_tokens=len(request.prompt),
            attachment_tokens=request.prompt.n_attachment_positions,
            cached_tokens=sequence.cached,
            completion_tokens=state.n_generated,
            encoded_parts=sequence.encoded,
        )
        timings = Timings(
            prepare=prepared - request.began,
            encode=sequence.encode_seconds,
            prefill=sequence.prefill_seconds,
            first_token=first - request.began if first else 0.0,
            decode=now - first if first else 0.0,
        )
        done = Done(reason, usage, timings)
        sequence.handle.done = done
        sequence.handle._events.append(done)

    def _guard(self, sequences: list[_Sequence], work: object) -> None:
        """Run work for some sequences; if it fails they end with an error, others go on."""
        assert callable(work)
        try:
            work()
        except Exception as problem:
            for sequence in sequences:
                if sequence in self._running:
                    self._running.remove(sequence)
                    sequence.handle._events.append(Error(problem))
