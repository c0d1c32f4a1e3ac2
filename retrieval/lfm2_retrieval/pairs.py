"""Batches for nano-colbert: texts of one language with their meaning in another, by step.

Every batch is a pure function of (seed, step). A batch takes one pair of languages and texts of
like length, so that wrong answers are hard and little is padding; no two texts of a batch say the
same. Every so often documents are passages of several texts, and each query asks for one of them.
Texts may be varied (words left out, or spelt in smaller pieces), which makes few texts go further.
Knows no model and no loss.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, combinations
from random import Random
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from lfm2_retrieval.corpus.catalogs import LANGUAGES
from lfm2_retrieval.corpus.text import key
from lfm2_retrieval.training import PairBatch, pad_side

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm2_retrieval.corpus.build import Concept

__all__ = ["Batches", "Mix", "Tokenized"]

_GROUPS, _COMMON = 24, 3000
"""Words that the texts of a `near` batch share; texts with such a word, at most."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How batches are drawn.

    Attributes:
        tokens: Tokens of one side of a batch, at most; decides how many pairs it has.
        most: Pairs of a batch, at most.
        english: Share of batches that have English on one side.
        mixed: Share of batches whose texts are of all languages at once.
        passage_every: One step in so many has passages for documents; 0 for none.
        passages: Passages of such a batch.
        longest: Tokens of a text, at most; longer ones are left out.
        near: Share of batches whose texts have English words in common.
        varied: Share of batches whose texts are varied.
        dropped: Share of tokens left out of a varied text of at least four.
        split: Share of tokens of a varied text that are spelt as the two that they were merged
            from, and these again. (After BPE-dropout: Provilkov, Emelianenko and Voita, arXiv
            1910.13267.)
        favoured: How much oftener than the others a language beside English is drawn; 1 where
            it is not named.
    """

    tokens: int = 3072
    most: int = 320
    english: float = 0.5
    mixed: float = 0.15
    passage_every: int = 6
    passages: int = 40
    longest: int = 56
    near: float = 0.0
    varied: float = 0.0
    dropped: float = 0.0
    split: float = 0.0
    favoured: Mapping[str, float] = field(default_factory=dict)


class Tokenized:
    """A corpus as token ids.

    Attributes:
        ids: For each concept its ids by language, begin token included.
        same: For each concept a number by language that equals where texts say the same.
        weights: How often each concept is drawn.
        merged: The two ids that an id was merged from, where it was.
    """

    def __init__(self, concepts: Sequence[Concept], tokenizer: Tokenizer) -> None:
        self.ids: list[dict[str, list[int]]] = [{} for _ in concepts]
        self.same: list[dict[str, int]] = [{} for _ in concepts]
        self.weights = [concept.weight for concept in concepts]
        self.merged = _merged(tokenizer)
        numbers: dict[str, int] = {}
        for language in LANGUAGES:
            chosen = [i for i, concept in enumerate(concepts) if language in concept.texts]
            texts = [concepts[i].texts[language] for i in chosen]
            for i, text, encoded in zip(chosen, texts, tokenizer.encode_batch(texts), strict=True):
                self.ids[i][language] = encoded.ids
                self.same[i][language] = numbers.setdefault(key(text), len(numbers))

    def __len__(self) -> int:
        return len(self.ids)


def _merged(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """What each id was first merged from."""
    model = json.loads(tokenizer.to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    found: dict[int, tuple[int, int]] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault(ids[left + right], (ids[left], ids[right]))
    return found


_EDGES = (4, 5, 6, 7, 9, 12, 16, 22, 32, 1 << 30)


class Batches(Dataset[PairBatch]):
    """Step number to batch.

    Args:
        corpus: What to draw from.
        steps: How many batches there are.
        seed: Names the batches.
        mix: How they are drawn.
        prefixes: Ids that stand after the begin token of queries and of documents.
        skipped: Ids whose vectors do not count in documents.
        pad: The padding id.
    """

    def __init__(
        self,
        corpus: Tokenized,
        *,
        steps: int,
        seed: int,
        mix: Mix,
        prefixes: tuple[int, int],
        skipped: frozenset[int],
        pad: int = 0,
    ) -> None:
        self.corpus, self.steps, self.seed, self.mix = corpus, steps, seed, mix
        self._prefixes, self._skipped, self._pad = prefixes, skipped, pad

    def __len__(self) -> int:
        return self.steps

    @cached_property
    def _buckets(self) -> dict[tuple[str, str], list[list[int]]]:
        """Concepts that have both languages, as often as they weigh, by the longer text."""
        found: dict[tuple[str, str], list[list[int]]] = {
            pair: [[] for _ in _EDGES] for pair in combinations(LANGUAGES, 2)
        }
        for i, ids in enumerate(self.corpus.ids):
            fit = [lang for lang in LANGUAGES if 1 < len(ids.get(lang, ())) <= self.mix.longest]
            for a, b in combinations(fit, 2):
                longer = max(len(ids[a]), len(ids[b])) - 1
                bucket = next(n for n, edge in enumerate(_EDGES) if longer <= edge)
                found[a, b][bucket] += [i] * self.corpus.weights[i]
        return found

    @cached_property
    def _with(self) -> dict[int, list[int]]:
        """The concepts whose English has a token, but for tokens that most have."""
        found: dict[int, list[int]] = defaultdict(list)
        for i, ids in enumerate(self.corpus.ids):
            for token in set(ids.get("en", ())[1:]):
                found[token].append(i)
        return {token: some for token, some in found.items() if 4 <= len(some) <= _COMMON}

    @cached_property
    def _others(self) -> list[str]:
        """The languages beside English that there are texts in."""
        return [lang for lang in LANGUAGES[1:] if any(self._buckets["en", lang])]

    def __getitem__(self, step: int) -> PairBatch:
        rng = Random(f"pairs {self.seed} {step}")
        every = self.mix.passage_every
        if every and step % every == every - 1:
            return self._passages(rng)
        a, b = self._languages(rng)
        if rng.random() < self.mix.mixed:
            return self._laid_out(rng, self._mixed(rng, a, b))
        pool = self._pool(rng, a, b)
        near = self.mix.near and rng.random() < self.mix.near
        if rng.random() < 0.5:
            a, b = b, a
        drawn = self._near(rng, pool, a, b) if near else self._shuffled(rng, pool)
        return self._laid_out(rng, [(i, a, b) for i in self._distinct(drawn, a, b)])

    def _languages(self, rng: Random) -> tuple[str, str]:
        """A pair of languages in the order of `LANGUAGES`, the first often English."""
        others = self._others
        weights = [self.mix.favoured.get(lang, 1.0) for lang in others]
        if rng.random() < self.mix.english:
            return "en", rng.choices(others, weights)[0]
        a = b = rng.choices(range(len(others)), weights)[0]
        while b == a:
            b = rng.choices(range(len(others)), weights)[0]
        return others[min(a, b)], others[max(a, b)]

    def _pool(self, rng: Random, a: str, b: str) -> list[int]:
        buckets = self._buckets[a, b]
        sizes = list(accumulate(len(bucket) ** 0.75 for bucket in buckets))
        return rng.choices(buckets, cum_weights=sizes)[0]

    def _mixed(self, rng: Random, a: str, b: str) -> list[tuple[int, str, str]]:
        """Concepts of one length, each in two languages of its own."""
        drawn = []
        for i in self._distinct(self._shuffled(rng, self._pool(rng, a, b)), a, b):
            there = [lang for lang in LANGUAGES if lang in self.corpus.ids[i]]
            one, other = rng.sample(there, 2)
            drawn.append((i, one, other))
        return drawn

    def _shuffled(self, rng: Random, pool: Sequence[int]) -> list[int]:
        return rng.sample(pool, min(len(pool), 2 * self.mix.most))

    def _near(self, rng: Random, pool: Sequence[int], a: str, b: str) -> list[int]:
        """Some of a pool, and for each as many as are wanted that share an English word with it."""
        ids, groups = self.corpus.ids, []
        longest = max(max(len(ids[i][a]), len(ids[i][b])) for i in pool[:64]) if pool else 0
        for i in rng.sample(pool, min(len(pool), _GROUPS)):
            tokens = [token for token in ids[i]["en"][1:] if token in self._with]
            others = self._with[rng.choice(tokens)] if tokens else []
            group = [
                j
                for j in rng.sample(others, min(len(others), 4 * self.mix.most // _GROUPS))
                if 1 < len(ids[j].get(a, ())) <= longest and 1 < len(ids[j].get(b, ())) <= longest
            ]
            groups += [i, *group[: self.mix.most // _GROUPS]]
        return groups + self._shuffled(rng, pool)

    def _distinct(self, pool: Iterable[int], a: str, b: str) -> list[int]:
        """Concepts that fit into a batch, none of which says what another says."""
        ids, same, seen = self.corpus.ids, self.corpus.same, set[int]()
        chosen: list[int] = []
        longest = 1
        for i in pool:
            pair = {same[i][a], same[i][b]}
            longest = max(longest, len(ids[i][a]), len(ids[i][b]))
            if len(chosen) == self.mix.most or (len(chosen) + 1) * longest > self.mix.tokens:
                break
            if not pair & seen:
                seen |= pair
                chosen.append(i)
        return chosen

    def _laid_out(self, rng: Random, chosen: Sequence[tuple[int, str, str]]) -> PairBatch:
        ids = self.corpus.ids
        queries = [ids[i][a] for i, a, _ in chosen]
        documents = [ids[i][b] for i, _, b in chosen]
        if self.mix.varied and rng.random() < self.mix.varied:
            queries = [self._varied(rng, row) for row in queries]
            documents = [self._varied(rng, row) for row in documents]
        return self._batch(queries, documents, list(range(len(chosen))))

    def _varied(self, rng: Random, ids: list[int]) -> list[int]:
        """A text with tokens left out and tokens split; one at least stays."""
        dropped = self.mix.dropped if len(ids) > 4 else 0.0
        found = ids[:1]
        for token in ids[1:]:
            if rng.random() >= dropped:
                self._spell(rng, token, found)
        return found if len(found) > 1 else ids

    def _spell(self, rng: Random, token: int, into: list[int]) -> None:
        parts = self.corpus.merged.get(token)
        if parts is not None and rng.random() < self.mix.split:
            for part in parts:
                self._spell(rng, part, into)
        else:
            into.append(token)

    def _batch(
        self, queries: list[list[int]], documents: list[list[int]], answers: list[int]
    ) -> PairBatch:
        from torch import tensor

        query, document = self._prefixes
        none = frozenset[int]()
        return PairBatch(
            pad_side([[q[0], query, *q[1:]] for q in queries], pad=self._pad, skipped=none),
            pad_side(
                [[d[0], document, *d[1:]] for d in documents], pad=self._pad, skipped=self._skipped
            ),
            tensor(answers),
        )

    def _passages(self, rng: Random) -> PairBatch:
        """Documents of two to fourteen texts, and two queries for each."""
        a, b = self._languages(rng)
        every = [i for bucket in self._buckets[a, b] for i in rng.sample(bucket, len(bucket) // 8)]
        if rng.random() < 0.5:
            a, b = b, a
        ids, same, seen = self.corpus.ids, self.corpus.same, set[int]()
        rng.shuffle(every)
        fresh = iter(every)
        queries, documents, answers = [], [], []
        for row in range(self.mix.passages):
            inside: list[int] = []
            for i in fresh:
                pair = {same[i][a], same[i][b]}
                if not pair & seen:
                    seen |= pair
                    inside.append(i)
                if len(inside) == 2 + row % 13:
                    break
            if len(inside) < 2:
                break
            begin = ids[inside[0]][b][:1]
            documents.append(begin + [token for i in inside for token in ids[i][b][1:]])
            for i in inside[:2]:
                queries.append(ids[i][a])
                answers.append(len(documents) - 1)
        return self._batch(queries, documents, answers)
