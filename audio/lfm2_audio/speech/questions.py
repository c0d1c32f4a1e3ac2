"""Questions that have one answer of a few words, and their answers: what nano-audio can be asked.

Questions are sentences of the same words as all others (`lfm2_audio.speech.sentences`); which split
one belongs to depends on its wording alone. Facts are not held out, wordings are. Knows no sound.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

from lfm2_audio.speech.sentences import (
    CAPITALS,
    DIGITS,
    NOUNS,
    Split,
    is_held_out,
    lexicon,
    number,
    stream,
)

__all__ = [
    "NUMBERS",
    "QUESTION_KINDS",
    "UNKNOWN",
    "answer",
    "answer_words",
    "question",
]

NUMBERS = {
    "german": "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split(),
    "french": "un deux trois quatre cinq six sept huit neuf dix onze douze".split(),
    "spanish": "uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split(),
}
"""One to twelve in the languages that can be asked for."""

UNKNOWN = "i do not know"
"""The answer to everything else."""

_ADJECTIVES = "big small old new long beautiful heavy empty".split()
_COLOURS = "red blue green yellow black white brown orange".split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        "what is {digit} plus {digit}",
        "how much is {digit} plus {digit}",
        "please add {digit} and {digit}",
        "what is {digit} minus {digit}",
        "how much is {digit} minus {digit}",
        "what is {digit} times {digit}",
        "how much is {digit} times {digit}",
    ),
    "capital": (
        "what is the capital of {country}",
        "which city is the capital of {country}",
        "is {city} the capital of {country}",
    ),
    "spelling": ("how do you spell {noun}", "please spell the word {noun}"),
    "echo": ("say {noun} {noun} {noun}", "please say {adjective} {colour} {noun}"),
    "translation": ("what is {small} in {language}", "how do you say {small} in {language}"),
}

QUESTION_KINDS = tuple(_TEMPLATES)
"""What can be asked about."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "adjective": tuple(_ADJECTIVES),
    "city": tuple(CAPITALS.values()),
    "colour": tuple(_COLOURS),
    "country": tuple(CAPITALS),
    "digit": DIGITS,
    "language": tuple(NUMBERS),
    "noun": NOUNS,
    "small": tuple(number(n) for n in range(1, 13)),
}

_SUM = re.compile(
    r"(?:what is|how much is) (\w+) (plus|minus|times) (\w+)|please add (\w+) and (\w+)"
)
_CAPITAL = re.compile(r"(?:what is|which city is) the capital of (\w+)")
_WHETHER = re.compile(r"is (\w+) the capital of (\w+)")
_SPELLING = re.compile(r"(?:how do you spell|please spell the word) (\w+)")
_ECHO = re.compile(r"(?:please )?say (\w+ \w+ \w+)")
_TRANSLATION = re.compile(r"(?:what is|how do you say) (\w+) in (\w+)")


def question(
    seed: int, index: int, split: Split = "train", *, kind: str | None = None
) -> tuple[str, str]:
    """A question and its kind, in the form of `sentences.sentence`.

    Args:
        seed: Names the stream.
        index: Number in the stream.
        split: Wordings of one split never occur in the other.
        kind: One of `QUESTION_KINDS`; None for any.
    """
    rng = stream("question", seed, index, split, kind)
    while True:
        chosen = kind or rng.choice(QUESTION_KINDS)
        text = _fill(rng.choice(_TEMPLATES[chosen]), rng)
        if is_held_out(text) == (split == "held_out"):
            return text, chosen


def _fill(template: str, rng: Random) -> str:
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(_CHOICES[match[1]]), template)
    if (found := _WHETHER.fullmatch(text)) and rng.random() < 0.4:  # else it never is
        text = f"is {CAPITALS[found[2]]} the capital of {found[2]}"
    return text


def answer(text: str) -> str | None:
    """What a question is to be answered with, in words; None where it is none of these."""
    if found := _SUM.fullmatch(text):
        first, how, second = found[1] or found[4], found[2] or "plus", found[3] or found[5]
        return _calculated(first, how, second)
    if found := _CAPITAL.fullmatch(text):
        return CAPITALS.get(found[1])
    if (found := _WHETHER.fullmatch(text)) and found[2] in CAPITALS:
        return "yes" if CAPITALS[found[2]] == found[1] else "no"
    if (found := _SPELLING.fullmatch(text)) and found[1] in NOUNS:
        return " ".join(found[1])
    if found := _ECHO.fullmatch(text):
        return found[1]
    if (found := _TRANSLATION.fullmatch(text)) and found[2] in NUMBERS:
        names = _CHOICES["small"]
        return NUMBERS[found[2]][names.index(found[1])] if found[1] in names else None
    return None


def _calculated(first: str, how: str, second: str) -> str | None:
    if first not in DIGITS or second not in DIGITS:
        return None
    a, b = DIGITS.index(first), DIGITS.index(second)
    value = {"plus": a + b, "minus": a - b, "times": a * b}[how]
    return number(value) if value >= 0 else f"minus {number(-value)}"


@cache
def answer_words() -> tuple[str, ...]:
    """Words of answers that no sentence of `lexicon` holds, sorted."""
    words = {*_LETTERS, *UNKNOWN.split(), "yes", "no"}
    for numbers in NUMBERS.values():
        words.update(numbers)
    return tuple(sorted(words - set(lexicon())))
