"""Asks about a scene: what is true of it, which question is asked so that answers stay balanced.

Knows scenes as data only, neither pixels nor samples. How a question is worded is `wordings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from .wordings import PLACES, article, plural, word
from .world import Pair, Scene, Thing, allowed_pairs

__all__ = [
    "CORE_KINDS",
    "KINDS",
    "NO_SIGN",
    "QA",
    "Wordings",
    "ask_all",
    "describe",
    "for_evaluation",
    "pick",
]

CORE_KINDS = ("colour", "shape", "exist", "count", "relation")
"""The kinds with a floor."""
KINDS = (*CORE_KINDS, "where", "sign", "describe")
NO_SIGN = "there is no sign"
Wordings = Literal["seen", "held_out", "any"]

CLEAR = 1 / 8
"""Least distance of two centres along the asked axis, as a share of that side."""
SIDES = ("left", "right", "above", "below")


@dataclass(frozen=True, kw_only=True, slots=True)
class QA:
    """A question and its answer.

    Attributes:
        kind: One of `KINDS`.
        question: The text to ask.
        answer: The bare text to expect.
        args: What the question is about, independent of wording: `shape`, `colour` (absent when
            not named), or the `place` of what has no name; for relations `a_shape`, `a_colour`,
            `b_shape`, `b_colour`, `side`.
        wording_seen: Whether this wording may occur in training.
    """

    kind: str
    question: str
    answer: str
    args: Mapping[str, str]
    wording_seen: bool = True


@dataclass(frozen=True, slots=True)
class _Fact:
    """A question before it is worded."""

    kind: str
    answer: str
    args: Mapping[str, str]


def ask_all(scene: Scene, rng: Random, wordings: Wordings = "seen") -> list[QA]:
    """Every question that the scene allows, each once in a random wording; not balanced."""
    facts = _colours(scene) + _shapes(scene) + _existences(scene) + _counts(scene)
    facts += [*_relations(scene, rng), _sign(scene)]
    if scene.colours and scene.shapes:
        facts.append(_description(scene))
    return [_worded(fact, rng, wordings) for fact in facts]


def for_evaluation(
    scene: Scene,
    rng: Random,
    kinds: Sequence[str] = CORE_KINDS,
    wordings: Wordings = "seen",
) -> list[QA]:
    """One question of each kind that applies, answers balanced over scenes."""
    facts = (_choose(kind, scene, rng) for kind in kinds)
    return [_worded(fact, rng, wordings) for fact in facts if fact is not None]


def pick(scene: Scene, rng: Random, n: int, weights: Mapping[str, float] | None = None) -> list[QA]:
    """About n different questions of mixed kinds for training, answers balanced over scenes.

    One in ten is typed carelessly: lower case, no closing mark. `weights` say how often each kind
    is asked; those not named keep their own.
    """
    weights = {**_PICK_WEIGHTS, **(weights or {})}
    if scene.sign is None:
        weights["sign"] = 0.3
    chosen: dict[tuple[str, tuple[tuple[str, str], ...]], QA] = {}
    for _ in range(5 * n):
        if len(chosen) == n:
            break
        kind = rng.choices(list(weights), list(weights.values()))[0]
        fact = _choose(kind, scene, rng)
        if fact is None or (kind, tuple(fact.args.items())) in chosen:
            continue
        qa = _worded(fact, rng, "seen")
        if rng.random() < 0.1:
            careless = qa.question.rstrip("?.").lower()
            qa = QA(kind=qa.kind, question=careless, answer=qa.answer, args=qa.args)
        chosen[kind, tuple(fact.args.items())] = qa
    return list(chosen.values())


_PICK_WEIGHTS: Mapping[str, float] = {
    "colour": 2.0,
    "shape": 3.0,
    "exist": 3.0,
    "count": 4.0,
    "relation": 5.0,
    "where": 2.0,
    "sign": 2.0,
    "describe": 0.5,
}

_COUNT_WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "all": (0.0, 0.34, 0.5, 0.9, 1.5, 3.4),
    "shape": (0.23, 0.33, 0.9, 2.0, 4.8, 25.0),
    "colour": (0.23, 0.31, 0.95, 3.6, 9.0, 60.0),
    "pair": (0.14, 0.15, 0.77, 5.4, 30.0, 30.0),
}
"""By what is counted, for answers 0 to 5: rare answers are taken when a scene offers them.

