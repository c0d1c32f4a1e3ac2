"""The blind guesser: the most frequent answer, given the text of a question and nothing else.

Every score is worth what it is above this. It is fitted on questions of the training split and
measured on the very questions that the model is asked. It knows the words of the scene world, and
no picture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from lfm2_vision.scenes import ALL_SHAPES, COLOURS, QA

__all__ = ["BlindGuesser"]

_LEAST = 60  # questions that must have been seen before a level is believed
_SIDES = {"over": "above", "under": "below"} | {
    side: side for side in ("left", "right", "above", "below")
}
_WORDS = (
    {shape: ("shape", shape) for shape in ALL_SHAPES}
    | {colour: ("colour", colour) for colour in COLOURS}
    | {word: ("side", side) for word, side in _SIDES.items()}
)

Key = tuple[str, ...]


class BlindGuesser:
    """Guesses by majority at the finest level of the question that was seen often enough.

    The levels: the very text; the shapes, colours and sides it names; the sides, and whether it
    names shapes and colours; its kind. The kind is given to the guesser, which only makes it
    stronger.
    """

    def __init__(self, questions: Iterable[QA]) -> None:
        self._answers: dict[Key, Counter[str]] = defaultdict(Counter)
        for qa in questions:
            for key in _levels(qa.kind, qa.question):
                self._answers[key][qa.answer] += 1

    def guess(self, kind: str, question: str) -> str:
        """The likeliest answer; empty for a kind that was never seen. Ties go by alphabet."""
        for key in _levels(kind, question):
            seen = self._answers.get(key)
            if seen is not None and (seen.total() >= _LEAST or len(key) == 1):
                return min(seen, key=lambda answer: (-seen[answer], answer))
        return ""


def _levels(kind: str, question: str) -> Iterator[Key]:
    text = question.lower()
    named = [_WORDS[word] for word in _world_words(text)]
    yield kind, "text", text
    yield kind, "named", *(word for _, word in named)
    yield kind, "sorts", *(word if sort == "side" else sort for sort, word in named)
    yield (kind,)


def _world_words(text: str) -> Iterator[str]:
    for word in re.findall(r"[a-z]+", text):
        for form in (word, word.removesuffix("s"), word.removesuffix("es")):
            if form in _WORDS:
                yield form
                break
