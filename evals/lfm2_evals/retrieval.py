"""The task `retrieval`: the right text of a thousand, asked for in another language.

Texts come from packages and sentence frames that training never sees. A retriever is measured
beside character trigrams, which know no language, and beside both fused by rank. Between
languages of one script literals (numbers, names, identifiers) are stripped, since they alone would
give the answer away. Knows the encoder's face; no index and no table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfm2_evals.stats import Interval, wilson
from lfm2_evals.trigrams import trigram_scores
from lfm2_mm.errors import SettingError

__all__ = [
    "CORE",
    "TIERS",
    "Direction",
    "Directions",
    "Found",
    "Item",
    "evaluate",
    "fused",
    "right",
]

CORE = ("en", "de", "fr", "es", "ja", "ko", "zh", "ar")
"""Languages that are paired with each other; those of `_FURTHER` with English only."""
_FURTHER = ("it", "pt", "ru")
_SCRIPTS = {"ja": "Jpan", "ko": "Kore", "zh": "Hans", "ar": "Arab", "ru": "Cyrl"}
_LEAST_WORDS = 3  # of the English text; shorter ones say too little to be found by
_LEAST_ITEMS = 300  # a direction with fewer has no floor
_FLOOR = 0.5
_FUSION = 60  # the usual constant of reciprocal rank fusion

TIERS: Mapping[str, str] = {
    "packages": "Messages of packages held out",
    "frames": "Sentences of frames held out",
}
"""Kinds of text by name, with a heading; only packages have floors."""

Scores = NDArray[np.float32]
Progress = Callable[[int, int], None]


class EncoderLike(Protocol):
    """What is measured: see `lfm2_retrieval.encoder.Encoder`."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> list[Any]:
        """Vectors of each query."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[Any]:
        """Vectors of each document."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One thing said in several languages, with literals and without.

    Attributes:
        kind: A name of `TIERS`.
        texts: Text by language.
        bare: The same with literals stripped.
    """

    kind: str
    texts: Mapping[str, str]
    bare: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Direction:
    """Questions in one language, candidates in another.

    Attributes:
        source: Language of the questions.
        target: Language of the candidates.
        queries: The questions.
        candidates: The first are the answers, in order; the rest only distract.
    """

    source: str
    target: str
    queries: tuple[str, ...]
    candidates: tuple[str, ...]

    @property
    def same_script(self) -> bool:
        """Whether both languages are written in one script."""
        return _SCRIPTS.get(self.source) == _SCRIPTS.get(self.target)


class Directions:
    """The directions of one tier.

    Args:
        tier: One of `TIERS`.
        count: Candidates of a direction, and questions at most.
        items: What to draw from; the held-out half of the training texts by default.

    Raises:
        SettingError: if the tier is unknown or the count too small.

    Example:
        >>> Directions("packages").direction("en", "ja").same_script
        False
    """

    def __init__(
        self, tier: str = "packages", *, count: int = 1000, items: Sequence[Item] | None = None
    ) -> None:
        if tier not in TIERS:
            raise SettingError(f"the tier is {tier!r}; choose from {', '.join(TIERS)}")
        if count < 2:
            raise SettingError(f"the number of candidates is {count}; ask for at least 2")
        self.tier, self.count = tier, count
        self._given = items

    @cached_property
    def items(self) -> Sequence[Item]:
        """All items, those of this tier first."""
        every = _held_out() if self._given is None else self._given
        return sorted(every, key=lambda item: item.kind != self.tier)

    def names(self) -> list[tuple[str, str]]:
        """All directions."""
        further = [("en", other) for other in _FURTHER] + [(other, "en") for other in _FURTHER]
        return [*permutations(CORE, 2), *further]

    def direction(self, source: str, target: str) -> Direction:
        """One direction; of texts that say the same only one is there."""
        same = _SCRIPTS.get(source) == _SCRIPTS.get(target)
        queries: list[str] = []
        answers: list[str] = []
        others: list[str] = []
        asked, seen = set[str](), set[str]()
        for item in self.items:
            texts = item.bare if same else item.texts
            query, answer = texts.get(source, ""), texts.get(target, "")
            if not answer or answer.casefold() in seen:
                continue
            seen.add(answer.casefold())
            long = len(texts["en"].split()) >= _LEAST_WORDS
            fresh = query and query.casefold() not in asked
            if item.kind == self.tier and long and fresh and len(queries) < self.count:
                asked.add(query.casefold())
                queries.append(query)
                answers.append(answer)
            else:
                others.append(answer)
        candidates = [*answers, *others][: self.count]
        return Direction(source, target, tuple(queries), tuple(candidates))


def _held_out() -> list[Item]:
    from lfm2_retrieval.corpus.build import held_out
    from lfm2_retrieval.corpus.text import literals, strip_literals

    items = []
    for concept in held_out():
        texts = concept.texts
        names = literals(text for lang, text in texts.items() if lang in _SCRIPTS)
        bare = {lang: strip_literals(text, names) for lang, text in texts.items()}
        kind = "frames" if concept.source.startswith("frame ") else "packages"
        items.append(Item(kind, texts, {lang: text for lang, text in bare.items() if text}))
    return [item for item in items if "en" in item.bare]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one direction: for each question whether its answer came first.

    Attributes:
        direction: Which.
        late: By the retriever's late-interaction scores.
        trigrams: By character trigrams.
        hybrid: By both, fused by rank.
    """

    direction: Direction
    late: NDArray[np.bool_]
    trigrams: NDArray[np.bool_]
    hybrid: NDArray[np.bool_]

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.late)

    @property
    def has_floor(self) -> bool:
        """Whether there are questions enough to demand something."""
        return self.n >= _LEAST_ITEMS

    @property
    def reached(self) -> bool:
        """Whether the floor is: other scripts half and above trigrams; one script the hybrid above.

        Meaningless without `has_floor`.
        """
        if self.direction.same_script:
            return bool(self.hybrid.sum() > self.trigrams.sum())
        return bool(self.late.mean() >= _FLOOR and self.late.sum() > self.trigrams.sum())

    def interval(self, of: str) -> Interval:
        """95 % Wilson interval of `late`, `trigrams` or `hybrid`."""
        return wilson(int(getattr(self, of).sum()), self.n)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        row: dict[str, Any] = {
            "source": self.direction.source,
            "target": self.direction.target,
            "n": self.n,
            "candidates": len(self.direction.candidates),
            "same_script": self.direction.same_script,
        }
        for name in ("late", "trigrams", "hybrid"):
            interval = self.interval(name)
            share = float(getattr(self, name).mean()) if self.n else 0.0
            row[name] = {
                "recall_at_1": round(share, 4),
                "low": round(interval.low, 4),
                "high": round(interval.high, 4),
            }
        return row | {"floor": self.reached if self.has_floor else None}


