"""The engine: the tokens of transformers, many requests at once, and every way one can end."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lfm2_mm.cache import KVCacheDtype
from lfm2_mm.chat import Prompt, Slot
from lfm2_mm.constrain import Constraint
from lfm2_mm.errors import ConstraintError, ContextOverflow, InputError, Lfm2Error
from lfm2_mm.events import Done, Error, TextDelta
from lfm2_mm.frontends import Prepared
from lfm2_mm.heads import TextState
from lfm2_mm.model import Model
from lfm2_mm.request import Handle, Request
from lfm2_mm.sampling import Sampling
from tests import oracle
from tests.oracle import Recorder, endless, ours


def raw(n: int, seed: int = 0) -> Prompt:
    return Prompt.from_ids(oracle.ids(n, seed=seed))


def submit(model: Model, prompt: Prompt, **options: Any) -> Handle:
    return model.engine.submit(Request(prompt=prompt, **options))


@pytest.fixture
def model() -> Model:
    """Dense, never ended by a token, with an engine of its own."""
    return endless(ours("dense"))


# --- the same as transformers


@pytest.mark.parametrize("name", oracle.TEXT_VARIANTS)
def test_64_greedy_tokens_equal_transformers(name: str) -> None:
    model, prompt = endless(ours(name)), raw(23, seed=1)
    model.engine.prefill_chunk = 9
    heard = Recorder(model)
    submit(model, prompt, max_tokens=64).text()
    tokens = heard.tokens()
    assert tokens == oracle.their_tokens(name, prompt)
    assert len(set(tokens)) > 5  # not one token over and over
    everything = torch.cat([prompt.ids, torch.tensor(tokens)])
    wanted = oracle.their_logits(name, Prompt.from_ids(everything))[22:-1]
    torch.testing.assert_close(heard.scores(), wanted, atol=oracle.CLOSE, rtol=0)


def test_repetition_penalty_counts_the_prompt_as_transformers_does(model: Model) -> None:
    prompt, penalty = raw(40, seed=2), Sampling(repetition_penalty=1.3)
    heard = Recorder(model)
    submit(model, prompt, max_tokens=32, sampling=penalty).text()
    wanted = oracle.their_tokens("dense", prompt, 32, repetition_penalty=1.3)
    assert heard.tokens() == wanted != oracle.their_tokens("dense", prompt, 32)


def test_an_end_token_ends(model: Model) -> None:
    prompt = raw(12, seed=3)
    heard = Recorder(model)
    submit(model, prompt, max_tokens=20, reuse=False).text()
    free = heard.tokens()
    end = free[6]
    model.head.eos_ids = frozenset({end})
    handle = submit(model, prompt, max_tokens=20)
    handle.text()
    assert heard.tokens(1) == free[: free.index(end) + 1]
    assert handle.done is not None
    assert handle.done.finish_reason == "stop"
    assert handle.done.usage.completion_tokens == free.index(end) + 1


# --- many at once


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_together_equals_alone_whatever_the_chunks(model: Model, kv: KVCacheDtype) -> None:
    model.engine.kv_cache_dtype = kv
    prompts = [raw(n, seed=n) for n in (3, 90, 17, 41, 1)]
    alone = [submit(model, prompt, max_tokens=12, reuse=False).text() for prompt in prompts]
    for chunk, running in ((2048, 32), (16, 32), (7, 2), (1, 3)):
        model.engine.prefill_chunk, model.engine.max_running = chunk, running
        handles = [submit(model, prompt, max_tokens=12, reuse=False) for prompt in prompts]
        model.engine.run_until_idle()
        assert [handle.text() for handle in handles] == alone


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_equal_prompts_with_a_shared_prefix_do_not_meet(model: Model, kv: KVCacheDtype) -> None:
    model.engine.kv_cache_dtype = kv
    start = raw(30, seed=4)
    submit(model, start, max_tokens=5).text()  # leaves a boundary behind
    tails = [torch.tensor([50 + i, 60 + i]) for i in range(3)]
    known = torch.cat([start.ids, torch.tensor(heard_tokens(model, start))])
    prompts = [Prompt.from_ids(torch.cat([known, tail])) for tail in tails]
    alone = [submit(model, prompt, max_tokens=16, reuse=False) for prompt in prompts]
    cold = [handle.text() for handle in alone]
    handles = [submit(model, prompt, max_tokens=16) for prompt in prompts]
    model.engine.run_until_idle()
    assert [handle.text() for handle in handles] == cold
    assert [done(handle).usage.cached_tokens for handle in handles] == [34, 34, 34]


def heard_tokens(model: Model, prompt: Prompt) -> list[int]:
    heard = Recorder(model)
    submit(model, prompt, max_tokens=5, reuse=False).text()
    return heard.tokens()


def done(handle: Handle) -> Done:
    assert handle.done is not None
    return handle.done


def test_handles_may_be_read_in_any_order(model: Model) -> None:
    prompts = [raw(9, seed=i) for i in range(3)]
    alone = [submit(model, prompt, max_tokens=9, reuse=False).text() for prompt in prompts]
    handles = [submit(model, prompt, max_tokens=9, reuse=False) for prompt in prompts]
    readers = [iter(handles[i]) for i in (2, 0, 1)]
    found: list[list[str]] = [[], [], []]
    open_ones = [0, 1, 2]
    while open_ones:  # one event of each in turn
        for i in list(open_ones):
            event = next(readers[i])
            if isinstance(event, TextDelta):
                found[i].append(event.text)
            else:
                assert isinstance(event, Done)
                open_ones.remove(i)
    assert ["".join(pieces) for pieces in found] == [alone[2], alone[0], alone[1]]


def test_threads_may_each_read_a_handle(model: Model) -> None:
    prompts = [raw(5 + i, seed=i) for i in range(6)]
    alone = [submit(model, prompt, max_tokens=15, reuse=False).text() for prompt in prompts]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = submit(model, prompts[i], max_tokens=15, reuse=False).text()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[i] for i in range(6)] == alone


def test_a_late_request_joins_those_under_way(model: Model) -> None:
    first, second = raw(8, seed=1), raw(30, seed=2)
    alone = [submit(model, p, max_tokens=20, reuse=False).text() for p in (first, second)]
    reader = submit(model, first, max_tokens=20, reuse=False)
    events = iter(reader)
    pieces = [event.text for event in (next(events) for _ in range(5)) if event.text]  # type: ignore[union-attr]
    late = submit(model, second, max_tokens=20, reuse=False)
    assert late.text() == alone[1]
    pieces += [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(pieces) == alone[0]


# --- ends


def test_length_and_stop_strings(model: Model) -> None:
    letters: dict[str, Any] = {
        "max_tokens": 24,
        "constraint": Constraint.regex("[a-z]{30}"),
        "sampling": Sampling(temperature=1.0, seed=1),
    }
    handle = submit(model, raw(11), **letters)
    text = handle.text()
    assert len(text) == done(handle).usage.completion_tokens == 24
    assert done(handle).finish_reason == "length"
    stop = text[7:9]
    handle = submit(model, raw(11), stop=(stop, "never said"), **letters)
    assert handle.text() == text[: text.index(stop)]
    assert done(handle).finish_reason == "stop"
    assert done(handle).usage.completion_tokens == text.index(stop) + 2


def test_cancelling_in_the_midst(model: Model) -> None:
    handle = submit(model, raw(6), max_tokens=500)
    other = submit(model, raw(7), max_tokens=8)
    seen = 0
    for event in handle:
        seen += isinstance(event, TextDelta)
        if seen == 3:
            handle.cancel()
    assert isinstance(event, Done)
    assert event.finish_reason == "cancelled"
    assert 3 <= event.usage.completion_tokens < 10
    assert other.text() == submit(model, raw(7), max_tokens=8, reuse=False).text()


def test_cancelling_before_the_start(model: Model) -> None:
    handle = submit(model, raw(6))
    handle.cancel()
    assert handle.ended
    assert handle.text() == ""
    assert done(handle).usage.completion_tokens == 0
    assert done(handle).timings.first_token == 0.0


def test_leaving_the_loop_cancels(model: Model) -> None:
    handle = submit(model, raw(6), max_tokens=500)
    for event in handle:
        assert isinstance(event, TextDelta)
        break
    gc.collect()
    assert handle.cancelled
    assert done(handle).finish_reason == "cancelled"
    assert not model.engine.step()  # nobody is left


def test_an_iterator_dropped_in_the_midst_of_a_step_waits_for_its_end(model: Model) -> None:
    """The garbage collector may close one at any moment, also while a step runs."""
    doomed = submit(model, raw(6), max_tokens=500)
    reader: Any = iter(doomed)
    next(reader)
    other = submit(model, raw(9), max_tokens=6)
    forward = model.backbone.layers[3].register_forward_pre_hook(lambda *_: reader.close())
    text = other.text()
    forward.remove()
    assert text == submit(model, raw(9), max_tokens=6, reuse=False).text()
    assert done(doomed).finish_reason == "cancelled"


def test_a_handle_can_be_read_again(model: Model) -> None:
    handle = submit(model, raw(6), max_tokens=4)
    assert handle.text()
    assert list(handle) == []
    assert handle.text() == ""


def test_nothing_to_do(model: Model) -> None:
    assert not model.engine.step()
    model.engine.run_until_idle()


# --- refusals


def test_a_prompt_that_fills_the_context() -> None:
    model = ours("dense")
    says = "the prompt has 2048 tokens but the model's context holds 2048; shorten it or lower the"
    with pytest.raises(ContextOverflow, match=says):
        submit(model, raw(2048))
    with pytest.raises(ContextOverflow, match="has 2049 tokens"):
        model.engine.logits(raw(2049))


def test_the_context_cuts_the_answer(model: Model) -> None:
    handle = submit(model, raw(2044, seed=1), max_tokens=50)
    handle.text()
    assert done(handle).usage.completion_tokens == 4
    assert done(handle).finish_reason == "length"


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ([5, 512], {}, "token id 512, but the model's ids go from 0 to 511; use the tokenizer"),
        ([5, -3], {}, "token id -3, but"),
        ([5], {"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ],
)
def test_unusable_requests(ids: list[int], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        submit(ours("dense"), Prompt.from_ids(ids), **options)


def test_a_constraint_that_cannot_be_compiled(model: Model) -> None:
    with pytest.raises(ConstraintError):
        submit(model, raw(4), constraint=Constraint.regex("(unclosed"))
    assert not model.engine.step()


# --- one request's trouble is its own


class Encoder:
    """Embeds each part as constant rows; some parts break it."""

    types = frozenset({"thing"})
    placeholder = ""
    token_id = 3

    def __init__(self, width: int, rows: int = 4) -> None:
        self.width, self.rows = width, rows
        self.batches: list[list[str]] = []

    def accepts(self, source: str) -> bool:
        return False

    def prepare(self, part: Any) -> Prepared:
        return Prepared(text="", n_positions=4, tensors={}, key=part["key"])

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        self.batches.append([part.key for part in batch])
        if any(part.key == "broken" for part in batch):
            raise ValueError("this part cannot be encoded")
        return [torch.full((self.rows, self.width), len(part.key) / 10) for part in batch]


def with_part(encoder: Encoder, key: str, before: int = 3, after: int = 4) -> Prompt:
    ids = torch.cat([oracle.ids(before), torch.full((4,), 3), oracle.ids(after, seed=1)])
    slot = Slot(
        encoder=encoder,
        prepared=encoder.prepare({"key": key}),
        positions=torch.arange(before, before + 4),
        end=before + 4,
    )
    identity = ids.clone()
    identity[slot.positions] = -1 - torch.arange(4) - 100 * len(key)
    return Prompt(ids=ids, identity=identity, slots=(slot,))


def test_an_encoder_that_raises_ends_only_its_request(model: Model) -> None:
    encoder = Encoder(64)
    good = submit(model, raw(9), max_tokens=6, reuse=False).text()
    handles = [
        submit(model, prompt, max_tokens=6)
        for prompt in (raw(9), with_part(encoder, "broken"), with_part(encoder, "fine"))
    ]
    events = list(handles[1])
    assert len(events) == 1
    assert isinstance(events[0], Error)
    assert str(events[0].exception) == "this part cannot be encoded"
    with pytest.raises(ValueError, match="this part cannot"):
        submit(model, with_part(encoder, "broken")).text()
    assert handles[0].text() == good
    assert handles[2].text()
    assert handles[1].done is None


def test_an_encoder_with_the_wrong_number_of_rows(model: Model) -> None:
    with pytest.raises(InputError, match="returned 5 feature rows for a part with 4 positions"):
        submit(model, with_part(Encoder(64, rows=5), "long")).text()


def test_a_head_that_raises_for_one_spares_the_others(model: Model) -> None:
    good = submit(model, raw(9), max_tokens=10, reuse=False).text()
    handles = [submit(model, raw(n), max_tokens=10, reuse=False) for n in (8, 9)]
    model.engine.step()
    doomed = next(s.state for s in model.engine._running if s.handle is handles[0])

    def fail(*args: object) -> None:
        raise ConstraintError("no way on")

    assert isinstance(doomed, TextState)
    doomed.sampler.pick = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ConstraintError, match="no way on"):
        handles[0].text()
    assert handles[1].text() == good


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(model: Model) -> None:
    wanted = submit(model, raw(9), max_tokens=5, reuse=False).text()

    def fail(*args: object) -> None:
        raise MemoryError("out of memory")

    hook = model.backbone.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        submit(model, raw(9), max_tokens=5).text()
    hook.remove()
    assert submit(model, raw(9), max_tokens=5).text() == wanted


def test_an_interrupted_step_passes_the_interrupt_on(model: Model) -> None:
    handles = [submit(model, raw(9, seed=i), max_tokens=5) for i in range(2)]

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    hook = model.backbone.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        handles[0].text()
    hook.remove()
    with pytest.raises(Lfm2Error, match=r"the step was interrupted \(KeyboardInterrupt\)"):
        handles[1].text()
    assert submit(model, raw(9), max_tokens=5).text()


# --- what is generated


def test_seeds_repeat_and_differ(model: Model) -> None:
    def draw(seed: int | None) -> str:
        sampling = Sampling(temperature=1.0, seed=seed)
        return submit(model, raw(8), max_tokens=24, sampling=sampling).text()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_seed_gives_the_same_in_company(model: Model) -> None:
    sampling = Sampling(temperature=0.8, top_k=40, seed=5)
    alone = submit(model, raw(8), max_tokens=24, sampling=sampling).text()
    company = [submit(model, raw(n), max_tokens=9) for n in (30, 4)]
    handle = submit(model, raw(8), max_tokens=24, sampling=sampling, reuse=False)
    model.engine.run_until_idle()
    assert handle.text() == alone
    assert all(other.text() for other in company)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_obey_a_json_schema(seed: int) -> None:
    model = ours("dense")
    constraint = Constraint.json_schema(SCHEMA)
    sampling = Sampling(temperature=1.5, seed=seed)
    handle = submit(
        model, raw(8, seed=seed), max_tokens=400, sampling=sampling, constraint=constraint
    )
    free = submit(model, raw(5), max_tokens=20)
    found = json.loads(handle.text())
    assert done(handle).finish_reason == "stop"
    assert set(found) == {"name", "age", "tags"}
    assert isinstance(found["name"], str)
    assert 0 <= found["age"] <= 150
    assert set(found["tags"]) <= {"a", "b"}
    assert free.text()


def test_random_weights_obey_a_regex() -> None:
    model = ours("dense")
    constraint = Constraint.regex("(cat|dog)-[0-9]{3}")
    found = submit(model, raw(8), max_tokens=40, constraint=constraint).text()
    animal, _, number = found.partition("-")
    assert animal in ("cat", "dog")
    assert len(number) == 3
    assert number.isdigit()


def test_counts_and_times_add_up(model: Model) -> None:
    encoder = Encoder(64)
    handle = submit(model, with_part(encoder, "x"), max_tokens=7)
    handle.text()
    usage, timings = done(handle).usage, done(handle).timings
    assert (usage.prompt_tokens, usage.attachment_tokens, usage.completion_tokens) == (11, 4, 7)
    assert (usage.cached_tokens, usage.encoded_parts) == (0, 1)
    assert 0 <= timings.prepare <= timings.first_token
    assert 0 < timings.encode + timings.prefill <= timings.first_token
    assert timings.decode > 0
    assert done(handle).tokens_per_second == pytest.approx(6 / timings.decode)
    assert done(handle).to_dict()["usage"]["prompt_tokens"] == 11


def test_text_arrives_in_whole_characters_and_is_all_of_it(model: Model) -> None:
    heard = Recorder(model)
    handle = submit(model, raw(14, seed=8), max_tokens=60)
    pieces = [event.text for event in handle if isinstance(event, TextDelta)]
    assert "".join(pieces) == model.tokenizer.decode_output(heard.tokens())
    assert all(pieces)
