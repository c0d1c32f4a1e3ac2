"""nano-vl: the shapes and the recipe of the embedded vision-language model.

`train` runs or resumes the recipe; `export` writes what was learnt in the official layout. Every
batch is a pure function of (recipe, step). The model itself, the data and the trainer live
elsewhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lfm2_mm.config import BackboneConfig
from lfm2_mm.locate import locate
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.train.attention import plain_attention
from lfm2_mm.train.trainer import Schedule, Trainer
from lfm2_vision.config import ConnectorConfig, TowerConfig
from lfm2_vision.encoder import SelfAttention
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.losses import Auxiliary, answered, scene_loss
from lfm2_vision.model import VisionLanguageModel, config_dict
from lfm2_vision.quick import Quick
from lfm2_vision.scenes import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    CORE,
    CORE_SHAPES,
    Profile,
    build_tokenizer,
    canvas,
    generate,
    stream,
)
from lfm2_vision.tower_init import start_local
from lfm2_vision.training import SceneBatch, SceneEncoder, image_token_id

__all__ = [
    "MORE_STEPS",
    "STEPS",
    "Recipe",
    "Stage",
    "build",
    "embedded",
    "export",
    "held_out_scores",
    "recipe",
    "recipe_more",
    "train",
]

TOWER = TowerConfig(hidden_size=128, ffn_size=384, n_layers=6, n_heads=4, patch_size=8, grid=16)
CONNECTOR = ConnectorConfig(hidden_size=256, layer_norm=False)
BACKBONE = BackboneConfig(
    vocab_size=1024,
    hidden_size=192,
    ffn_size=384,
    layer_types=(
        *("conv", "conv", "full_attention", "conv"),
        *("full_attention", "conv", "full_attention"),
    ),
    n_heads=6,
    n_kv_heads=2,
    head_dim=32,
    max_positions=4096,
    eos_ids=(7,),
)
IMAGES = ImageConfig(
    patch_size=8,
    tile_size=128,
    max_tiles=6,
    min_image_tokens=64,
    max_image_tokens=128,
    max_pixels_tolerance=7.875,
)
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
    """

    until: int
    profiles: tuple[tuple[Profile, float], ...]
    batch: int = 24
    tiled_every: int = 0
    auxiliary: float = 0.5
    text: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what nano-vl becomes.

    Attributes:
        seed: Names the scenes.
        schedule: Steps and rates.
        stages: What is learnt when.
        questions: About how many questions each picture comes with.
        weights: How often each kind is asked, where not as usual.
        repeated: Share of steps whose scenes know two colours or two shapes only, so that three and
            more things have one in common.
    """

    seed: int
    schedule: Schedule
    stages: tuple[Stage, ...]
    questions: int = 10
    weights: tuple[tuple[str, float], ...] = ()
    repeated: float = 0.0

    def stage(self, step: int) -> Stage:
        """The stage of a step; the last one stays."""
        return next((s for s in self.stages if step < s.until), self.stages[-1])


STEPS = 9000
"""Length of the recipe from nothing. It was never run to its end: docs/LOG.md has the lineage."""
MORE_STEPS = 7000
"""Length of the recipe that goes on from the embedded weights."""

_ALL = Profile(shapes=ALL_SHAPES, colours=ALL_COLOURS)
_ALL_NEAR = replace(_ALL, canvas=NEAR.canvas, max_aspect=NEAR.max_aspect)
_FEW = replace(_ALL_NEAR, shapes=CORE_SHAPES, things=(1, 3))
_MIXED = (
    (NEAR, 0.25),
    (CORE, 0.2),
    (_ALL, 0.2),
    (_ALL_NEAR, 0.25),
    (replace(_ALL_NEAR, sign_probability=0.5, small_probability=0.2), 0.1),
)
_FREE = replace(_ALL_NEAR, any_colour=1.0, striped=0.6)
_BLOBS = replace(_ALL_NEAR, any_shape=1.0)
_FREER = (
    (NEAR, 0.1),
    (replace(NEAR, things=(4, 5)), 0.12),
    (CORE, 0.2),
    (_ALL, 0.05),
    (_ALL_NEAR, 0.1),
    (replace(_FREE, shapes=CORE_SHAPES), 0.07),
    (replace(_FREE, shapes=CORE_SHAPES, things=(4, 5)), 0.09),
    (_FREE, 0.04),
    (replace(_BLOBS, colours=COLOURS), 0.08),
    (replace(_BLOBS, colours=COLOURS, things=(3, 5)), 0.1),
    (replace(_ALL_NEAR, sign_probability=0.5, small_probability=0.2), 0.05),
)


def recipe(steps: int = STEPS, seed: int = 20261122) -> Recipe:
    """The recipe from nothing, stretched to so many steps.

    Shapes are learnt in all colours, of which the core domain names seven: a tower that sees the
    core alone learns that a shape it never saw in blue cannot be blue. Four shapes come first:
    with eight at once the tower stays near chance for long (docs/LOG.md).
    """
    four = replace(_ALL_NEAR, shapes=CORE_SHAPES)
    one = replace(four, canvas=(128, 176), max_aspect=1.4, things=(1, 2))
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=150, peak=1e-3),
        stages=(
            Stage(until=int(0.04 * steps), profiles=((one, 1.0),), auxiliary=1.0, text=False),
            Stage(until=int(0.13 * steps), profiles=((four, 1.0),), auxiliary=1.0, text=False),
            Stage(until=int(0.18 * steps), profiles=((_ALL_NEAR, 1.0),), auxiliary=1.0, text=False),
            Stage(until=int(0.28 * steps), profiles=((_FEW, 0.6), (_ALL_NEAR, 0.4))),
            Stage(until=int(0.8 * steps), profiles=_MIXED, tiled_every=8),
            Stage(until=steps, profiles=_MIXED, tiled_every=5, auxiliary=0.25),
        ),
    )


def recipe_more(steps: int = MORE_STEPS, seed: int = 20261124) -> Recipe:
    """The recipe that goes on from the embedded weights: the tower first, then everything.

    Things of any colour at all keep the tower from learning that some colour rules out a shape.
    Few pictures a step: their rows stay in the processor's cache, which makes each cheaper.
    """
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=100, peak=6e-4),
        questions=12,
        repeated=0.5,
        weights=(
            ("shape", 4.0),
            ("exist", 4.0),
            ("count", 12.0),
            ("relation", 3.0),
            ("where", 1.0),
            ("sign", 0.5),
            ("describe", 0.25),
        ),
        stages=(
            Stage(
                until=int(0.1 * steps),
                profiles=((_FREE, 0.45), (_BLOBS, 0.15), (_ALL_NEAR, 0.2), (NEAR, 0.2)),
                batch=8,
                auxiliary=1.0,
                text=False,
            ),
            Stage(until=int(0.85 * steps), profiles=_FREER, batch=8, tiled_every=8, auxiliary=0.8),
            Stage(until=steps, profiles=_FREER, batch=8, tiled_every=6, auxiliary=0.5),
        ),
    )


@cache
def tokenizer_files() -> dict[str, str]:
    """Names and contents of nano-vl's tokenizer files."""
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(folder)
        return {path.name: path.read_text() for path in sorted(Path(folder).iterdir())}


