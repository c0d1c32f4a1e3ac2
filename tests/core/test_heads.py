"""The text head: scores, the next embedding, and each way a sequence ends."""

from __future__ import annotations

import pytest
import torch

from lfm2_mm.constrain import Constraint, compile_constraint
from lfm2_mm.events import TextDelta
from lfm2_mm.heads import StepHead, TextHead, TextState
from lfm2_mm.sampling import Sampler, Sampling
from lfm2_mm.text_stream import TextStream
from tests import oracle

A, B, C = oracle.hf_tokenizer()("abc")["input_ids"]


def state(max_tokens: int = 10, stop: tuple[str, ...] = (), regex: str | None = None) -> TextState:
    tokenizer = oracle.shared("dense").tokenizer
    constraint = None if regex is None else Constraint.regex(regex)
    return TextState(
        sampler=Sampler(Sampling()),
        stream=TextStream(tokenizer.decode_output, stop=stop),
        max_tokens=max_tokens,
        grammar=None
        if constraint is None
        else compile_constraint(constraint, tokenizer, vocab_size=512),
    )


def head(eos: tuple[int, ...] = (oracle.EOS_ID,)) -> TextHead:
    """Hidden states are token vectors of this head: row `i` of `hidden(i)` scores highest."""
    return TextHead(oracle.shared("dense").backbone, torch.eye(512), eos)


def hidden(*tokens: int) -> torch.Tensor:
    return torch.eye(512)[list(tokens)] * 5


def test_the_next_row_is_the_token_embedding() -> None:
    made = head()
    first, second = made.step(hidden(A, B), [state(), state()])
    weight = made.backbone.embed_tokens.weight
    for result, token, text in ((first, A, "a"), (second, B, "b")):
        assert result.events == [TextDelta(text)]
        assert result.identity == token
        assert result.finish is None
        assert result.embedding is not None
        assert torch.equal(result.embedding, weight[token])


def test_scores_are_products_with_the_weight() -> None:
    tied = oracle.shared("dense").head
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    weight = tied.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.allclose(tied.logits(x), x @ weight.T)
    untied = oracle.shared("untied")
    assert untied.head.weight is not untied.backbone.embed_tokens.weight
    assert tied.weight is oracle.shared("dense").backbone.embed_tokens.weight


def test_ends() -> None:
    made = head(eos=(oracle.EOS_ID, C))
    for token, told in ((C, state()), (oracle.EOS_ID, state())):
        (result,) = made.step(hidden(token), [told])
        assert (result.events, result.embedding, result.finish) == ([], None, "stop")
        assert told.tokens == [token]
    (result,) = made.step(hidden(A), [state(max_tokens=1)])
    assert (result.events, result.finish) == ([TextDelta("a")], "length")
    told = state(stop=("ab",))
    assert made.step(hidden(A), [told])[0].events == []  # may be the beginning of a stop string
    (result,) = made.step(hidden(B), [told])
    assert (result.events, result.finish) == ([], "stop")
    told = state(stop=("ab",))
    made.step(hidden(A), [told])
    (result,) = made.step(hidden(C), [told])
    assert (result.events, result.finish) == ([TextDelta("a")], "stop")  # the end frees it


def test_a_grammar_chooses_and_ends() -> None:
    made, told = head(), state(regex="b(a|c)")
    (result,) = made.step(hidden(A), [told])
    assert result.events == [TextDelta("b")]
    (result,) = made.step(hidden(A), [told])
    assert (result.events, result.finish) == ([TextDelta("a")], "stop")


def test_one_dead_end_is_one_result() -> None:
    made = head()
    rows = hidden(A, B)
    rows[0] = torch.nan
    dead, alive = made.step(rows, [state(), state()])
    assert dead.error is not None
    assert "the largest score for the next token is nan" in str(dead.error)
    assert (dead.events, dead.embedding) == ([], None)
    assert (alive.error, alive.events) == (None, [TextDelta("b")])


def test_it_is_a_step_head() -> None:
    made: StepHead[TextState] = head()
    with pytest.raises(ValueError, match="shorter"):
        made.step(hidden(A, B), [state()])
