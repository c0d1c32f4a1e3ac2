"""The task `scenes`: questions about drawn scenes of the held-out split, each asked alone.

Scenes, questions and answers come from the generator that also makes the training data, from the
split that training never sees: it shows the held-out pairs in half of its scenes and, where asked
for, words and wordings that training lacks. Scored by exact match. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from PIL import Image

from lfm2_evals.blind import BlindGuesser
from lfm2_evals.task import Example, Outcome, Score, score
from lfm2_mm.errors import SettingError
from lfm2_vision.scenes import (
    CORE,
    CORE_KINDS,
    HELD_OUT_WORDS,
    MORE_SHAPES,
    QA,
    SIGNS,
    SMALL_THINGS,
    Profile,
    for_evaluation,
    generate_scene,
    render,
    stream,
)
from lfm2_vision.scenes.questions import Wordings
from lfm2_vision.scenes.world import Scene

__all__ = ["SEED", "TIERS", "Scenes", "Tier", "scores", "slices"]

SEED = 7_000_000
"""Names the evaluation scenes; another number than any training recipe uses."""
_FIT_ON = 4000  # scenes of the training split that the blind guesser learns from


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A part of the scene world.

    Attributes:
        name: Short name.
        title: What it is, for a heading.
        profile: What its scenes may contain.
        kinds: The kinds of question that are asked.
        wordings: Which wordings they are asked in.
        floor: The accuracy that each kind with a floor should reach; None demands nothing.
    """

    name: str
    title: str
    profile: Profile = CORE
    kinds: tuple[str, ...] = CORE_KINDS
    wordings: Wordings = "seen"
    floor: float | None = None


TIERS: Mapping[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier(
            name="core",
            title="Core: 4 shapes, 7 colours, 1 to 5 things, canvases of 128 to 1024 pixels",
            kinds=(*CORE_KINDS, "where"),
            floor=0.9,
        ),
        Tier(name="wordings", title="Core scenes, in wordings held out", wordings="held_out"),
        Tier(name="more-shapes", title="All 8 shapes", profile=MORE_SHAPES),
        Tier(
            name="small",
            title="Small things: diameters of 1/10 to 1/6 of the shorter side",
            profile=SMALL_THINGS,
        ),
        Tier(name="signs", title="Words on signs", profile=SIGNS, kinds=("sign",)),
        Tier(name="describe", title="Whole descriptions", kinds=("describe",)),
    )
}
"""All tiers by name; only `core` has floors."""


class Scenes:
    """Questions of one tier over a number of held-out scenes.

    Args:
        tier: One of `TIERS`.
        count: Scenes; each gives one question of every kind that applies to it.
        seed: Names the scenes.

    Raises:
        SettingError: if the tier is unknown or the count is not positive.

    Example:
        >>> task = Scenes("core", count=2)
        >>> task.example(0).kind
        'colour'
    """

    max_tokens = 48

    def __init__(self, tier: str | Tier = "core", *, count: int = 1000, seed: int = SEED) -> None:
        if isinstance(tier, str):
            if tier not in TIERS:
                raise SettingError(f"the tier is {tier!r}; choose from {', '.join(TIERS)}")
            tier = TIERS[tier]
        if count < 1:
            raise SettingError(f"the number of scenes is {count}; ask for at least 1")
        self.tier, self.seed, self.name = tier, seed, f"scenes/{tier.name}"
        self._asked = [
            (index, qa)
            for index in range(count)
            for qa in _questions(tier, seed, index, "held_out", tier.wordings)
        ]
        self._picture = lru_cache(maxsize=4)(self._drawn)

    def __len__(self) -> int:
        return len(self._asked)

    def scene(self, index: int) -> Scene:
        """One of the scenes."""
        return generate_scene(self.seed, index, split="held_out", profile=self.tier.profile)

    def _drawn(self, index: int) -> tuple[Scene, Image.Image]:
        scene = self.scene(index)
        return scene, render(scene)

    def example(self, i: int) -> Example:
        """The i-th question with its picture; questions about one scene follow each other."""
        index, qa = self._asked[i]
        scene, picture = self._picture(index)
        return Example(
            kind=qa.kind,
            question=qa.question,
            answer=qa.answer,
            attachments=({"type": "image", "image": picture},),
            blind=self.guess(qa),
            tags={"scene": str(index), **_tags(scene)},
        )

    @cached_property
    def _blind(self) -> BlindGuesser:
        return _fit(self.tier, self.seed)

    def guess(self, qa: QA) -> str:
        """What the blind guesser says."""
        return self._blind.guess(qa.kind, qa.question)

    def questions(self) -> list[QA]:
        """All questions, without drawing anything."""
        return [qa for _, qa in self._asked]

    def messages(self, example: Example) -> Sequence[Mapping[str, Any]]:
        """The picture, then the question."""
        text = {"type": "text", "text": example.question}
        return [{"role": "user", "content": [*example.attachments, text]}]

    def score(self, example: Example, answer: str) -> bool:
        """Exact match; only surrounding white space is forgiven."""
        return answer.strip() == example.answer


@lru_cache(maxsize=8)
def _fit(tier: Tier, seed: int) -> BlindGuesser:
    """A blind guesser that has seen the answers to questions of the training split."""
    return BlindGuesser(
        qa for index in range(_FIT_ON) for qa in _questions(tier, seed, index, "train", "seen")
    )


def _questions(tier: Tier, seed: int, index: int, split: Any, wordings: Wordings) -> list[QA]:
    scene = generate_scene(seed, index, split=split, profile=tier.profile)
    rng = stream(seed, index, split, "questions")
    return for_evaluation(scene, rng, tier.kinds, wordings)


def _tags(scene: Scene) -> dict[str, str]:
    tags = {"pairs": "held out" if scene.has_held_out_pair else "trained"}
    if scene.sign is not None:
        tags["word"] = "held out" if scene.sign.word in HELD_OUT_WORDS else "trained"
    return tags


def scores(tier: Tier, outcomes: Sequence[Outcome]) -> list[Score]:
    """One score for each kind, then one for all kinds with a floor together."""
    found = [
        score(
            [outcome for outcome in outcomes if outcome.kind == kind],
            kind,
            floor=tier.floor if kind in CORE_KINDS else None,
        )
        for kind in tier.kinds
    ]
    core = [outcome for outcome in outcomes if outcome.kind in CORE_KINDS]
    if core and len(tier.kinds) > 1:
        found.append(score(core, "all of " + ", ".join(k for k in tier.kinds if k in CORE_KINDS)))
    return found


def slices(tier: Tier, outcomes: Sequence[Outcome]) -> dict[str, list[Score]]:
    """The scores of each kind again, split by what the scene shows and how it was seen.

    Returns:
        For each group (such as "held-out pair in the scene") one score for each kind; groups that
        no outcome belongs to are left out.
    """
    groups = {
        "only trained pairs": ("pairs", "trained"),
        "a held-out pair": ("pairs", "held out"),
        "one view": ("view", "single"),
        "tiled": ("view", "tiled"),
        "trained word": ("word", "trained"),
        "held-out word": ("word", "held out"),
    }
    found = {}
    for name, (tag, value) in groups.items():
        group = [outcome for outcome in outcomes if outcome.tags.get(tag) == value]
        if group:
            by_kind = ([o for o in group if o.kind == kind] for kind in tier.kinds)
            found[name] = [score(g, k) for g, k in zip(by_kind, tier.kinds, strict=True)]
    return found
