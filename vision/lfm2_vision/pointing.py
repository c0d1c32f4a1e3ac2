"""Which word of a question names which thing of its scene, for the auxiliary loss.

A question about where things are can only be answered by a model that finds the things its words
name. The generator knows them, so training can ask for their places at those very words. Knows
text and scenes; no tokens and no tensors.
"""

from __future__ import annotations

from lfm2_vision.scenes import QA, Scene, Thing

__all__ = ["counted_things", "named_things"]

_NOUNS = ["object", "thing", "shape"]


def counted_things(scene: Scene, qa: QA) -> tuple[int, int] | None:
    """What a question counts, or asks the existence of.

    Returns:
        The index in `qa.question` of the last character of the noun or colour that is counted, and
        how many things fit; None for other questions.
    """
    if qa.kind not in ("count", "exist"):
        return None
    shape, colour = qa.args.get("shape"), qa.args.get("colour")
    text = qa.question.lower()
    words = [" ".join(word for word in (colour, shape) if word)] if qa.args else _NOUNS
    ends = [at + len(word) for word in words if (at := text.find(word)) >= 0]
    fitting = [
        thing
        for thing in scene.things
        if shape in (None, thing.shape) and colour in (None, thing.colour)
    ]
    return (ends[0] - 1, len(fitting)) if ends else None


def named_things(scene: Scene, qa: QA) -> list[tuple[int, Thing]]:
    """The things that a question names and that fit no other, in the order of the question.

    Returns:
        For each the index in `qa.question` of the last character of the word that names it (its
        shape where that is named, else its colour), and the thing itself.
    """
    asked = (
        [("a_shape", "a_colour"), ("b_shape", "b_colour")]
        if qa.kind in ("relation", "where")
        else [("shape", "colour")]
    )
    text, at, found = qa.question.lower(), 0, []
    for keys in asked:
        shape, colour = (qa.args.get(key) for key in keys)
        words = " ".join(word for word in (colour, shape) if word)
        start = text.find(words, at) if words else -1
        if start < 0:
            continue
        at = start + len(words)
        fitting = [
            thing
            for thing in scene.things
            if shape in (None, thing.shape) and colour in (None, thing.colour)
        ]
        if len(fitting) == 1:
            found.append((at - 1, fitting[0]))
    return found
