"""nano-audio: the shapes and the recipe of the embedded speech model.

`train` runs or resumes the recipe. Every batch is a pure function of (recipe, step). The model's
parts, the data and the losses live elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lfm2_audio.adapter import Adapter
from lfm2_audio.checkpoint import (
    ADAPTER,
    AUDIO_EMBEDDING,
    CONFORMER,
    DEPTHFORMER,
    official_state,
)
from lfm2_audio.config import AudioConfig, ConformerConfig, DepthformerConfig
from lfm2_audio.conformer import BatchNorm, Conformer
from lfm2_audio.depthformer import Depthformer
from lfm2_audio.frames import FrameEmbedding
from lfm2_audio.griffin_lim import FOLDER, GriffinLim
from lfm2_audio.losses import WordHead, ctc_loss, row_loss, text_loss
from lfm2_audio.nano_data import (
    BOOKS,
    CARD,
    MEL,
    SOUNDS,
    codec,
    data,
    files,
    sound_classes,
    tokenizer,
    word_tokens,
)
from lfm2_audio.nano_scores import held_out_scores
from lfm2_audio.quick import equal_rows
from lfm2_audio.speech.augment import Augmentation
from lfm2_audio.speech.tokenizer import VOCABULARY
from lfm2_audio.training import Mix, SpeechBatch, SpeechEncoder
from lfm2_mm.backbone import Backbone
from lfm2_mm.config import BackboneConfig
from lfm2_mm.locate import locate
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.train.trainer import Schedule, Trainer

__all__ = [
    "CONFIG",
    "MORE_STEPS",
    "STEPS",
    "Recipe",
    "Recogniser",
    "Stage",
    "Voice",
    "build",
    "codec",
    "embedded",
    "export",
    "initialise",
    "recipe",
    "recipe_more",
    "train",
]

CONFIG = AudioConfig(
    preprocessor=MEL,
    encoder=ConformerConfig(
        n_mels=MEL.n_mels,
        hidden_size=128,
        ffn_size=512,
        n_layers=5,
        n_heads=4,
        kernel=9,
        channels=32,
    ),
    backbone=BackboneConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        ffn_size=320,
        layer_types=("conv", "full_attention", "conv", "full_attention", "conv"),
        n_heads=5,
        n_kv_heads=5,
        head_dim=32,
        max_positions=512,
        eos_ids=(7,),
    ),
    depthformer=DepthformerConfig(layers=2, dim=64),
    codebooks=BOOKS,
)
"""Shapes of nano-audio."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the recipe.

    Attributes:
        until: Step at which it ends.
        mix: What batches hold.
        rows: Weight of the loss of rows whose word is known.
        sounds: Weight of the loss of rows whose sound is known.
        ctc: Weight of the CTC loss.
        text: Weight of the text; without it the backbone does not run.
    """

    until: int
    mix: Mix
    rows: float = 1.0
    sounds: float = 0.5
    ctc: float = 1.0
    text: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what nano-audio becomes."""

    seed: int
    schedule: Schedule
    stages: tuple[Stage, ...]

    def stage(self, step: int) -> Stage:
        """The stage of a step; the last one stays."""
        return next((s for s in self.stages if step < s.until), self.stages[-1])


MILD = Augmentation(warp=0.03, noise=0.2, snr=(20.0, 40.0), tilt=3.0, time_masks=0, mel_masks=0)
"""How the first stage is disturbed."""

STEPS = 2800
"""Length of the recipe from nothing: about half an hour on one core with AMX that is free."""
MORE_STEPS = 3000
"""Length of the recipe that goes on from the embedded weights."""


