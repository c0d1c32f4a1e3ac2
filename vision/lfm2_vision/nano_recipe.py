"""The recipes of nano-vl: what is learnt when, from which scenes, as batches by step.

Every batch is a pure function of (recipe, step). Knows neither the model nor the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from lfm2_mm.train.trainer import Schedule
from lfm2_vision.factors import Exchange, Factor
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.scenes import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    CORE,
    CORE_SHAPES,
    Profile,
    Sample,
    canvas,
    generate,
    stream,
)
from lfm2_vision.training import SceneBatch, SceneEncoder

__all__ = [
    "BRANCH_AT",
    "MORE_STEPS",
    "STEPS",
    "Batches",
    "Recipe",
    "Stage",
    "recipe",
    "recipe_more",
]

NEAR = Profile(canvas=(128, 320), max_aspect=4.0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the recipe.

    Attributes:
        until: Step at which it ends.
        profiles: What scenes contain, each with its share.
        batch: Pictures per step.
        tiled_every: One step in so many uses tiled pictures (of large canvases); 0 for none.
        auxiliary: Weight of the auxiliary losses.
        text: Whether the backbone runs at all; without it only tower and connector learn, from
            the auxiliary losses, at half the cost.
        questions: About how many questions each picture comes with.
        weights: How often each kind of question is asked, where not as usual.
        repeated: Share of steps whose scenes know two colours or two shapes only, so that three and
            more things have one in common.
        exchanged: Share of the steps with named shapes and colours in which one of the two is
            exchanged before the backbone reads it, and only questions that do not name it are
            asked.
    """

    until: int
    profiles: tuple[tuple[Profile, float], ...]
    batch: int = 8
    tiled_every: int = 0
    auxiliary: float = 0.8
    text: bool = True
    questions: int = 12
    weights: tuple[tuple[str, float], ...] = ()
    repeated: float = 0.0
    exchanged: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what nano-vl becomes.

    Attributes:
        seed: Names the scenes.
        branch: Which of the runs this is that part at step `BRANCH_AT`; they see other scenes from
            there on.
        schedule: Steps and rates.
        stages: What is learnt when.
        average: Decay of the moving average of the weights, which is what comes out.
    """

    seed: int
    branch: int = 0
    schedule: Schedule
    stages: tuple[Stage, ...]
    average: float = 0.998

    def stage(self, step: int) -> Stage:
        """The stage of a step; the last one stays."""
        return next((s for s in self.stages if step < s.until), self.stages[-1])


STEPS = 20_000
"""Length of the recipe from nothing. It was not run to its end yet: docs/LOG.md has the lineage of
the embedded weights."""
BRANCH_AT = 9000
"""The step at which that recipe goes on in two runs, whose mean comes out."""
MORE_STEPS = 4000
"""Length of the recipe that goes on from the embedded weights, never run in its present form."""

_ALL = Profile(shapes=ALL_SHAPES, colours=ALL_COLOURS)
_ALL_NEAR = replace(_ALL, canvas=NEAR.canvas, max_aspect=NEAR.max_aspect)
_FOUR = replace(_ALL_NEAR, shapes=CORE_SHAPES)
_ONE = replace(_FOUR, canvas=(128, 176), max_aspect=1.4, things=(1, 2))
_FREE = replace(_ALL_NEAR, any_colour=1.0, striped=0.6)
_FREE_FOUR = replace(_FREE, shapes=CORE_SHAPES)
_BLOBS = replace(_ALL_NEAR, any_shape=1.0)
_SIGNS = replace(_ALL_NEAR, sign_probability=0.5, small_probability=0.2)

_SEEN = ((_FREE, 0.45), (_BLOBS, 0.15), (_ALL_NEAR, 0.2), (NEAR, 0.2))
_FEW = (
    (replace(NEAR, things=(1, 3)), 0.35),
    (replace(_ALL_NEAR, things=(1, 3)), 0.2),
    (replace(_FREE_FOUR, things=(1, 4)), 0.15),
    (replace(_BLOBS, colours=COLOURS, things=(1, 4)), 0.1),
    (CORE, 0.15),
    (_SIGNS, 0.05),
)
_MANY = (
    (NEAR, 0.1),
    (replace(NEAR, things=(4, 5)), 0.14),
    (CORE, 0.16),
    (replace(CORE, things=(4, 5)), 0.08),
    (_ALL, 0.05),
    (_ALL_NEAR, 0.1),
    (_FREE_FOUR, 0.07),
    (replace(_FREE_FOUR, things=(4, 5)), 0.09),
    (_FREE, 0.04),
    (replace(_BLOBS, colours=COLOURS), 0.08),
    (replace(_BLOBS, colours=COLOURS, things=(3, 5)), 0.1),
    (_SIGNS, 0.05),
)
_EVENLY = (
    ("colour", 25.0),
    ("shape", 15.0),
    ("exist", 4.0),
    ("count", 6.0),
    ("relation", 5.0),
    ("where", 2.0),
    ("sign", 1.0),
    ("describe", 0.5),
)
_COUNTING = (
    ("colour", 8.0),
    ("shape", 6.0),
    ("exist", 4.0),
    ("count", 10.0),
    ("relation", 3.0),
    ("where", 1.0),
    ("sign", 0.5),
    ("describe", 0.25),
)
_LAST = Stage(
    until=0,
    profiles=_MANY,
    tiled_every=8,
    weights=_COUNTING,
    repeated=0.5,
    exchanged=0.75,
)


def recipe(steps: int = STEPS, seed: int = 20261122, *, branch: int = 0) -> Recipe:
    """The recipe from nothing; a shorter one is the beginning of a longer one.

    The tower learns first, by itself: four shapes before all eight, with which it would stay near
    chance for long, and fills of any colour from the first step on, so that no colour comes to rule
    a shape out. Then everything learns together: what is seen, named and counted (docs/LOG.md). The
    rate stays high, as one that falls brings back what the exchange keeps away; the mean over the
    last steps, and of two runs that see other scenes from `BRANCH_AT` on, does what it should. Few
    pictures a step: their rows stay in the processor's cache.
    """
    return Recipe(
        seed=seed,
        branch=branch,
        schedule=Schedule(steps=steps, warmup=200, peak=6e-4, hold=10_000),
        average=0.999,
        stages=(
            Stage(
                until=1000, profiles=((_ONE, 0.5), (replace(_ONE, any_colour=1.0), 0.5)), text=False
            ),
            Stage(until=3400, profiles=((_FOUR, 0.5), (_FREE_FOUR, 0.5)), text=False),
            Stage(until=6000, profiles=_SEEN, text=False),
            Stage(
                until=9000,
                profiles=_FEW,
                tiled_every=16,
                questions=7,
                weights=_EVENLY,
                repeated=0.15,
                exchanged=0.3,
            ),
            replace(_LAST, until=steps, questions=10, repeated=0.4, exchanged=0.5),
        ),
    )


def recipe_more(steps: int = MORE_STEPS, seed: int = 20261124) -> Recipe:
    """The recipe that goes on from the embedded weights: the tower first, then everything."""
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=100, peak=6e-4),
        stages=(
            Stage(until=int(0.1 * steps), profiles=_SEEN, text=False),
            replace(_LAST, until=steps),
        ),
    )


class Batches(Dataset[SceneBatch]):
    """Step number to batch."""

    def __init__(self, plan: Recipe, tokenizer: str, images: ImageConfig) -> None:
        self.plan, self._tokenizer, self._images = plan, tokenizer, images
        self._encoder: SceneEncoder | None = None

    def __len__(self) -> int:
        return self.plan.schedule.steps

    def __getitem__(self, step: int) -> SceneBatch:
        if self._encoder is None:  # made in the worker process
            torch.set_num_threads(1)
            self._encoder = SceneEncoder(Tokenizer.from_str(self._tokenizer), self._images)
        plan, stage = self.plan, self.plan.stage(step)
        seed = plan.seed + (plan.branch if step >= BRANCH_AT else 0)
        rng = stream(seed, step, "train", "batch")
        tiled = stage.tiled_every > 0 and step % stage.tiled_every == 0
        profiles, weights = zip(*stage.profiles, strict=True)
        profile: Profile = rng.choices(profiles, weights)[0]
        if tiled:
            profile = replace(profile, canvas=(400, 1024), max_aspect=2.5)
        if stage.text and rng.random() < stage.repeated:
            profile = _narrowed(profile, rng)
        exchange = _exchange(profile, rng) if stage.text and stage.exchanged else None
        if exchange and rng.random() >= stage.exchanged:
            exchange = None
        # one canvas a step: views of equal size are attended to in one call
        profile = replace(profile, size=canvas(rng, profile))
        samples = [
            generate(
                seed,
                step * 64 + i,
                profile=profile,
                questions=2 * stage.questions if exchange else stage.questions,
                weights=_COUNTED if exchange else dict(stage.weights),
            )
            for i in range(max(1, stage.batch // 6) if tiled else stage.batch)
        ]
        if exchange:
            samples = [_without(sample, exchange.factor) for sample in samples]
        config = self._images if tiled else self._images.with_budget(max_tiles=1)
        return replace(self._encoder.batch(samples, config), exchange=exchange)


_COUNTED = {
    "count": 12.0,
    "exist": 4.0,
    **dict.fromkeys(("colour", "shape", "relation", "where", "sign", "describe"), 0.0),
}


def _exchange(profile: Profile, rng: Random) -> Exchange | None:
    """What to exchange in scenes of a profile; nothing where either factor has no names."""
    if profile.any_colour or profile.any_shape:
        return None
    factor: Factor = rng.choice(("shape", "colour"))
    names = ALL_SHAPES if factor == "shape" else ALL_COLOURS
    return Exchange.drawn(factor, len(names), rng)


def _without(sample: Sample, factor: Factor) -> Sample:
    """The sample with those of its counts and questions of existence that do not name a factor."""
    kept = [
        qa for qa in sample.questions if qa.kind in ("count", "exist") and factor not in qa.args
    ]
    return replace(sample, questions=tuple(kept))


def _narrowed(profile: Profile, rng: Random) -> Profile:
    """A profile with two of its colours, or two of its shapes."""
    if rng.random() < 0.5 and not profile.any_colour:
        return replace(profile, colours=tuple(rng.sample(profile.colours, 2)))
    return replace(profile, shapes=tuple(rng.sample(profile.shapes, 2)))
