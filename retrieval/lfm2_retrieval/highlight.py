"""Which words of a passage matched a query, how strongly, and the stretch around the best of them.

A query token's similarity to a passage token counts only as far as it exceeds what everyday words
of any language reach, so that articles and punctuation stay dark. Knows encoders and vectors;
deliberately nothing of indexes, terminals or pages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from lfm2_retrieval.index.encoders import EncoderLike

__all__ = ["Alignment", "Snippet", "Span", "align", "background", "pieces", "snippet", "spans"]

Span = tuple[int, int, float]
"""First character, the character behind the last, and a weight in 0 to 1."""
TokenSpan = tuple[str, int, int]

_REACH = 0.25
"""Least distance from the baseline that counts as a full match."""
_NEAR = 0.85
"""Tokens light up too that match nearly as well as the best, at this part of its weight."""
_FAINT = 0.4
"""Words below this part of the strongest stay dark,"""
_LEAST = 0.1
"""and so do words below this weight."""

# Sentences of words that say nothing by themselves, one for each language that the models know
# well: what is as near to one of these as to the passage does not count as a match.
_EVERYDAY = (
    "It is what it was, and that is how we have it for you, with all of this at the one or on a.",
    "Es ist, was es war, und so haben wir das für euch mit der, die und den, zu dem oder auf ein.",
    "C'est ce que c'était, et nous l'avons pour vous, avec le, la, les et des, à une ou sur un.",
    "Es lo que era, y así lo tenemos para ti, con el, la y los de una, que no se ha de un.",
    "È ciò che era, e così lo abbiamo per te, con il, la, le e gli, di una o su un che non si.",
    "É o que era, e assim o temos para você, com o, a, os e as, de uma ou em um que não se.",
    "これは、それは、あれは、何ですか。その、この、ので、から、まで、ます、です、ました。",
    "이것은 무엇입니까? 그것은 저것의 것이고, 그리고 이를 위해 있는 것과 합니다.",
    "这是那个，也是什么？我们有的就是这些，和你们在一起，不是为了它。",
    "هذا هو ما كان، وهذه هي التي لنا من أجلكم، مع كل ما في ذلك أو على أن إلى عن.",
    "Это то, что было, и так мы имеем это для вас, с тем и на одном или в другом.",
)
_backgrounds: WeakKeyDictionary[object, Tensor] = WeakKeyDictionary()

# Scripts whose words are not set apart by spaces: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_STOP = re.compile(r"[.!?…؟]\s+|[。！？]\s*|\n\s*")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, eq=False)
class Alignment:
    """A query beside a passage, token by token.

    Attributes:
        text: The passage.
        query_tokens: Text and place of each query row; -1, -1 for what is none of the query.
        document_tokens: The same of each passage row.
        similarity: Cosine of each query row and each passage row.
        lift: How far the similarity exceeds the query token's baseline, in 0 to 1; 0 where either
            token is no word.
    """

    text: str
    query_tokens: Sequence[TokenSpan]
    document_tokens: Sequence[TokenSpan]
    similarity: Float[Tensor, "q t"]
    lift: Float[Tensor, "q t"]

    @property
    def score(self) -> float:
        """MaxSim: of each query row the best similarity, summed."""
        if not self.similarity.shape[1]:
            return float("-inf")
        return float(self.similarity.max(1).values.sum())

    @property
    def heat(self) -> Float[Tensor, " t"]:
        """Of each passage row the greatest lift."""
        if not len(self.query_tokens):
            return torch.zeros(len(self.document_tokens))
        return self.lift.max(0).values


def background(encoder: EncoderLike) -> Float[Tensor, "n d"]:
    """Rows of everyday words in several languages; encoded once for each encoder."""
    if encoder not in _backgrounds:
        _backgrounds[encoder] = torch.cat(encoder.encode_documents(list(_EVERYDAY)))
    return _backgrounds[encoder]


def align(
    encoder: EncoderLike,
    query: str,
    texts: Sequence[str],
    vectors: Sequence[Float[Tensor, "_ d"]] | None = None,
) -> list[Alignment]:
    """Align a query with passages.

    Args:
        encoder: Makes the vectors; one that gives a single vector per text marks no words.
        query: The query.
        texts: The passages.
        vectors: Rows of each passage, if known; those that were merged (token pooling) are made
            anew.
    """
    if not texts:
        return []
    rows = encoder.encode_queries([query])[0].float()
    asked = encoder.query_tokens(query)
    tokens = [encoder.document_tokens(text) for text in texts]
    if vectors is None:
        known = list(encoder.encode_documents(list(texts)))
    else:
        known = list(vectors)
        merged = [i for i, one in enumerate(known) if len(one) != len(tokens[i])]
        for i, one in zip(
            merged,
            encoder.encode_documents([texts[i] for i in merged]) if merged else [],
            strict=True,
        ):
            known[i] = one
    baseline = (rows @ background(encoder).float().T).max(1).values.clamp(0, 1)
    return [
        _aligned(text, rows, asked, one.float(), own, baseline)
        for text, one, own in zip(texts, known, tokens, strict=True)
    ]


def _aligned(
    text: str,
    query: Float[Tensor, "q d"],
    asked: Sequence[TokenSpan],
    document: Float[Tensor, "t d"],
    tokens: Sequence[TokenSpan],
    baseline: Float[Tensor, " q"],
) -> Alignment:
    similarity = query @ document.T
    words = torch.tensor(
        [0 <= a < b and _is_word(piece) for piece, a, b in asked], dtype=torch.bool
    )
    here = torch.tensor(
        [0 <= a < b and _is_word(text[a:b]) for _, a, b in tokens], dtype=torch.bool
    )
    # where everyday words come close to the query token, a little more is no match
    reach = (1 - baseline).clamp(min=_REACH)
    lift = ((similarity - baseline[:, None]) / reach[:, None]).clamp(0, 1)
    return Alignment(text, asked, tokens, similarity, lift * words[:, None] * here[None, :])


def spans(alignment: Alignment) -> list[Span]:
    """The matched words: in order, apart from each other, whole where a script has spaces."""
    lift = alignment.lift
    if not lift.numel():
        return []
    best = lift.max(1, keepdim=True).values
    weights = torch.where(lift >= _NEAR * best, lift, 0).max(0).values.tolist()
    least = max(_LEAST, _FAINT * max(weights))
    found = [
        (*_widened(alignment.text, start, end), weight)
        for (_, start, end), weight in zip(alignment.document_tokens, weights, strict=True)
        if weight >= least
    ]
    return _apart(found)


@dataclass(frozen=True)
class Snippet:
    """A stretch of a passage.

    Attributes:
        text: The stretch.
        spans: Matched words in it.
        start: Where it begins in the passage.
        cut: Whether something is left out before it, and behind it.
    """

    text: str
    spans: tuple[Span, ...]
    start: int
    cut: tuple[bool, bool]

    def pieces(self) -> Iterator[tuple[str, float]]:
        """The text in pieces with their weights, 0 for what did not match."""
        return pieces(self.text, self.spans)


def pieces(text: str, marked: Sequence[Span]) -> Iterator[tuple[str, float]]:
    """A text cut at its spans: each piece with its weight, 0 between them."""
    at = 0
    for start, end, weight in marked:
        if at < start:
            yield text[at:start], 0.0
        yield text[start:end], weight
        at = end
    if at < len(text):
        yield text[at:], 0.0


def snippet(text: str, marked: Sequence[Span], *, width: int = 280) -> Snippet:
    """The stretch of about `width` characters that holds the most weight.

    It begins at a sentence if one begins close by, else between words.
    """
    if len(text) <= width:
        return Snippet(text, tuple(marked), 0, (False, False))
    lead = width // 4

    def weight(start: int) -> float:
        inside = (w for a, b, w in marked if start <= a and b <= start + width - lead)
        return sum(inside)

    first = max((a for a, _, _ in marked), key=lambda a: (weight(a), -a), default=0)
    start = _beginning(text, max(0, first - lead), first)
    end = _ending(text, min(len(text), start + width))
    kept = tuple(
        (a - start, min(b, end) - start, w) for a, b, w in marked if start <= a and a < end
    )
    return Snippet(text[start:end], kept, start, (start > 0, end < len(text)))


def _beginning(text: str, earliest: int, latest: int) -> int:
    """A place between the two where a sentence begins, else a word."""
    if earliest == 0:
        return 0
    found = _STOP.search(text, earliest, latest) or _SPACE.search(text, earliest, latest)
    return found.end() if found else earliest


def _ending(text: str, end: int) -> int:
    """The place, or one shortly before where a word ends."""
    if end == len(text) or not (_joins(text[end]) and _joins(text[end - 1])):
        return end
    space = max(text.rfind(" ", end - 30, end), text.rfind("\n", end - 30, end))
    return space if space > 0 else end


def _widened(text: str, start: int, end: int) -> tuple[int, int]:
    """A token without what is no word at its ends, widened to the ends of its word."""
    while start < end and not _is_word(text[start]):
        start += 1
    while end > start and not _in_word(text[end - 1]):
        end -= 1
    while start > 0 and _joins(text[start]) and _joins(text[start - 1]):
        start -= 1
    while end < len(text) and _joins(text[end - 1]) and _joins(text[end]):
        end += 1
    return start, end


def _is_word(text: str) -> bool:
    """Whether letters or digits are in it."""
    return any(character.isalnum() for character in text)


def _in_word(character: str) -> bool:
    """Letters, digits, and the marks upon them."""
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _joins(character: str) -> bool:
    """Whether it belongs to one word with its neighbours."""
    return _in_word(character) and not _UNSPACED.match(character)


def _apart(found: Sequence[Span]) -> list[Span]:
    """Spans that overlap or touch as one, with the greatest weight."""
    apart: list[Span] = []
    for start, end, weight in sorted(found):
        if apart and start <= apart[-1][1]:
            first, last, other = apart[-1]
            apart[-1] = (first, max(last, end), max(weight, other))
        else:
            apart.append((start, end, weight))
    return apart
