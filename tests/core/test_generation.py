"""Heads that come with requests: batched by head, kept at their boundaries, prefilled ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lfm2_mm.chat import Prompt
from lfm2_mm.errors import Lfm2Error
from lfm2_mm.events import AudioFrame, Done, Error, Event, TextDelta
from lfm2_mm.heads import StepHead, StepResult
from lfm2_mm.model import Model
from lfm2_mm.request import Handle, Request
from tests import oracle
from tests.oracle import endless, ours

FRAME = 100  # the identity of frame i is -FRAME - i


@dataclass
class State:
    """Counts."""

    room: int
    n_generated: int = 0
    rows: list[Tensor] = field(default_factory=list)

    @property
    def n_frames(self) -> int:
        """Every second step makes a frame."""
        return self.n_generated // 2


def beat(n: int) -> Tensor:
    """What step `n` feeds back."""
    return (torch.arange(64) * n).sin() * 0.3


class Drum:
    """A token, a frame, a token, …; a boundary behind every second frame."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.breaks_at = breaks_at

    def step(self, hidden: Tensor, states: Sequence[State]) -> list[StepResult]:
        """See `StepHead`."""
        self.batches.append(len(states))
        if self.breaks_at is not None and len(self.batches) > self.breaks_at:
            raise RuntimeError("the skin is torn")
        return [self._one(row, state) for row, state in zip(hidden, states, strict=True)]

    def _one(self, row: Tensor, state: State) -> StepResult:
        state.rows.append(row.clone())
        state.n_generated += 1
        n = state.n_generated
        event: TextDelta | AudioFrame = (
            AudioFrame(torch.tensor([n])) if n % 2 == 0 else TextDelta(f"{n} ", (n,))
        )
        if n == state.room:
            return StepResult([event], None, "length")
        identity = n if n % 2 else -FRAME - n
        return StepResult([event], beat(n), identity=identity, boundary=n % 4 == 0)


@dataclass(frozen=True)
class Drumming:
    """A `Generation`."""

    head: Drum
    states: list[State] = field(default_factory=list)

    def start(self, prompt: Prompt, room: int) -> State:
        """See `Generation`."""
        self.states.append(State(room))
        return self.states[-1]


@pytest.fixture
def model() -> Model:
    """Dense, never ended by a token, with an engine of its own."""
    return endless(ours("dense"))


def drum(model: Model, prompt: Prompt, how: Drumming, n: int = 8, *, reuse: bool = True) -> Handle:
    return model.engine.submit(Request(prompt=prompt, generation=how, max_tokens=n, reuse=reuse))


def raw(n: int, seed: int = 0) -> Prompt:
    return Prompt.from_ids(oracle.ids(n, seed=seed))


