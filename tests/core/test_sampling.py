"""Sampling gives the distributions of `transformers`' logits processors, without drawing."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lfm2_mm.errors import ConstraintError, Lfm2Error, SettingError
from lfm2_mm.sampling import Sampler, Sampling, probabilities


def reference(
    logits: torch.Tensor, s: Sampling, seen: list[int], allowed: torch.Tensor | None
) -> torch.Tensor:
    """The same settings through the classes of `transformers`, in its order."""
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if s.repetition_penalty != 1.0:
        before.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature != 1.0:
        after.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        after.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1.0:
        after.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        after.append(MinPLogitsWarper(s.min_p))
    ids = cast(torch.LongTensor, torch.tensor([seen]))
    scores = before(ids, logits.float()[None].clone())
    if allowed is not None:
        scores = scores.masked_fill(~allowed[None], -math.inf)
    return torch.softmax(after(ids, scores)[0], dim=-1)


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.1, min_p=0.15, repetition_penalty=1.05),
    Sampling(temperature=0.2, top_k=50),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.5, top_p=0.3, repetition_penalty=0.8),
    Sampling(temperature=1.0, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.3),
    Sampling(temperature=2.0, top_p=0.999, min_p=0.001),
    Sampling(temperature=1.0, top_k=100_000, top_p=0.0),
    Sampling(temperature=1.0, min_p=1.0),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_same_distribution_as_transformers(sampling: Sampling, masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for v, spread in [(5, 1.0), (700, 3.0), (20_000, 2.0)]:
        logits = torch.randn(v, generator=generator) * spread
        seen = torch.randint(0, v, (v // 3,), generator=generator)
        allowed = torch.rand(v, generator=generator) < 0.5 if masked else None
        if allowed is not None:
            allowed[1] = True
        ours = probabilities(logits, sampling, seen=seen, allowed=allowed)
        theirs = reference(logits, sampling, seen.tolist(), allowed)
        assert ours.dtype == torch.float32
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_ties_with_the_kth_token_stay_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], dtype=torch.bfloat16)
    sampling = Sampling(temperature=1.0, top_k=2)
    ours = probabilities(logits, sampling)
    assert (ours > 0).tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(ours, reference(logits, sampling, [0], None))


def test_nucleus_widens_over_a_flat_distribution() -> None:
    logits = torch.linspace(0, 1e-2, 5000)
    sampling = Sampling(temperature=1.0, top_p=0.6)
    kept = int((probabilities(logits, sampling) > 0).sum())
    assert kept == int((reference(logits, sampling, [0], None) > 0).sum())
    assert 2950 < kept < 3050


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 3e-210, 5e-324])
def test_tiny_temperature_is_finite_and_greedy(temperature: float) -> None:
    logits = torch.tensor([30.0, 31.0, -5.0])
    probs = probabilities(logits, Sampling(temperature=temperature))
    assert probs.tolist() == [0.0, 1.0, 0.0]


def test_greedy_takes_the_best_after_penalty_and_mask() -> None:
    logits = torch.tensor([4.0, 3.9, 3.0, -1.0])
    assert Sampler(Sampling()).pick(logits) == 0
    penalty = Sampling(repetition_penalty=1.2)
    assert Sampler(penalty, [0, -7, 99]).pick(logits) == 1
    allowed = torch.tensor([False, False, True, True])
    assert Sampler(penalty, [0]).pick(logits, allowed) == 2
    assert probabilities(logits, Sampling(), allowed=allowed).tolist() == [0, 0, 1, 0]


def test_generated_tokens_are_penalised_too_and_the_logits_are_untouched() -> None:
    logits = torch.tensor([4.0, 3.9, 3.8])
    before = logits.clone()
    sampler = Sampler(Sampling(repetition_penalty=1.1))
    assert [sampler.pick(logits) for _ in range(4)] == [0, 1, 2, 0]
    assert torch.equal(logits, before)


def test_a_seed_repeats_the_draws_and_requests_do_not_share_a_generator() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    hot = Sampling(temperature=1.0, top_k=20, seed=11)
    first, second = Sampler(hot), Sampler(hot)
    state = torch.random.get_rng_state()
    a = [first.pick(logits) for _ in range(30)]
    b = [second.pick(logits) for _ in range(30)]
    other = Sampler(Sampling(temperature=1.0, top_k=20, seed=12))
    assert a == b
    assert a != [other.pick(logits) for _ in range(30)]
    assert torch.equal(state, torch.random.get_rng_state())
    possible = set(torch.nonzero(probabilities(logits, hot)).squeeze(1).tolist())
    assert set(a) <= possible
    assert len(set(a)) > 3


def test_mask_holds_while_drawing() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, allowed = torch.randn(200, generator=generator), torch.zeros(200, dtype=torch.bool)
    allowed[[3, 190]] = True
    sampler = Sampler(Sampling(temperature=5.0, seed=1))
    assert {sampler.pick(logits, allowed) for _ in range(40)} == {3, 190}


def test_no_possible_token_is_an_error() -> None:
    logits = torch.zeros(4)
    nothing = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ConstraintError) as e:
        Sampler(Sampling()).pick(logits, nothing)
    assert str(e.value) == (
        "the constraint leaves no token that the model can produce: "
        "use a schema or pattern that its tokenizer can spell"
    )
    for bad in (math.nan, math.inf):
        with pytest.raises(Lfm2Error) as e2:
            probabilities(torch.tensor([0.0, bad]), Sampling(temperature=1.0))
        assert str(e2.value) == (
            f"the largest score for the next token is {bad}: "
            "the computation overflowed, try dtype float32 or check the weights"
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1}, "temperature is -1: it must be 0 (greedy) or a number up to 100"),
        ({"temperature": math.nan}, "temperature is nan: it must be 0 (greedy) or a number up"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be 0 (greedy) or a number up"),
        ({"top_k": -2}, "top_k is -2: it must be 0 (off) or a positive integer"),
        ({"top_k": 2.5}, "top_k is 2.5: it must be 0 (off) or a positive integer"),
        ({"top_k": True}, "top_k is True: it must be 0 (off) or a positive integer"),
        ({"top_p": 1.1}, "top_p is 1.1: it must be a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p is -0.1: it must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be a number from 0.01"),
        ({"seed": -1}, "seed is -1: it must be a non-negative integer below 2**63"),
    ],
)
def test_bad_settings_are_one_sentence(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError) as e:
        Sampling(**kwargs)  # type: ignore[arg-type]
    assert str(e.value).startswith(message)


def test_generation_config() -> None:
    read = Sampling.from_generation_config
    assert read({}) == Sampling()
    assert read({"temperature": 0.1, "min_p": 0.15, "repetition_penalty": 1.05}) == Sampling(
        repetition_penalty=1.05
    )
    assert read({"do_sample": False, "temperature": 0.3}).greedy
    assert read(
        {"do_sample": True, "temperature": 0.1, "min_p": 0.15, "repetition_penalty": 1.05}
    ) == Sampling(temperature=0.1, top_k=50, min_p=0.15, repetition_penalty=1.05)
    assert read(
        {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": None, "eos_token_id": 7}
    ) == Sampling(temperature=1.0, top_p=0.9)
    with pytest.raises(SettingError, match="top_p is 3: it must be a number from 0 to 1"):
        read({"do_sample": True, "top_p": 3})
