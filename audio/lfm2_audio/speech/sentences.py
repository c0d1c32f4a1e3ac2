"""The sentence world of nano-audio: at most 300 words, and a grammar that makes millions of lines.

Every sentence is a pure function of (seed, index, split); which split a sentence belongs to
depends on its text alone. Knows no sound and imports no torch.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Literal

__all__ = [
    "CAPITALS",
    "DIGITS",
    "KINDS",
    "NOUNS",
    "Split",
    "is_held_out",
    "lexicon",
    "number",
    "sentence",
    "stream",
]

Split = Literal["train", "held_out"]

DIGITS = tuple("zero one two three four five six seven eight nine".split())
_TEENS = tuple(
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)
_TENS = tuple("twenty thirty forty fifty sixty seventy eighty ninety".split())

CAPITALS = {
    "france": "paris",
    "germany": "berlin",
    "italy": "rome",
    "spain": "madrid",
    "japan": "tokyo",
    "china": "beijing",
    "egypt": "cairo",
    "kenya": "nairobi",
    "peru": "lima",
    "norway": "oslo",
    "poland": "warsaw",
    "greece": "athens",
    "cuba": "havana",
    "canada": "ottawa",
}
"""Countries and their capitals."""

NOUNS = tuple(
    "dog cat horse cow bird fish mouse sheep duck rabbit ball book cup hat key lamp letter "
    "picture phone flower apple lemon bottle box clock".split()
)
"""Things that can be counted, each with a plural in -s or one of its own."""

_PLURALS = {"fish": "fish", "mouse": "mice", "sheep": "sheep", "box": "boxes"}

_SLOTS: dict[str, tuple[str, ...]] = {
    "adj": ("big", "small", "old", "new", "long", "beautiful", "heavy", "empty"),
    "break": ("in the morning", "in the afternoon", "in the evening", "tonight"),
    "city": tuple(CAPITALS.values()),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "orange"),
    "country": tuple(CAPITALS),
    "day": tuple(f"{day}day" for day in ("mon", "tues", "wednes", "thurs", "fri", "satur", "sun")),
    "device": ("light", "fan", "heater", "radio", "television"),
    "drink": ("water", "milk", "coffee", "tea"),
    "food": ("bread", "cheese", "rice", "soup", "chicken", "butter", "sugar", "salad"),
    "furniture": ("table", "chair", "bed", "door", "window", "shelf"),
    "job": ("doctor", "teacher", "farmer", "driver"),
    "language": ("german", "french", "spanish"),
    "month": ("january", "march", "april", "june", "august", "october", "december"),
    "name": ("anna", "tom", "peter", "maria", "john", "lucy", "david", "sarah", "martin", "emma"),
    "noun": NOUNS,
    "place": ("school", "market", "station", "park", "library", "hospital", "beach", "hotel"),
    "prep": ("under", "on", "behind", "near"),
    "room": ("kitchen", "bedroom", "garden", "office", "bathroom", "garage"),
    "times": ("today", "tomorrow", "now", "again", "soon"),
    "verb": ("sees", "has", "likes", "wants", "finds", "buys", "sells", "needs"),
    "weather": ("cold", "warm", "sunny", "windy", "cloudy", "rainy"),
}

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        "what is {n} plus {n}",
        "what is {n} minus {n}",
        "how much is {digit} times {digit}",
        "please add {n} and {n}",
    ),
    "capital": (
        "what is the capital of {country}",
        "which city is the capital of {country}",
        "is {city} the capital of {country}",
    ),
    "spelling": ("how do you spell {noun}", "please spell the word {noun}"),
    "echo": ("say {noun} {noun} {noun}", "please say {adj} {colour} {noun}"),
    "translation": ("what is {n} in {language}", "how do you say {n} in {language}"),
    "command": (
        "turn on the {room} {device}",
        "turn off the {room} {device}",
        "turn {on} the {device} in the {room}",
        "please turn {on} the {device} {break}",
        "open the window in the {room}",
        "close the {room} door",
        "set a timer for {n} minutes",
        "set the heater in the {room} to {n}",
        "wake me at {hour} {minute} {break}",
        "call {name} at {hour} {break}",
        "call the {job} {times}",
        "play some music in the {room}",
    ),
    "statement": (
        "{name} {verb} {a} {adj} {colour} {noun}",
        "{name} {verb} {a} {noun} and {n} {nouns}",
        "{name} {verb} {n} {colour} {nouns} in the {room}",
        "the {adj} {noun} is {prep} the {furniture}",
        "the {colour} {noun} is {prep} the {adj} {furniture} in the {room}",
        "there are {n} {nouns} {prep} the {furniture}",
        "where is the {colour} {noun} of {name}",
        "my {noun} is {colour} and your {noun} is {colour}",
        "{name} and {name} walk to the {place} {break}",
        "{name} is a {job} in {city}",
        "the {job} is at the {place} {times}",
        "i want some {food} with {food} and a cup of {drink}",
        "we need {food} and {drink} from the market",
        "{name} buys {n} {nouns} for {n} dollars",
    ),
    "weather": (
        "it is {weather} and {weather} in {city} {times}",
        "is it {weather} in {city} {times}",
        "will it be {weather} on {day}",
        "what is the weather in {city} on {day}",
    ),
    "travel": (
        "the train to {city} leaves at {hour} {minute}",
        "how far is it from {city} to {city}",
        "we go from {city} to {city} on {day} {break}",
        "{name} comes back from {country} in {month}",
        "is there a {place} near the {place}",
    ),
    "time": (
        "it is {hour} {minute} {break}",
        "the birthday of {name} is on {month} {n}",
        "the {place} is open on {day} and {day}",
        "what time is it in {city}",
    ),
}

KINDS = tuple(_TEMPLATES)
"""What sentences are about; the first five are questions that have one answer."""

_WEIGHTS = {"statement": 5, "command": 3, "arithmetic": 2}
_HELD_OUT = 10  # one sentence in so many belongs to the held-out split


def stream(*parts: object) -> Random:
    """A random stream that depends on nothing but what names it."""
    name = "/".join(str(part) for part in parts)
    return Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))


def number(n: int) -> str:
    """0 to 99 in words, without a hyphen."""
    if n < 10:
        return DIGITS[n]
    if n < 20:
        return _TEENS[n - 10]
    tens = _TENS[n // 10 - 2]
    return f"{tens} {DIGITS[n % 10]}" if n % 10 else tens


def is_held_out(text: str) -> bool:
    """Whether a sentence is one of those that training never hears."""
    return zlib.crc32(text.encode()) % _HELD_OUT == 0


def sentence(
    seed: int, index: int, split: Split = "train", *, kind: str | None = None
) -> tuple[str, str]:
    """A sentence and its kind: lower case, words between single spaces, no punctuation.

    Args:
        seed: Names the stream.
        index: Number in the stream.
        split: Sentences of one split never occur in the other.
        kind: One of `KINDS`; None for any.
    """
    rng = stream("sentence", seed, index, split, kind)
    weights = [_WEIGHTS.get(name, 1) for name in KINDS]
    while True:
        chosen = kind or rng.choices(KINDS, weights)[0]
        text = _fill(rng.choice(_TEMPLATES[chosen]), rng)
        if is_held_out(text) == (split == "held_out"):
            return text, chosen


@cache
def lexicon() -> tuple[str, ...]:
    """Every word that a sentence can hold, sorted."""
    words = set(DIGITS) | set(_TEENS) | set(_TENS) | {"a", "an", "on", "off"}
    words |= {_plural(noun) for noun in NOUNS}
    for phrases in _SLOTS.values():
        words.update(word for phrase in phrases for word in phrase.split())
    for templates in _TEMPLATES.values():
        for template in templates:
            words.update(re.sub(r"\{\w+\}", " ", template).split())
    return tuple(sorted(words))


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def _count(rng: Random) -> str:
    return number(rng.randrange(100) if rng.random() < 0.6 else rng.randrange(20))


_MADE: dict[str, Callable[[Random], str]] = {
    "n": _count,
    "digit": lambda rng: rng.choice(DIGITS),
    "hour": lambda rng: number(rng.randint(1, 12)),
    "minute": lambda rng: number(rng.choice((10, 15, 20, 25, 30, 40, 45, 50, 55))),
    "nouns": lambda rng: _plural(rng.choice(NOUNS)),
    "on": lambda rng: rng.choice(("on", "off")),
    "a": lambda rng: rng.choice(("a", "the", "my", "your")),
}


def _fill(template: str, rng: Random) -> str:
    def chosen(match: re.Match[str]) -> str:
        name = match[1]
        return _MADE[name](rng) if name in _MADE else rng.choice(_SLOTS[name])

    text = re.sub(r"\{(\w+)\}", chosen, template)
    return re.sub(r"\ba (?=[aeio])", "an ", text)
