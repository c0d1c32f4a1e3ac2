"""Scores of generated tokens in the form of chat completions; knows tokens, not requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lfm2_mm.events import TokenScore
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["logprobs_of"]


def logprobs_of(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """The `logprobs` of a choice or of a piece of one."""
    return {"content": [_entry(tokenizer, score) for score in scores], "refusal": None}


def _entry(tokenizer: Tokenizer, score: TokenScore) -> dict[str, Any]:
    top = [_token(tokenizer, token, logprob) for token, logprob in score.top]
    return {**_token(tokenizer, score.id, score.logprob), "top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special=False)
    # what is not sampled may have no probability at all, which JSON cannot say
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
