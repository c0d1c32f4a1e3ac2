"""Logits become a token: repetition penalty, mask, temperature, top-k, top-p, min-p, a draw.

The order and the rules are those of `transformers`' logits processors, so that the same settings
give the same distribution there and here. This module knows nothing of grammars (it takes a mask),
of stop strings or of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lfm2_mm.errors import ConstraintError, Lfm2Error, SettingError

__all__ = ["Sampler", "Sampling", "probabilities"]

# Candidates looked at before the whole vocabulary is sorted for top-p.
_NUCLEUS_FIRST_LOOK = 512


def _number(name: str, value: object, low: float, high: float, what: str) -> None:
    """Refuse a setting that is not a number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SettingError(f"{name} is {value!r}: it must be {what}")


def _integer(name: str, value: object, low: int, high: int, what: str) -> None:
    """Refuse a setting that is not an integer from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SettingError(f"{name} is {value!r}: it must be {what}")


_LEAST = 1.2e-38  # below it, a temperature is 0 to the logits


@no_type_check  # it checks its own values, with sentences for the user
@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Attributes:
        temperature: Divides the logits; 0 chooses the likeliest token and ignores the next three.
        top_k: Keep only the k likeliest tokens (ties with the k-th stay); 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probabilities reach it; 1 keeps all.
        min_p: Drop tokens whose probability is below this share of the likeliest one's.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already seen,
            prompt included; 1 changes nothing. Holds for greedy choice too.
        seed: Makes the draws repeatable; None draws a new seed per request.

    Raises:
        SettingError: A value is of another type or outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0, "0 (greedy) or a number up to 100")
        _integer("top_k", self.top_k, 0, 2**31 - 1, "0 (off) or a positive integer")
        _number("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")
        _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _number(
            "repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number from 0.01 to 100"
        )
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1, "a non-negative integer below 2**63")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature < _LEAST

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Sampling:
        """Read a checkpoint's `generation_config.json`; unknown keys are left alone.

        Greedy unless the file says `"do_sample": true`. Keys that are absent or null then take
        the defaults that `transformers` 5 applies (temperature 1, top_k 50, top_p 1), so that the
        same file means the same thing in both.

        Raises:
            SettingError: A value of the file cannot be used.
        """

        def get(key: str, default: object) -> Any:
            value = config.get(key)
            return default if value is None else value

        penalty = get("repetition_penalty", 1.0)
        if config.get("do_sample") is not True:
            return cls(repetition_penalty=penalty)
        return cls(
            temperature=get("temperature", 1.0),
            top_k=get("top_k", 50),
            top_p=get("top_p", 1.0),
            min_p=get("min_p", 0.0),
            repetition_penalty=penalty,
        )


def _penalised(
    logits: Float[Tensor, " v"],
    sampling: Sampling,
    seen: Int[Tensor, " n"] | None,
    allowed: Bool[Tensor, " v"] | None,
) -> Float[Tensor, " v"]:
    """Logits in fp32 after the repetition penalty and the mask; the input is left as it is."""
    scores = logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None and seen.numel():
        ids = seen.to(scores.device)
        old, factor = scores[ids], sampling.repetition_penalty
        scores = scores.index_put((ids,), torch.where(old < 0, old * factor, old / factor))
    if allowed is not None:
        scores = scores.masked_fill(~allowed.to(scores.device), -math.inf)
    return scores


def _refuse_dead_end(top: float, allowed: Bool[Tensor, " v"] | None) -> None:
    """Raise when no token has a finite score: the largest, `top`, is NaN or infinite."""
    if math.isfinite(top):
        return
    if top == -math.inf and allowed is not None:
        raise ConstraintError(
            "the constraint leaves no token that the model can produce: "
            "use a schema or pattern that its tokenizer can spell"
        )
    raise Lfm2Error(
        f"the largest score for the next token is {top}: "
        "the computation overflowed, try dtype float32 or check the weights"
    )


def _share(probs: Float[Tensor, " n"], sampling: Sampling) -> Bool[Tensor, " n"]:
    """Tokens with at least `min_p` of the likeliest one's probability."""
    return probs >= sampling.min_p * probs.max()