def recipe(steps: int = STEPS, seed: int = 20261121) -> Recipe:
    """The recipe of recognition, stretched to so many steps.

    Single words come first, then chains of them, because there the word of every row is known and
    no alignment has to be found; then sentences by CTC; then the backbone reads what came of it.
    CTC before most words are known undoes what rows have learnt (docs/LOG.md).
    """
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=150, peak=2e-3),
        stages=(
            Stage(
                until=int(0.11 * steps),
                mix=Mix(chains=1.0, chain=3, augmentation=MILD),
                sounds=1.0,
                ctc=0.0,
            ),
            Stage(until=int(0.29 * steps), mix=Mix(chains=1.0, chain=4), sounds=1.0, ctc=0.0),
            Stage(until=int(0.58 * steps), mix=Mix(chains=0.4, chain=5), ctc=0.3),
            Stage(until=int(0.85 * steps), mix=Mix(chains=0.12, chain=5), ctc=0.5, text=0.6),
            Stage(until=steps, mix=Mix(chains=0.08, chain=5), rows=0.5, ctc=0.5, text=1.0),
        ),
    )


def recipe_more(steps: int = MORE_STEPS, seed: int = 20261122) -> Recipe:
    """The recipe that goes on from the embedded weights: sentences, heard and written."""
    return Recipe(
        seed=seed,
        schedule=Schedule(steps=steps, warmup=100, peak=1e-3),
        stages=(
            Stage(until=int(0.8 * steps), mix=Mix(chains=0.12, chain=5), ctc=0.5, text=0.6),
            Stage(until=steps, mix=Mix(chains=0.08, chain=5), rows=0.5, ctc=0.5, text=1.0),
        ),
    )


class Recogniser(nn.Module):
    """The parts of nano-audio that hear and write, under their official names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conformer = Conformer(CONFIG.encoder)
        self.audio_adapter = Adapter(CONFIG.encoder.hidden_size, CONFIG.backbone.hidden_size)
        self.lfm = Backbone(CONFIG.backbone)
        self.head = WordHead(CONFIG.backbone.hidden_size, word_tokens())
        self.sounds = nn.Linear(CONFIG.encoder.hidden_size, SOUNDS)

    def train(self, mode: bool = True) -> Recogniser:
        """Batch normalisation stays as at inference: a scale and an offset that are learnt."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return self


class Voice(nn.Module):
    """The parts of nano-audio that speak."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frames = FrameEmbedding(CONFIG)
        self.depthformer = Depthformer(CONFIG)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


def build(seed: int = 0) -> Recogniser:
    """An untrained recogniser."""
    torch.manual_seed(seed)
    model = Recogniser()
    initialise(model)
    nn.init.normal_(model.head.blank, std=0.05)
    return model


def initialise(model: nn.Module) -> None:
    """Begin anew: the scale of every weight, so that what is heard is passed on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # what blocks add begins small beside what passes them
            small = name.endswith(("out_proj", "w2", "linear_out", "linear2"))
            nn.init.normal_(module.weight, std=(0.4 if small else 0.8) * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        elif isinstance(module, nn.Conv2d):
            # what is heard must not drown in what is always there
            fan = module.in_channels // module.groups * module.kernel_size[0] ** 2
            nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d) and module.groups > 1:
            nn.init.normal_(module.weight, std=module.kernel_size[0] ** -0.5)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=0.8 * module.in_channels**-0.5)


def embedded() -> tuple[Recogniser, Voice]:
    """What hears and what speaks in the nano-audio that ships with the package, in fp32."""
    stored = load_file(locate("nano-audio").folder / "model.safetensors")
    hearing, voice = build(), Voice()
    _read(hearing, stored, {"": ""}, leave=("head.", "sounds."))
    _read(voice, stored, {"frames.": AUDIO_EMBEDDING, "depthformer.": DEPTHFORMER})
    return hearing, voice


def _read(
    module: nn.Module,
    stored: Mapping[str, Tensor],
    prefixes: Mapping[str, str],
    leave: tuple[str, ...] = (),
) -> None:
    """Fill a module from stored tensors; what the official layout stores otherwise is reshaped."""
    found = {}
    for name, own in module.state_dict().items():
        if not name.startswith(leave):
            prefix = next(p for p in prefixes if name.startswith(p))
            found[name] = stored[prefixes[prefix] + name.removeprefix(prefix)].float().view_as(own)
    module.load_state_dict(found, strict=not leave)


