"""The engine: the only place that runs steps.

`submit` takes a request and gives a handle; whoever reads a handle drives the engine. Requests
join and leave between steps, and one step runs the next rows of all of them packed behind each
other: prompts in chunks, running answers one row each. The state where an attachment ends is kept
on the way, so that the next question about the same picture starts behind it. The engine knows
prompts, caches and heads; it knows no chat, no modality and no network.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import KVCacheDtype, SequenceCache, Snapshot
from lfm2_mm.chat import Prompt
from lfm2_mm.constrain import compile_constraint
from lfm2_mm.errors import ContextOverflow, InputError, Lfm2Error
from lfm2_mm.events import Error, FinishReason
from lfm2_mm.features import FeatureCache
from lfm2_mm.heads import HeadState, StepResult, TextHead, TextState
from lfm2_mm.mixing import Ragged, Whole
from lfm2_mm.prefix import PrefixCache
from lfm2_mm.request import Handle, Request, Running
from lfm2_mm.sampling import Sampler
from lfm2_mm.text_stream import TextStream
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["Engine"]

_T = TypeVar("_T")


class Engine:
    """Runs requests over one backbone.

    Args:
        backbone: In evaluation mode.
        head: Turns hidden states into text; other heads come with their requests.
        tokenizer: Used only to turn tokens back into text and to compile constraints.
        features: Shared encoder outputs.
        prefixes: Shared boundaries of earlier prompts.
        prefill_chunk: Most prompt rows in one step.
        max_running: Most sequences in one step; further requests wait.
        kv_cache_dtype: How keys and values of requests to come are kept (see `SequenceCache`).
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
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        self.backbone, self.head, self.tokenizer = backbone, head, tokenizer
        self.features = features if features is not None else FeatureCache()
        self.prefixes = prefixes if prefixes is not None else PrefixCache()
        self.prefill_chunk, self.max_running = prefill_chunk, max_running
        self.kv_cache_dtype: KVCacheDtype = kv_cache_dtype
        self._running: list[Running] = []
        self._waiting: deque[Running] = deque()
        self._packing = backbone.pack()
        self._lock = threading.Lock()

    @property
    def _weight(self) -> Tensor:
        return self.backbone.embed_tokens.weight

    def submit(self, request: Request) -> Handle:
        """Queue a request. Nothing runs before a handle is read.

        Raises:
            ContextOverflow: if the prompt leaves no room for a token.
            ConstraintError: if the constraint cannot be compiled.
            InputError: if the prompt is empty or holds unknown ids, or no token may be generated.
        """
        n, limit = len(request.prompt), self.backbone.config.max_positions
        self._check(request.prompt, most=limit - 1)
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        room, generation = min(request.max_tokens, limit - n), request.generation
        state: HeadState
        if generation is None:
            state = self._text_state(request, room)
        else:
            state = generation.start(request.prompt, room)
        weight = self._weight
        cache = SequenceCache(
            self.backbone.config,
            capacity=n + min(room, 256),
            dtype=weight.dtype,
            device=weight.device,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        sequence = Running(
            request,
            Handle(self, request.prompt),
            self.head if generation is None else generation.head,
            state,
            cache,
            request.prompt.identity.tolist(),
        )
        with self._lock:
            self._waiting.append(sequence)
        return sequence.handle

    def _text_state(self, request: Request, room: int) -> TextState:
        grammar = None
        if request.constraint is not None:
            grammar = compile_constraint(
                request.constraint, self.tokenizer, vocab_size=self.head.weight.shape[0]
            )
        return TextState(
            sampler=Sampler(request.sampling, request.prompt.ids.tolist()),
            stream=TextStream(self.tokenizer.decode_output, stop=request.stop),
            max_tokens=room,
            grammar=grammar,
            logprobs=request.logprobs,
        )

    def step(self) -> bool:
        """Run one step for whoever is waiting or running; False if there was nothing to do."""
        with self._lock, torch.inference_mode():
            self._drop_cancelled()
            while self._waiting and len(self._running) < self.max_running:
                self._running.append(self._waiting.popleft())
            for sequence in list(self._running):
                if not sequence.admitted:
                    self._guard([sequence], self._admit, sequence)
            if not self._running:
                return False
            plan = self._plan()
            if not any(sequence.prefilling for sequence, _ in plan):
                # a block a token: costs no first answer anything, and is soon paid back
                next(self._packing, None)
            self._guard([sequence for sequence, _ in plan], self._run, plan)
            return True

    def sweep(self) -> None:
        """Let go of cancelled requests; if a step is running, it or the next one does so."""
        # never waits: a handle may be dropped by the garbage collector in the midst of a step
        if self._lock.acquire(blocking=False):
            try:
                self._drop_cancelled()
            finally:
                self._lock.release()

    def run_until_idle(self) -> None:
        """Step until every submitted request has ended."""
        while self.step():
            pass

    def logits(self, prompt: Prompt) -> Float[Tensor, "n v"]:
        """Raw scores after every position of a prompt, fp32, computed whole, without a cache.

        Raises:
            ContextOverflow: if the prompt is longer than the context.
            InputError: if the prompt is empty or holds unknown ids.
        """
        self._check(prompt, most=self.backbone.config.max_positions)
        with self._lock, torch.inference_mode():
            parts = [slot.prepared for slot in prompt.slots]
            features = dict(enumerate(self._encode(prompt, range(len(parts)))))
            x = self._embed(prompt, features, 0, len(prompt))[None]
            hidden = self.backbone(x, Whole(1, len(prompt), device=x.device))
            return self.head.logits(hidden[0]).float()

    def _check(self, prompt: Prompt, most: int) -> None:
        n, rows = len(prompt), self._weight.shape[0]
        if n == 0:
            raise InputError("the prompt is empty; give at least one token")
        if n > most:
            raise ContextOverflow(
                f"the prompt has {n} tokens but the model's context holds "
                f"{self.backbone.config.max_positions}; shorten it or lower the image-token budget"
            )
        low, high = (int(bound) for bound in prompt.ids.aminmax())
        if low < 0 or high >= rows:
            raise InputError(
                f"the prompt holds the token id {low if low < 0 else high}, but the model's ids go "
                f"from 0 to {rows - 1}; use the tokenizer that belongs to the model"
            )

    # -- one step, in the order it happens ---------------------------------------------------

    def _drop_cancelled(self) -> None:
        for queue in (self._running, self._waiting):
            for sequence in [s for s in queue if s.handle.cancelled]:
                queue.remove(sequence)
                self._finish(sequence, "cancelled")

    def _admit(self, sequence: Running) -> None:
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
        if not sequence.left:  # all that was to be prefilled is there
            self._running.remove(sequence)
            self._finish(sequence, "stop")

    def _encode(self, prompt: Prompt, which: Sequence[int]) -> list[Tensor]:
        """Features of these slots; neighbours of one encoder go in one batch."""
        out: list[Tensor] = []
        for _, run in groupby(which, key=lambda i: id(prompt.slots[i].encoder)):
            slots = [prompt.slots[i] for i in run]
            out += self.features.get(slots[0].encoder, [slot.prepared for slot in slots])
        return out

    def _plan(self) -> list[tuple[Running, int]]:
        """Which sequences run, and how many rows each: decoding first, then prompts in turn."""
        plan, budget = [(s, 1) for s in self._running if not s.prefilling], self.prefill_chunk
        for sequence in self._running:
            if sequence.prefilling and budget > 0:
                n = min(sequence.left, budget)
                plan.append((sequence, n))
                budget -= n
        return plan

    def _run(self, plan: list[tuple[Running, int]]) -> None:
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
        mixing = Ragged(
            [(sequence.cache, n) for sequence, n in plan],
            [sequence.marks(n) if sequence.keeps else [] for sequence, n in plan],
        )
        hidden = self.backbone(x, mixing)
        mixing.commit()
        ready, last, end = [], [], -1
        prefilled: list[Running] = []
        for i, (sequence, n) in enumerate(plan):
            end += n
            if sequence.prefilling:
                self._keep_boundaries(sequence, mixing.boundaries(i))
                if sequence.left:
                    continue
                if sequence.request.prefill_only:
                    prefilled.append(sequence)
                    continue
            elif sequence.boundary and sequence.keeps:
                self._keep(sequence)
            ready.append(sequence)
            last.append(end)
        results = _steps(hidden[last], ready) if ready else []
        spent = time.perf_counter() - began
        for sequence, _ in plan:
            if sequence.prefilling:
                sequence.prefill_seconds += spent
        for sequence in prefilled:
            self._running.remove(sequence)
            self._finish(sequence, "stop")
        for sequence, result in zip(ready, results, strict=True):
            if not sequence.first_token_at:
                sequence.first_token_at = time.perf_counter()
            sequence.handle.put(*result.events)
            sequence.next_row, sequence.boundary = result.embedding, result.boundary
            if result.error is not None:
                self._fail(sequence, result.error)
            elif result.finish is not None:
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

    def _keep_boundaries(self, sequence: Running, inside: list[Snapshot]) -> None:
        """Remember the states where attachments ended, within the step or at its end."""
        if sequence.keeps and sequence.at_boundary:
            inside = [*inside, sequence.cache.snapshot()]
        for snapshot in inside:
            self.prefixes.keep(sequence.request.prompt.identity, snapshot)

    def _finish(self, sequence: Running, reason: FinishReason) -> None:
        worth = sequence.state.n_generated or sequence.request.prefill_only
        if sequence.keeps and worth and reason != "cancelled":
            self._keep(sequence)
        sequence.handle.put(sequence.report(reason))

    def _keep(self, sequence: Running) -> None:
        """Remember the state where a sequence stands."""
        cache = sequence.cache
        before = torch.tensor(sequence.identity[: cache.length], dtype=torch.int64)
        self.prefixes.keep(before, cache.snapshot())

    def _fail(self, sequence: Running, problem: Exception) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        sequence.handle.put(Error(problem))

    def _guard(self, sequences: list[Running], work: Callable[[_T], None], what: _T) -> None:
        """Run work for some sequences; if it fails they end with an error, others go on."""
        try:
            work(what)
        except BaseException as problem:
            failed = problem if isinstance(problem, Exception) else _interrupted(problem)
            for sequence in sequences:
                if not sequence.handle.ended:
                    self._fail(sequence, failed)
            if failed is not problem:
                raise


def _steps(hidden: Float[Tensor, "b d"], sequences: Sequence[Running]) -> list[StepResult]:
    """One step of every sequence, those of one head together; a head's failure is theirs alone."""
    results: dict[int, StepResult] = {}
    for head in {id(s.head): s.head for s in sequences}.values():
        which = [i for i, s in enumerate(sequences) if s.head is head]
        rows = hidden if len(which) == len(sequences) else hidden[which]
        try:
            made = head.step(rows, [sequences[i].state for i in which])
        except Exception as problem:
            made = [StepResult([], error=problem) for _ in which]
        results |= dict(zip(which, made, strict=True))
    return [results[i] for i in range(len(sequences))]


def _interrupted(problem: BaseException) -> Lfm2Error:
    """What requests get whose step was broken off, by Ctrl-C say: their state is not sound."""
    return Lfm2Error(f"the step was interrupted ({type(problem).__name__}); ask again")