def build(seed: int = 0) -> VisionLanguageModel:
    """An untrained nano-vl."""
    torch.manual_seed(seed)
    model = VisionLanguageModel(TOWER, CONNECTOR, BACKBONE)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=0.3)
    start_local(model.vision_tower)
    return model


def embedded() -> VisionLanguageModel:
    """The nano-vl that ships with the package, in fp32."""
    model = build()
    folder = locate("nano-vl").folder
    state = {
        name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


class Batches(Dataset[SceneBatch]):
    """Step number to batch."""

    def __init__(self, plan: Recipe, tokenizer: str) -> None:
        self.plan, self._tokenizer = plan, tokenizer
        self._encoder: SceneEncoder | None = None

    def __len__(self) -> int:
        return self.plan.schedule.steps

    def __getitem__(self, step: int) -> SceneBatch:
        if self._encoder is None:  # made in the worker process
            torch.set_num_threads(1)
            self._encoder = SceneEncoder(Tokenizer.from_str(self._tokenizer), IMAGES)
        plan, stage = self.plan, self.plan.stage(step)
        rng = stream(plan.seed, step, "train", "batch")
        tiled = stage.tiled_every > 0 and step % stage.tiled_every == 0
        profiles, weights = zip(*stage.profiles, strict=True)
        profile: Profile = rng.choices(profiles, weights)[0]
        if tiled:
            profile = replace(profile, canvas=(400, 1024), max_aspect=2.5)
        if rng.random() < plan.repeated:
            profile = _narrowed(profile, rng)
        # one canvas a step: views of equal size are attended to in one call
        profile = replace(profile, size=canvas(rng, profile))
        samples = [
            generate(
                plan.seed,
                step * 64 + i,
                profile=profile,
                questions=plan.questions,
                weights=dict(plan.weights),
            )
            for i in range(max(1, stage.batch // 6) if tiled else stage.batch)
        ]
        config = IMAGES if tiled else IMAGES.with_budget(max_tiles=1)
        return self._encoder.batch(samples, config)


def _narrowed(profile: Profile, rng: Random) -> Profile:
    """A profile with two of its colours, or two of its shapes."""
    if rng.random() < 0.5 and not profile.any_colour:
        return replace(profile, colours=tuple(rng.sample(profile.colours, 2)))
    return replace(profile, shapes=tuple(rng.sample(profile.shapes, 2)))


def _unbatched(batch: Any) -> Any:
    return batch


def _stream(data: Batches, start: int, workers: int) -> Iterator[SceneBatch]:
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, len(data)),
        num_workers=workers,
        collate_fn=_unbatched,
        prefetch_factor=8 if workers else None,
    )
    yield from loader


def _quicken(model: VisionLanguageModel) -> Quick:
    """The forward passes in compiled pieces, with the attention that trains fast on a CPU."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = plain_attention
    return Quick(model.vision_tower, model.language_model)


class _Training(nn.Module):
    """The model and its auxiliary heads under one roof, for one optimizer."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = Auxiliary(TOWER.hidden_size, BACKBONE.hidden_size)


def held_out_scores(
    model: VisionLanguageModel, *, count: int = 200, profile: Profile = CORE, seed: int = 7
) -> dict[str, float]:
    """Quick held-out exact match per kind, for the log; the evaluation proper is in the evals."""
    encoder = SceneEncoder(Tokenizer.from_str(tokenizer_files()["tokenizer.json"]), IMAGES)
    right: dict[str, list[bool]] = {}
    for i in range(count):
        sample = generate(seed, i, split="held_out", profile=profile)
        for kind, good in answered(model, encoder.batch([sample])):
            right.setdefault(kind, []).append(good)
    return {kind: sum(goods) / len(goods) for kind, goods in sorted(right.items())}


def train(
    plan: Recipe,
    folder: Path,
    *,
    until: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    start: VisionLanguageModel | None = None,
    score_every: int = 1000,
    say: Callable[[str], None] = print,
) -> VisionLanguageModel:
    """Run the recipe, or resume it from the folder's checkpoint; the averaged model comes back.

    Args:
        plan: The recipe.
        folder: Where checkpoints and logs go.
        until: Step to stop at.
        workers: Processes that make data.
        device: Where to run.
        start: Weights to begin with; by default untrained ones.
        score_every: Steps between two scorings, each after a checkpoint.
        say: Where progress goes.
    """
    both = _Training(start or build(plan.seed)).to(device)
    quick = _quicken(both.model)

    def loss(batch: SceneBatch) -> tuple[Tensor, dict[str, float]]:
        stage = plan.stage(trainer.step)
        return scene_loss(
            both.model,
            both.auxiliary,
            batch,
            weight=stage.auxiliary,
            text=stage.text,
            quick=quick,
        )

    trainer = Trainer(both, loss, plan.schedule, folder)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")
    data = Batches(plan, tokenizer_files()["tokenizer.json"])
    end = min(until or len(data), len(data))
    source = _stream(data, trainer.step, workers)
    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        chunk = (next(source) for _ in range(stop - trainer.step))
        trainer.run(chunk, save_every=score_every, say=say)
        scores = held_out_scores(averaged(trainer, both))
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say("held out: " + " ".join(f"{kind} {score:.3f}" for kind, score in scores.items()))
    return averaged(trainer, both)


def averaged(trainer: Trainer, both: nn.Module) -> VisionLanguageModel:
    """A copy of the model that holds the averaged weights."""
    copy = build()
    wanted = {
        name.removeprefix("model."): value.detach().float().cpu()
        for name, value in trainer.averaged().items()
        if name.startswith("model.")
    }
    copy.load_state_dict(wanted, strict=True)
    return copy.eval()


def export(model: VisionLanguageModel, folder: Path) -> None:
    """Write a checkpoint in the official layout, in bf16."""
    tokenizer = tokenizer_files()
    image_id = image_token_id(Tokenizer.from_str(tokenizer["tokenizer.json"]))
    state = {}
    for name, value in model.state_dict().items():
        stored = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        state[f"model.{stored}"] = value.to(torch.bfloat16)
    config = config_dict(TOWER, CONNECTOR, BACKBONE, image_token_id=image_id, dtype="bfloat16")
    generation = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    processor = {"image_processor": IMAGES.to_dict(), "processor_class": "Lfm2VlProcessor"}
    save_checkpoint(
        folder,
        state,
        config,
        extra_files={
            **tokenizer,
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
            "processor_config.json": json.dumps(processor, indent=2) + "\n",
        },
    )
