"""nano-vl: the shapes of the embedded vision-language model, and how a recipe makes it.

`train` runs or resumes a recipe; `export` writes what was learnt in the official layout. The
recipes, the model itself, the data and the trainer live elsewhere.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lfm2_mm.config import BackboneConfig
from lfm2_mm.locate import locate
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.train.attention import plain_attention
from lfm2_mm.train.runs import CHECKPOINT
from lfm2_mm.train.trainer import Trainer
from lfm2_vision.config import ConnectorConfig, TowerConfig
from lfm2_vision.encoder import SelfAttention
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.losses import Auxiliary, answered, scene_loss
from lfm2_vision.model import VisionLanguageModel, config_dict
from lfm2_vision.nano_recipe import BRANCH_AT, Batches, Recipe
from lfm2_vision.quick import Quick
from lfm2_vision.scenes import CORE, Profile, build_tokenizer, generate
from lfm2_vision.tower_init import start_local
from lfm2_vision.training import SceneBatch, SceneEncoder, image_token_id

__all__ = ["build", "embedded", "export", "held_out_scores", "train", "train_branches"]

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

    trainer = Trainer(both, loss, plan.schedule, folder, average=plan.average)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")
    data = Batches(plan, tokenizer_files()["tokenizer.json"], IMAGES)
    end = min(until or len(data), len(data))
    source = _stream(data, trainer.step, workers)
    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        chunk = (next(source) for _ in range(stop - trainer.step))
        trainer.run(chunk, save_every=score_every, say=say)
        if not plan.stage(trainer.step - 1).text:
            continue  # nobody answers yet
        scores = held_out_scores(averaged(trainer, both))
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say("held out: " + " ".join(f"{kind} {score:.3f}" for kind, score in scores.items()))
    return averaged(trainer, both)


def train_branches(
    plans: Sequence[Recipe],
    folder: Path,
    *,
    until: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> VisionLanguageModel:
    """Run recipes that are one up to `BRANCH_AT`; the mean of what they make comes back.

    What they have in common is kept in the folder, each branch in `branch-N` below it, where
    another process may run it at the same time. Arguments as for `train`.
    """
    options: dict[str, Any] = {"workers": workers, "device": device, "say": say}
    trunk = train(plans[0], folder, until=min(until or BRANCH_AT, BRANCH_AT), **options)
    if until is not None and until <= BRANCH_AT:
        return trunk
    grown = [train_branch(plan, folder, until=until, **options) for plan in plans]
    mean = build()
    states = [model.state_dict() for model in grown]
    mean.load_state_dict(
        {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
    )
    return mean.eval()


def train_branch(plan: Recipe, folder: Path, **options: Any) -> VisionLanguageModel:
    """Run or resume one branch of a run whose first part is in the folder; see `train`."""
    own = folder / f"branch-{plan.branch}"
    own.mkdir(exist_ok=True)
    if not (own / CHECKPOINT).exists():
        shutil.copyfile(folder / CHECKPOINT, own / CHECKPOINT)
    return train(plan, own, **options)


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