def speech_loss(
    model: Recogniser, batch: SpeechBatch, stage: Stage
) -> tuple[Tensor, dict[str, float]]:
    """The losses of a stage, and what to log of them."""
    encoded = equal_rows(model.conformer, batch.mel)
    rows = model.audio_adapter(encoded.flatten(0, 1)).view(*batch.row_words.shape, -1)
    logits = model.head(rows, model.lfm.embed_tokens.weight)
    total, right = row_loss(logits, batch.row_words)
    sounds, sounds_right = row_loss(model.sounds(encoded).float(), batch.row_sounds)
    parts = {"rows": float(total.detach()), "rows_right": right, "sounds_right": sounds_right}
    total = stage.rows * total + stage.sounds * sounds
    if stage.ctc:
        loss = ctc_loss(logits, batch)
        total, parts["ctc"] = total + stage.ctc * loss, float(loss.detach())
    if stage.text:
        counts = torch.full((len(rows),), rows.shape[1], device=rows.device)
        loss = text_loss(model.lfm, rows, counts, batch)
        total, parts["text"] = total + stage.text * loss, float(loss.detach())
    return total, parts


def train(
    plan: Recipe,
    folder: Path,
    *,
    until: int | None = None,
    device: str = "cpu",
    start: Recogniser | None = None,
    score_every: int = 500,
    say: Callable[[str], None] = print,
) -> Recogniser:
    """Run the recipe, or resume it from the folder's checkpoint; the averaged model comes back.

    Args:
        plan: The recipe.
        folder: Where data, checkpoints and logs go.
        until: Step to stop at.
        device: Where to run.
        start: Weights to begin with; by default untrained ones.
        score_every: Steps between two scorings, each after a checkpoint.
        say: Where progress goes.
    """
    sets = data(folder / "data", say=say)
    model = (start or build(plan.seed)).to(device)

    def loss(batch: SpeechBatch) -> tuple[Tensor, dict[str, float]]:
        return speech_loss(model, batch.to(device), plan.stage(trainer.step))

    trainer = Trainer(model, loss, plan.schedule, folder)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")
    sounds = sound_classes(folder / "data")
    encoder = SpeechEncoder(sets["train"], tokenizer(), sounds, factor=CONFIG.encoder.factor)
    total = plan.schedule.steps
    end = min(until or total, total)

    def batches(stop: int) -> Iterator[SpeechBatch]:
        for step in range(trainer.step, stop):
            yield encoder.step(plan.seed, step, plan.stage(step).mix)

    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        trainer.run(batches(stop), save_every=score_every, say=say)
        text = plan.stage(trainer.step - 1).text > 0
        scores = held_out_scores(averaged(trainer), sets, text=text)
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say("held out: " + " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    return averaged(trainer)


def averaged(trainer: Trainer) -> Recogniser:
    """A copy of the model that holds the averaged weights."""
    copy = build()
    state = {name: value.detach().float().cpu() for name, value in trainer.averaged().items()}
    copy.load_state_dict(state, strict=False)
    return copy.eval()


def export(
    model: Recogniser, folder: Path, speech_codec: GriffinLim, voice: Voice | None = None
) -> None:
    """Write a checkpoint in the official layout, in bf16, with its codec.

    Args:
        model: What hears and writes.
        folder: Where to write.
        speech_codec: What makes codes audible.
        voice: What speaks; an untrained one by default, which is what a model that only hears has.
    """
    voice = voice or Voice()
    state = official_state(
        model.lfm.state_dict(),
        {
            CONFORMER: model.conformer.state_dict(),
            ADAPTER: model.audio_adapter.state_dict(),
            AUDIO_EMBEDDING: voice.frames.state_dict(),
            DEPTHFORMER: voice.depthformer.state_dict(),
        },
    )
    tokens = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    generation = {**tokens, "audio_temperature": 0.0}  # one voice: the likeliest code is the best
    save_checkpoint(
        folder,
        {name: value.to(torch.bfloat16) for name, value in state.items()},
        CONFIG.to_dict(),
        extra_files={
            **files(),
            "README.md": CARD,
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
        },
    )
    speech_codec.save(folder / FOLDER)