def end(events: Sequence[Event]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def continued(prompt: Prompt, n: int, more: int = 3) -> Prompt:
    """The prompt with `n` steps of a drum behind it, and something else."""
    said = [i if i % 2 else -FRAME - i for i in range(1, n + 1)]
    tail = oracle.ids(more, seed=9)
    ids = torch.cat([prompt.ids, torch.zeros(n, dtype=torch.int64), tail])
    return Prompt(ids=ids, identity=torch.cat([prompt.identity, torch.tensor(said), tail]))


def test_a_head_of_its_own_makes_the_events(model: Model) -> None:
    how: Drumming = Drumming(Drum())
    made: StepHead[State] = how.head
    assert made is how.head
    events = list(drum(model, raw(9), how, n=5))
    text = [event.text for event in events if isinstance(event, TextDelta)]
    frames = [int(event.codes) for event in events if isinstance(event, AudioFrame)]
    assert (text, frames) == (["1 ", "3 ", "5 "], [2, 4])
    done = end(events)
    assert done.finish_reason == "length"
    assert (done.usage.completion_tokens, done.usage.audio_frames) == (5, 2)
    assert done.to_dict()["usage"]["audio_frames"] == 2


def test_room_is_what_the_context_leaves(model: Model) -> None:
    how = Drumming(Drum())
    model.engine.submit(Request(prompt=raw(250), generation=how, max_tokens=9999)).cancel()
    assert how.states[0].room == model.backbone.config.max_positions - 250


def test_heads_share_steps_and_each_request_gets_what_it_gets_alone(model: Model) -> None:
    prompts = [raw(5 + i, seed=i) for i in range(4)]
    alone_text = model.engine.submit(Request(prompt=prompts[0], max_tokens=9, reuse=False)).text()
    alone = []
    for prompt in prompts[1:]:
        how = Drumming(Drum())
        list(drum(model, prompt, how, reuse=False))
        alone.append(torch.stack(how.states[0].rows))
    first, second = Drumming(Drum()), Drumming(Drum())
    text = model.engine.submit(Request(prompt=prompts[0], max_tokens=9, reuse=False))
    handles = [
        drum(model, prompt, how, reuse=False)
        for prompt, how in zip(prompts[1:], (first, second, first), strict=True)
    ]
    model.engine.run_until_idle()
    assert text.text() == alone_text
    assert [end(list(handle)).usage.completion_tokens for handle in handles] == [8, 8, 8]
    states = [first.states[0], second.states[0], first.states[1]]
    for state, wanted in zip(states, alone, strict=True):
        torch.testing.assert_close(torch.stack(state.rows), wanted, atol=oracle.CLOSE, rtol=0)
    assert first.head.batches == [2] * 8
    assert second.head.batches == [1] * 8


def test_a_head_that_fails_takes_its_own_requests_only(model: Model) -> None:
    wanted = model.engine.submit(Request(prompt=raw(6), max_tokens=6)).text()
    torn, sound = Drumming(Drum(breaks_at=2)), Drumming(Drum())
    text = model.engine.submit(Request(prompt=raw(6), max_tokens=6))
    bad, good = drum(model, raw(7), torn), drum(model, raw(8), sound)
    model.engine.run_until_idle()
    events = list(bad)
    assert isinstance(events[-1], Error)
    assert str(events[-1].exception) == "the skin is torn"
    assert text.text() == wanted
    assert end(list(good)).usage.completion_tokens == 8


# --- boundaries


def test_the_state_at_a_boundary_is_found_again(model: Model) -> None:
    prompt = raw(9)
    list(drum(model, prompt, Drumming(Drum()), n=11))  # boundaries behind 4 and 8, the end at 10
    for n, found in ((4, 4), (5, 4), (7, 4), (8, 8), (9, 8), (10, 10)):
        how = Drumming(Drum())
        done = end(list(drum(model, continued(prompt, n), how, n=1)))
        assert done.usage.cached_tokens == 9 + found, n


def test_the_state_at_a_boundary_is_that_of_the_sequence(model: Model) -> None:
    prompt = raw(9)
    list(drum(model, prompt, Drumming(Drum()), n=12))
    fed = [beat(n) for n in range(1, 5)]
    snapshot = model.engine.prefixes.find(continued(prompt, 4).identity)
    assert snapshot is not None and snapshot.length == 13
    from lfm2_mm.cache import SequenceCache
    from lfm2_mm.mixing import Ragged

    cold = SequenceCache(model.backbone.config)
    with torch.inference_mode():
        rows = torch.cat([model.backbone.embed(prompt.ids), torch.stack(fed)])
        mixing = Ragged([(cold, len(rows))])
        model.backbone(rows, mixing)
        mixing.commit()
        tail = model.backbone.embed(oracle.ids(3))
        warm = SequenceCache(model.backbone.config)
        warm.restore(snapshot)
        outs = []
        for cache in (cold, warm):
            mixing = Ragged([(cache, 3)])
            outs.append(model.backbone(tail, mixing))
    torch.testing.assert_close(outs[1], outs[0], atol=oracle.CLOSE, rtol=0)


def test_boundaries_outlive_a_cancelled_answer_and_reuse_false_keeps_none(model: Model) -> None:
    prompt = raw(9)
    handle = drum(model, prompt, Drumming(Drum()), n=20)
    events = iter(handle)
    for _ in range(6):
        next(events)
    handle.cancel()
    assert end(list(events)).finish_reason == "cancelled"
    assert len(model.engine.prefixes) == 1
    assert end(list(drum(model, continued(prompt, 4), Drumming(Drum())))).usage.cached_tokens == 13
    model.engine.prefixes.clear()
    list(drum(model, prompt, Drumming(Drum()), n=20, reuse=False))
    assert len(model.engine.prefixes) == 0


# --- prefill only


def test_what_was_prefilled_is_not_computed_again(model: Model) -> None:
    prompt = raw(30)
    wanted = model.engine.submit(Request(prompt=prompt, max_tokens=6, reuse=False)).text()
    events = list(model.engine.submit(Request(prompt=prompt, prefill_only=True)))
    done = end(events)
    assert len(events) == 1
    assert done.finish_reason == "stop"
    assert (done.usage.completion_tokens, done.timings.first_token) == (0, 0.0)
    assert done.timings.prefill > 0
    handle = model.engine.submit(Request(prompt=prompt, max_tokens=6))
    assert handle.text() == wanted
    assert handle.done is not None and handle.done.usage.cached_tokens == 29
    again = end(list(model.engine.submit(Request(prompt=prompt, prefill_only=True))))
    assert again.usage.cached_tokens == 29  # nothing was left to do
    longer = Prompt.from_ids(torch.cat([prompt.ids, oracle.ids(5, seed=3)]))
    model.engine.prefixes.clear()
    list(model.engine.submit(Request(prompt=prompt, prefill_only=True)))
    handle = model.engine.submit(Request(prompt=longer, max_tokens=2))
    handle.text()
    assert handle.done is not None and handle.done.usage.cached_tokens == 29


def test_a_prefill_runs_in_chunks_beside_others_and_can_be_cancelled(model: Model) -> None:
    model.engine.prefill_chunk = 8
    wanted = model.engine.submit(Request(prompt=raw(12), max_tokens=9, reuse=False)).text()
    text = model.engine.submit(Request(prompt=raw(12), max_tokens=9, reuse=False))
    ahead = model.engine.submit(Request(prompt=raw(60, seed=5), prefill_only=True))
    dropped = model.engine.submit(Request(prompt=raw(60, seed=6), prefill_only=True))
    model.engine.step()
    dropped.cancel()
    assert end(list(dropped)).finish_reason == "cancelled"
    assert text.text() == wanted
    assert end(list(ahead)).finish_reason == "stop"
    assert len(model.engine.prefixes) == 1


def test_one_position_leaves_nothing_to_prefill(model: Model) -> None:
    done = end(list(model.engine.submit(Request(prompt=raw(1), prefill_only=True))))
    assert (done.finish_reason, len(model.engine.prefixes)) == ("stop", 0)


def test_an_interrupted_step_still_ends_everybody(model: Model) -> None:
    class Interrupted(Drum):
        def step(self, hidden: Tensor, states: Sequence[State]) -> list[StepResult]:
            raise KeyboardInterrupt

    handle = drum(model, raw(5), Drumming(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        model.engine.step()
    (event,) = handle.drain()
    assert isinstance(event, Error) and isinstance(event.exception, Lfm2Error)