Fitted on 3000 core scenes by proportional scaling, so that over all scenes each answer is given at
most a quarter of the time, also to a guesser who knows what is counted.
"""


def _choose(kind: str, scene: Scene, rng: Random) -> _Fact | None:
    """One question of a kind, or None where the scene allows none."""
    if kind == "exist":
        return _choose_existence(scene, rng)
    if kind == "count":
        return _choose_count(scene, rng)
    if kind in ("relation", "where"):
        facts = [fact for fact in _relations(scene, rng) if fact.kind == kind]
        if not facts:
            return None
        answer = rng.choice(sorted({fact.answer for fact in facts}))
        return rng.choice([fact for fact in facts if fact.answer == answer])
    if kind == "sign":
        return _sign(scene)
    if kind == "describe":
        return _description(scene) if scene.colours and scene.shapes else None
    facts = _colours(scene) if kind == "colour" else _shapes(scene) or _placed(scene)
    return rng.choice(facts) if facts else None


def _askable(scene: Scene) -> tuple[Pair, ...]:
    """The pairs that questions about a scene may name."""
    return allowed_pairs(scene.shapes, scene.split, scene.colours)


def _matching(scene: Scene, shape: str | None, colour: str | None) -> list[Thing]:
    return [
        thing
        for thing in scene.things
        if shape in (None, thing.shape) and colour in (None, thing.colour)
    ]


def _args(shape: str | None, colour: str | None) -> dict[str, str]:
    pairs = {"shape": shape, "colour": colour}
    return {key: value for key, value in pairs.items() if value is not None}


def _colours(scene: Scene) -> list[_Fact]:
    if not scene.colours or not scene.shapes:
        return []
    return [
        _Fact("colour", thing.colour, {"shape": thing.shape})
        for thing in scene.things
        if len(_matching(scene, thing.shape, None)) == 1
    ]


def _shapes(scene: Scene) -> list[_Fact]:
    if not scene.colours or not scene.shapes:
        return []
    return [
        _Fact("shape", thing.shape, {"colour": thing.colour})
        for thing in scene.things
        if len(_matching(scene, None, thing.colour)) == 1
    ]


def _placed(scene: Scene) -> list[_Fact]:
    """In a scene without named colours: the shape of what lies clearly farthest to one side."""
    if scene.colours or len(scene.things) < 2:
        return []
    facts = []
    across = [(thing.cx / scene.width, thing.shape) for thing in scene.things]
    down = [(thing.cy / scene.height, thing.shape) for thing in scene.things]
    for place, row in zip(PLACES, (across, across, down, down), strict=True):
        far = place in ("right", "bottom")
        (first, shape), (second, _) = sorted(row, key=lambda x: x[0], reverse=far)[:2]
        if abs(first - second) >= CLEAR:
            facts.append(_Fact("shape", shape, {"place": place}))
    return facts


def _existence(scene: Scene, shape: str | None, colour: str | None) -> _Fact:
    answer = "yes" if _matching(scene, shape, colour) else "no"
    return _Fact("exist", answer, _args(shape, colour))


def _existences(scene: Scene) -> list[_Fact]:
    facts = [_existence(scene, *pair) for pair in _askable(scene)]
    facts += [_existence(scene, shape, None) for shape in scene.shapes]
    return facts + [_existence(scene, None, colour) for colour in scene.colours]


def _choose_existence(scene: Scene, rng: Random) -> _Fact | None:
    """Fix the form, then the answer by a fair coin, then what is asked.

    What is asked comes from the same population for both answers: a present thing for yes; for no
    an absent pair as likely as scenes hold it, or, half of the time, the shape of one present
    thing with the colour of another.
    """
    if not scene.colours:
        shown = {thing.shape for thing in scene.things}
        absent = [shape for shape in scene.shapes if shape not in shown]
        if not absent:
            return None  # the answer could only be yes
        asked = sorted(shown) if rng.random() < 0.5 else absent
        return _existence(scene, rng.choice(asked), None)
    if not scene.shapes:
        seen = {thing.colour for thing in scene.things}
        asked = sorted(seen) if rng.random() < 0.5 else [c for c in scene.colours if c not in seen]
        return _existence(scene, None, rng.choice(asked)) if asked else None
    allowed = _askable(scene)
    present = {thing.pair for thing in scene.things}
    form = rng.choices(("pair", "shape", "colour"), (3, 1, 1))[0]
    if form == "shape" and {shape for shape, _ in present} >= {shape for shape, _ in allowed}:
        form = "pair"
    elif form == "colour" and {colour for _, colour in present} >= {c for _, c in allowed}:
        form = "pair"
    if present.issuperset(allowed):
        return None  # the answer could only be yes
    if rng.random() < 0.5:
        shape, colour = rng.choice(sorted(present))
    else:
        missing = [p for p in allowed if p not in present]
        if form == "shape":
            missing = [p for p in missing if not _matching(scene, p[0], None)]
        elif form == "colour":
            missing = [p for p in missing if not _matching(scene, None, p[1])]
        elif rng.random() < 0.5:
            shapes, colours = {s for s, _ in present}, {c for _, c in present}
            hard = [p for p in missing if p[0] in shapes and p[1] in colours]
            near = [p for p in missing if p[0] in shapes or p[1] in colours]
            missing = hard or near or missing
        shape, colour = rng.choice(missing)
    return _existence(
        scene, None if form == "colour" else shape, None if form == "shape" else colour
    )


def _count(scene: Scene, shape: str | None, colour: str | None) -> _Fact:
    return _Fact("count", str(len(_matching(scene, shape, colour))), _args(shape, colour))


def _counts(scene: Scene) -> list[_Fact]:
    facts = [_count(scene, None, None)]
    facts += [_count(scene, shape, None) for shape in scene.shapes]
    facts += [_count(scene, None, colour) for colour in scene.colours]
    return facts + [_count(scene, *pair) for pair in _askable(scene)]


def _choose_count(scene: Scene, rng: Random) -> _Fact:
    """Draw form and answer together by weights that level the answers, then what is asked."""
    options: dict[tuple[str, str], list[_Fact]] = {}
    weights: list[float] = []
    for fact in _counts(scene):
        form = "pair" if len(fact.args) == 2 else next(iter(fact.args)) if fact.args else "all"
        options.setdefault((form, fact.answer), []).append(fact)
    for form, answer in options:
        weights.append(_COUNT_WEIGHTS[form][int(answer)])
    chosen = rng.choices(list(options), weights)[0]
    return rng.choice(options[chosen])


def _names(scene: Scene, thing: Thing) -> list[tuple[str | None, str | None]]:
    """The (shape, colour) ways to name a thing that fit no other."""
    ways: list[tuple[str | None, str | None]] = []
    if scene.shapes:
        ways.append((thing.shape, None))
    if scene.colours:
        ways.append((None, thing.colour))
    if len(ways) == 2:
        ways.append(thing.pair)
    return [way for way in ways if len(_matching(scene, *way)) == 1]


def _relations(scene: Scene, rng: Random) -> list[_Fact]:
    """Both kinds of questions about where one thing is from another, each named at random."""
    facts = []
    names = [(thing, _names(scene, thing)) for thing in scene.things]
    for a, a_names in names:
        for b, b_names in names:
            if a is b or not a_names or not b_names:
                continue
            a_shape, a_colour = rng.choice(a_names)
            b_shape, b_colour = rng.choice(b_names)
            named = {"a_shape": a_shape, "a_colour": a_colour}
            named |= {"b_shape": b_shape, "b_colour": b_colour}
            args = {key: value for key, value in named.items() if value is not None}
            for low, high, distance in (
                ("left", "right", (b.cx - a.cx) / scene.width),
                ("above", "below", (b.cy - a.cy) / scene.height),
            ):
                if abs(distance) < CLEAR:
                    continue
                true = low if distance > 0 else high
                for side in (low, high):
                    answer = "yes" if side == true else "no"
                    facts.append(_Fact("relation", answer, {**args, "side": side}))
                facts.append(_Fact("where", true, {**args, "side": f"{low} or {high}"}))
    return facts


def _sign(scene: Scene) -> _Fact:
    return _Fact("sign", NO_SIGN if scene.sign is None else scene.sign.word, {})


def _description(scene: Scene) -> _Fact:
    return _Fact("describe", describe(scene), {})


def describe(scene: Scene) -> str:
    """Name everything: equal things together, groups in reading order of their first thing.

    Reading order is by thirds of the height, then from left to right.
    """
    ordered = sorted(scene.things, key=lambda t: (int(3 * t.cy / scene.height), t.cx))
    groups: dict[tuple[str, str], int] = {}
    for thing in ordered:
        groups[thing.pair] = groups.get(thing.pair, 0) + 1
    numbers = ("", "", "two", "three", "four", "five")
    parts = [
        article(f"{colour} {shape}") if n == 1 else f"{numbers[n]} {colour} {plural(shape)}"
        for (shape, colour), n in groups.items()
    ]
    if scene.sign is not None:
        parts.append(f'a sign that says "{scene.sign.word}"')
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _worded(fact: _Fact, rng: Random, wordings: Wordings) -> QA:
    question, seen = word(fact.kind, fact.args, rng, wordings)
    return QA(
        kind=fact.kind,
        question=question,
        answer=fact.answer,
        args=dict(fact.args),
        wording_seen=seen,
    )
