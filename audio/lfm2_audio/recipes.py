"""What the audio frontend adds to `train`: the nano-audio recipe, from espeak-ng to export.

Imported for `--help`, so nothing here imports torch before a recipe runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lfm2_mm.cli.plugins import Recipe
from lfm2_mm.train.runs import begin_run, note_run

__all__ = [
    "RECIPES",
    "train_nano_answers",
    "train_nano_audio",
    "train_nano_judge",
    "train_nano_voice",
]


def train_nano_audio(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    more: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train the embedded speech model, or go on with the folder's checkpoint; export to `model`.

    Recordings are made first, by the program espeak-ng, and kept in `data` below the folder; so are
    their features. With `more` a new run begins with the embedded weights instead of untrained
    ones. `workers` is not used: features are disturbed in the training process.

    Raises:
        MissingExtra: if espeak-ng is not installed and recordings are missing.
        InputError: if the folder's run has another length or seed.
    """
    from lfm2_audio import nano

    length, chosen = begin_run(
        folder,
        steps=steps,
        seed=seed,
        fresh=fresh,
        length=nano.MORE_STEPS if more else nano.STEPS,
    )
    make = nano.recipe_more if more else nano.recipe
    plan = make(length) if chosen is None else make(length, chosen)
    start, voice = nano.embedded() if more else (None, None)
    note_run(folder, steps=length, seed=plan.seed)
    say(f"nano-audio: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint to go on from")
    model = nano.train(plan, folder, until=until, device=device, start=start, say=say)
    nano.export(model, folder / "model", nano.codec(folder / "data", say=say), voice)
    return folder / "model"


def train_nano_voice(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Teach the embedded speech model to read aloud, or go on with the folder's checkpoint.

    It trains on the CPU, whatever `device` says: a step is too small to gain from another one.

    Raises:
        MissingExtra: if espeak-ng is not installed and recordings are missing.
        InputError: if the folder's run has another length or seed.
    """
    from lfm2_audio import nano, nano_voice

    length, chosen = _started(folder, nano_voice.STEPS, nano_voice.SEED, steps, seed, fresh)
    say(f"nano-audio's voice: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint")
    data = folder / "data"
    model = nano_voice.train_voice(
        nano_voice.Speaker(*nano.embedded()),
        folder,
        data,
        steps=length,
        seed=chosen,
        until=until,
        say=say,
    )
    nano.export(model.hearing, folder / "model", nano.codec(data, say=say), model.voice)
    return folder / "model"


def train_nano_answers(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Teach the embedded speech model to answer spoken questions, or go on with a checkpoint.

    It trains on the CPU, whatever `device` says: a step is too small to gain from another one.

    Raises:
        MissingExtra: if espeak-ng is not installed and recordings are missing.
        InputError: if the folder's run has another length or seed.
    """
    from lfm2_audio import nano, nano_answers, nano_voice

    length, chosen = _started(folder, nano_answers.STEPS, nano_answers.SEED, steps, seed, fresh)
    say(f"nano-audio's answers: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint")
    data = folder / "data"
    model = nano_answers.train_answers(
        nano_voice.Speaker(*nano.embedded()),
        folder,
        data,
        steps=length,
        seed=chosen,
        until=until,
        say=say,
    )
    nano.export(model.hearing, folder / "model", nano.codec(data, say=say), model.voice)
    return folder / "model"


def train_nano_judge(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train the second recogniser, or go on with the folder's checkpoint; it goes to `judge`.

    Raises:
        MissingExtra: if espeak-ng is not installed and recordings are missing.
        InputError: if the folder's run has another length or seed.
    """
    from lfm2_audio import nano_judge

    length, chosen = _started(folder, nano_judge.STEPS, nano_judge.SEED, steps, seed, fresh)
    say(f"nano-audio's judge: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint")
    judge = nano_judge.train_judge(
        folder, folder / "data", steps=length, seed=chosen, until=until, say=say
    )
    return nano_judge.save_judge(judge, folder)


RECIPES: Mapping[str, Recipe] = {
    "nano-audio": train_nano_audio,
    "nano-audio-more": partial(train_nano_audio, more=True),
    "nano-audio-voice": train_nano_voice,
    "nano-audio-answers": train_nano_answers,
    "nano-audio-judge": train_nano_judge,
}
"""By name."""


def _started(
    folder: Path, length: int, of: int, steps: int | None, seed: int | None, fresh: bool
) -> tuple[int, int]:
    """Length and seed of a run that begins or goes on; `length` and `of` where nothing says."""
    length, chosen = begin_run(folder, steps=steps, seed=seed, fresh=fresh, length=length)
    seed = of if chosen is None else chosen
    note_run(folder, steps=length, seed=seed)
    return length, seed