@dataclass
class Run:
    """All directions of a tier, as far as they were measured.

    Attributes:
        tier: Its name.
        total: Directions it has.
        found: One for each direction.
        seconds: Time it took.
    """

    tier: str
    total: int
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every direction was measured."""
        return len(self.found) == self.total


def evaluate(
    directions: Directions, encoder: EncoderLike, *, progress: Progress | None = None
) -> Run:
    """Measure a retriever in every direction; Ctrl-C keeps what was measured."""
    names = directions.names()
    run = Run(directions.tier, len(names))
    began = time.perf_counter()
    known: dict[tuple[str, str], Any] = {}

    def encoded(side: str, texts: Sequence[str]) -> list[Any]:
        encode = encoder.encode_queries if side == "query" else encoder.encode_documents
        new = list(dict.fromkeys(text for text in texts if (side, text) not in known))
        for text, vectors in zip(new, encode(new) if new else (), strict=True):
            known[side, text] = np.asarray(vectors, dtype=np.float32)
        return [known[side, text] for text in texts]

    try:
        for source, target in names:
            one = directions.direction(source, target)
            late = _late_scores(encoded("query", one.queries), encoded("document", one.candidates))
            lexical = trigram_scores(one.queries, one.candidates)
            run.found.append(Found(one, right(late), right(lexical), right(fused(late, lexical))))
            if progress is not None:
                progress(len(run.found), run.total)
    except KeyboardInterrupt:
        pass
    run.seconds = time.perf_counter() - began
    return run


def _late_scores(queries: Sequence[Scores], documents: Sequence[Scores]) -> Scores:
    """MaxSim of each query with each document, `[q, d]`. Formula: arXiv 2004.12832, equation 3."""
    packed = np.concatenate(documents)
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    rows = [np.maximum.reduceat(query @ packed.T, starts, axis=1).sum(axis=0) for query in queries]
    return np.stack(rows) if rows else np.zeros((0, len(documents)), dtype=np.float32)


def fused(late: Scores, lexical: Scores) -> Scores:
    """Reciprocal rank fusion of two score tables `[q, d]`; what shares no trigram has no rank.

    Source: Cormack, Clarke and Büttcher, SIGIR 2009.
    """
    table = 1.0 / (_FUSION + _ranks(late))
    return (table + np.where(lexical > 0, 1.0 / (_FUSION + _ranks(lexical)), 0.0)).astype(
        np.float32
    )


def _ranks(scores: Scores) -> NDArray[np.float64]:
    """1 for the best of each row, and so on; equal scores share the best rank."""
    ordered = -np.sort(-scores, axis=1)
    rows = zip(ordered, scores, strict=True)
    ranks = [np.searchsorted(-best, -row, side="left") + 1 for best, row in rows]
    return np.array(ranks, dtype=np.float64).reshape(scores.shape)


def right(scores: Scores) -> NDArray[np.bool_]:
    """Whether each query's own document, that of its row's number, is strictly the best."""
    n = len(scores)
    own = scores[np.arange(n), np.arange(n)]
    others = scores.copy()
    others[np.arange(n), np.arange(n)] = -np.inf
    best: NDArray[np.bool_] = own > others.max(axis=1, initial=-np.inf)
    return best