def _nucleus(probs: Float[Tensor, " n"], sampling: Sampling) -> Bool[Tensor, " n"]:
    """Tokens before which less than `top_p` of the mass lies, likeliest first; at least one.

    Looks at the likeliest few hundred and widens only when their mass does not reach `top_p`, so
    a peaked distribution needs no sort of the whole vocabulary.
    """
    n = probs.numel()
    look = min(_NUCLEUS_FIRST_LOOK, n)
    while True:
        values, order = torch.topk(probs, look)
        mass = values.cumsum(0)
        if look == n or mass[-1] >= sampling.top_p:
            break
        look = min(look * 16, n)
    inside = (mass - values) < sampling.top_p
    inside[0] = True
    return torch.zeros(n, dtype=torch.bool, device=probs.device).scatter(0, order, inside)


def _candidates(
    scores: Float[Tensor, " v"], top: Float[Tensor, ""], sampling: Sampling
) -> tuple[Int[Tensor, " n"] | None, Float[Tensor, " n"]]:
    """Ids still possible (None = all of them, in order) and their probabilities, summing to 1."""
    # Shifting by the maximum leaves the softmax alone and keeps tiny temperatures finite.
    scores = (scores - top) / sampling.temperature
    ids: Tensor | None = None
    if 0 < sampling.top_k < scores.numel():
        kth = torch.topk(scores, sampling.top_k).values[-1]
        ids = torch.nonzero(scores >= kth).squeeze(1)
        scores = scores[ids]
    probs = torch.softmax(scores, dim=0)
    for narrow, on in ((_nucleus, sampling.top_p < 1.0), (_share, sampling.min_p > 0.0)):
        if on:
            inside = torch.nonzero(narrow(probs, sampling)).squeeze(1)
            ids = inside if ids is None else ids[inside]
            scores = scores[inside]
            probs = torch.softmax(scores, dim=0)
    return ids, probs


def probabilities(
    logits: Float[Tensor, " v"],
    sampling: Sampling,
    *,
    seen: Int[Tensor, " n"] | None = None,
    allowed: Bool[Tensor, " v"] | None = None,
) -> Float[Tensor, " v"]:
    """The distribution that the next token is drawn from; a pure function.

    Args:
        logits: The model's raw scores, any float dtype.
        sampling: The settings; greedy gives all the mass to the likeliest token.
        seen: Ids inside the vocabulary that the repetition penalty applies to; repeats are fine.
        allowed: False where a token must not be chosen.

    Returns:
        fp32 probabilities that sum to 1, zero where a token was filtered out.

    Raises:
        ConstraintError: `allowed` leaves no token.
        Lfm2Error: The logits hold NaN or infinity.
    """
    scores = _penalised(logits, sampling, seen, allowed)
    top, best = scores.max(dim=0)
    _refuse_dead_end(float(top), allowed)
    full = torch.zeros_like(scores)
    if sampling.greedy:
        full[best] = 1.0
        return full
    ids, probs = _candidates(scores, top, sampling)
    return probs if ids is None else full.scatter(0, ids, probs)


class Sampler:
    """Chooses the tokens of one request: settings, the ids seen so far, an own generator.

    The draw happens on the CPU, so a seed gives the same choices on every device whose
    probabilities agree.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        """Start a request.

        Args:
            sampling: The settings.
            prompt_ids: The prompt's token ids, for the repetition penalty; ids outside the
                vocabulary (positions that an encoder fills) are ignored.
        """
        self.sampling = sampling
        self._known: set[int] = set()
        self._seen = torch.empty(0, dtype=torch.long)
        if sampling.repetition_penalty != 1.0:
            self._known = {int(i) for i in prompt_ids if i >= 0}
            self._seen = torch.tensor(sorted(self._known), dtype=torch.long)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: Float[Tensor, " v"], allowed: Bool[Tensor, " v"] | None = None) -> int:
        """Choose the next token and remember it.

        Args:
            logits: The model's raw scores for the next position.
            allowed: False where a token must not be chosen.

        Raises:
            ConstraintError: `allowed` leaves no token.
            Lfm2Error: The logits hold NaN or infinity.
        """
        seen = self._seen[self._seen < logits.numel()] if self._known else None
        scores = _penalised(logits, self.sampling, seen, allowed)
        top, best = scores.max(dim=0)
        _refuse_dead_end(float(top), allowed)
        if self.sampling.greedy:
            token = int(best)
        else:
            ids, probs = _candidates(scores, top, self.sampling)
            drawn = int(torch.multinomial(probs.cpu(), 1, generator=self._generator))
            token = drawn if ids is None else int(ids[drawn])
        self._remember(token)
        return token

    def _remember(self, token: int) -> None:
        """Add a chosen token to those that the repetition penalty applies to."""
        if self.sampling.repetition_penalty != 1.0 and token not in self._known:
            self._known.add(token)
            self._seen = torch.cat([self._seen, torch.tensor([token])])
