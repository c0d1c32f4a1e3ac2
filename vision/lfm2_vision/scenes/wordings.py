"""The free wordings of each kind of question, those of training and those held out.

Knows English only: what a question is about comes as words, its answer is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Literal

__all__ = ["HELD_OUT", "PLACES", "SEEN", "article", "plural", "word"]

SEEN: Mapping[str, tuple[str, ...]] = {
    "colour": (
        "What colour is {the}?",
        "What color is {the}?",
        "Which colour is {the}?",
        "Which color does {the} have?",
        "What is the colour of {the}?",
        "Tell me the color of {the}.",
        "Please tell me what colour {the} is.",
        "Name the color of {the}.",
    ),
    "shape": (
        "What shape is {colour}?",
        "What shape is the {colour} {thing}?",
        "Which shape is {colour}?",
        "What is the shape of the {colour} {thing}?",
        "Tell me the shape of the {colour} {thing}.",
        "What shape does the {colour} {thing} have?",
        "Please tell me which shape is {colour}.",
        "Name the {colour} shape.",
    ),
    "exist": (
        "Is there {a}?",
        "Is there {a} in the picture?",
        "Is there {a} in the image?",
        "Are there any {plural}?",
        "Do you see {a}?",
        "Can you see {a}?",
        "Does the picture contain {a}?",
        "Tell me whether there is {a}.",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} are in the picture?",
        "How many {plural} do you see?",
        "How many {plural} can you see in the image?",
        "Count the {plural}.",
        "Please count the {plural}.",
        "Tell me the number of {plural}.",
        "What is the number of {plural}?",
    ),
    "relation": (
        "Is {a} {side} {b}?",
        "Is {a} {side} {b}?",
        "Is {a} {side} {b} in the picture?",
        "In the image, is {a} {side} {b}?",
        "Tell me whether {a} is {side} {b}.",
        "Does {a} lie {side} {b}?",
        "Please tell me if {a} is {side} {b}.",
    ),
    "where": (
        "Where is {a}, {sides} {b}?",
        "Is {a} {sides} {b}?",
        "Tell me where {a} is, {sides} {b}.",
        "On which side is {a}, {sides} {b}?",
    ),
    "sign": (
        "What does the sign say?",
        "What is written on the sign?",
        "Read the sign.",
        "Please read the sign.",
        "Which word is on the sign?",
        "Tell me what the sign says.",
    ),
    "describe": (
        "Describe the picture.",
        "Describe the image.",
        "Please describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "Tell me what is in the image.",
    ),
}
"""Wordings of both splits."""

HELD_OUT: Mapping[str, tuple[str, ...]] = {
    "colour": ("{The} has which colour?", "Can you tell me the color of {the}?"),
    "shape": ("Which shape does the {colour} {thing} have?", "The {colour} {thing} is what shape?"),
    "exist": ("Does the image contain {a}?", "Are there {plural} in the picture?"),
    "count": (
        "What number of {plural} do you see?",
        "Tell me how many {plural} there are.",
        "Count the {plural} in the image.",
    ),
    "relation": ("Do you see {a} {side} {b}?", "In the picture, does {a} lie {side} {b}?"),
    "where": ("In the picture, is {a} {sides} {b}?",),
    "sign": ("What word does the sign show?", "Tell me the word on the sign."),
    "describe": ("Tell me what you see.", "What is there in the image?"),
}
"""Wordings that never occur in training."""

PLACES = ("left", "right", "top", "bottom")
_PLACED = (
    "What shape is farthest to the {place}?",
    "Which shape is nearest to the {place}?",
    "What is the shape of the {thing} at the {place}?",
    "Tell me which shape is closest to the {place}.",
)
"""For what has no colour to be named by; in training only."""

_SIDES: Mapping[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left or right": ("left or right of", "to the left or to the right of", "left of or right of"),
    "above or below": ("above or below", "above or below", "over or under"),
}
_THINGS = ("object", "object", "object", "thing", "shape", "one")


def article(noun_phrase: str) -> str:
    """Put the fitting indefinite article before a noun phrase."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def plural(noun: str) -> str:
    """The plural of one of the nouns of this world."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def word(
    kind: str,
    args: Mapping[str, str],
    rng: Random,
    wordings: Literal["seen", "held_out", "any"] = "seen",
) -> tuple[str, bool]:
    """Word a question.

    Args:
        kind: The kind of question, a key of `SEEN`.
        args: What it is about, as in `QA.args`.
        rng: Chooses among the wordings.
        wordings: Which wordings to choose from; "any" takes a held-out one half of the time.

    Returns:
        The question, and whether its wording may occur in training.
    """
    seen = wordings == "seen" or (wordings == "any" and rng.random() < 0.5)
    choices = _PLACED if "place" in args else (SEEN if seen else HELD_OUT)[kind]
    template = rng.choice(choices)
    if kind in ("relation", "where"):
        side = rng.choice(_SIDES[args["side"]])
        words = {
            "a": "the " + _noun(args.get("a_shape"), args.get("a_colour"), "object"),
            "b": "the " + _noun(args.get("b_shape"), args.get("b_colour"), "object"),
            "side": side,
            "sides": side,
        }
    else:
        thing = rng.choice(_THINGS[:-1] if kind in ("exist", "count") else _THINGS)
        noun = args.get("shape", thing)
        phrase = _noun(args.get("shape"), args.get("colour"), thing)
        many = phrase[: len(phrase) - len(noun)] + plural(noun)
        words = {
            "the": f"the {phrase}",
            "The": f"The {phrase}",
            "a": article(phrase),
            "plural": many,
            "colour": args.get("colour", ""),
            "place": args.get("place", ""),
            "thing": thing,
        }
    return template.format(**words), seen


def _noun(shape: str | None, colour: str | None, thing: str) -> str:
    return " ".join(part for part in (colour, shape or thing) if part)
