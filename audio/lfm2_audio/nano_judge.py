"""A second recogniser, of another seed and shape, that judges what nano-audio says.

It names the word in each row of what it hears, without a language model: it cannot guess what it
has not heard. It learnt single words and chains of them, never a sentence, in some twenty voices
and from the assistant's natural recordings, but never through the codec. It shares no weight with
nano-audio, and is no part of what the official code would load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm2_audio.config import ConformerConfig
from lfm2_audio.conformer import BatchNorm, Conformer
from lfm2_audio.griffin_lim import GriffinLimConfig
from lfm2_audio.losses import collapsed, row_loss
from lfm2_audio.nano import initialise
from lfm2_audio.nano_data import (
    MEL,
    analyse,
    data,
    foreign_accents,
    sound_classes,
    spoken_recordings,
    tokenizer,
)
from lfm2_audio.quick import equal_rows
from lfm2_audio.speech.augment import Augmentation
from lfm2_audio.speech.manifest import Utterance, record
from lfm2_audio.speech.questions import answer_words
from lfm2_audio.speech.sentences import lexicon, stream
from lfm2_audio.speech.synthesis import RATE, phonemes, resampled, synthesise
from lfm2_audio.speech.voices import Voice, voice
from lfm2_audio.training import Features, Mix, SpeechBatch, SpeechEncoder, normalised
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm.errors import ModelNotFound
from lfm2_mm.train.trainer import Schedule, Trainer

__all__ = [
    "FILE",
    "SAME_SOUND",
    "SEED",
    "STEPS",
    "Judge",
    "Verdict",
    "alike",
    "load_judge",
    "steady",
    "train_judge",
]

FILE = "judge/model.safetensors"
"""Where a folder of nano-audio keeps it."""

STEPS = 3000
"""Length of its recipe."""
SEED = 20261130
"""Of its weights and batches."""

SHAPE = ConformerConfig(
    n_mels=MEL.n_mels, hidden_size=96, ffn_size=256, n_layers=2, n_heads=4, kernel=9, channels=16
)
"""Of its encoder."""

SAME_SOUND = (
    ("are", "r"),
    ("b", "be"),
    ("no", "know"),
    ("t", "tea"),
    ("two", "to"),
    ("u", "you"),
)
"""Words that nobody can tell apart without a sentence; the first of each stands for both."""

_SOUNDS = 96
_CHANGE = 3.0  # nats that another word in the next row must be worth
_SHORTEST = 0.1  # seconds that can hold a word
_OWN = 3  # times that the assistant's own recordings are among the words
_LETTERS = 4  # times that letters are: they are short, and spelled ones much alike
_VOICES_EACH = 4  # in which words of answers are recorded
_VARIANTS = frozenset(
    "f1 f3 f4 f5 Alex Andrea Andy aunty belinda caleb linda Lee shelby steph steph3 anika grandma "
    "quincy klatt klatt4".split()
)
"""Voices that it hears: the higher ones of the training, among which is the assistant's."""


@dataclass(frozen=True)
class Verdict:
    """What was heard."""

    text: str


def alike(text: str) -> str:
    """A text in which the first of each `SAME_SOUND` stands for both."""
    first = {other: one for one, other in SAME_SOUND}
    return " ".join(first.get(word, word) for word in text.split())


def words() -> tuple[str, ...]:
    """What it can hear."""
    return (*lexicon(), *answer_words())


class Judge(nn.Module):
    """Rows of sound to words."""

    def __init__(self) -> None:
        super().__init__()
        self.conformer = Conformer(SHAPE)
        self.words = nn.Linear(SHAPE.hidden_size, len(words()) + 1)
        self.sounds = nn.Linear(SHAPE.hidden_size, _SOUNDS)

    def train(self, mode: bool = True) -> Judge:
        """Batch normalisation stays as at inference."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return self

    @torch.no_grad()
    def heard(self, mels: Sequence[NDArray[np.float32]]) -> list[str]:
        """Words in features before normalisation, each `[t, m]`; see `SAME_SOUND`."""
        rows = self.conformer([torch.from_numpy(normalised(mel).T) for mel in mels])
        known = words()
        pairs = torch.tensor([[1 + known.index(word) for word in pair] for pair in SAME_SOUND])
        found = []
        for part in rows:
            scores = self.words(part).log_softmax(-1)
            scores[:, pairs[:, 0]] = scores[:, pairs].logsumexp(-1)
            found.append(collapsed(steady(scores, _CHANGE)))
        return [" ".join(known[i - 1] for i in one) for one in found]

    def transcribe(self, source: Audio | Path | str | bytes) -> Verdict:
        """What is said in a recording; without sound, nothing."""
        if isinstance(source, Audio) and source.duration < _SHORTEST:
            return Verdict("")
        audio = read_audio(source, rate=RATE)
        return Verdict(self.heard([analyse(audio.samples.numpy())])[0])


def steady(scores: Float[Tensor, "t n"], change: float) -> Int[Tensor, " t"]:
    """The best path that pays for every change of class (Viterbi's algorithm, 1967).

    A word lasts several rows; what flickers up in one of them is no word.

    Args:
        scores: Log-probabilities, a row a step.
        change: What a change costs, in nats.
    """
    steps, classes = scores.shape
    if not steps:
        return torch.zeros(0, dtype=torch.long)
    total, stayed = scores[0], torch.arange(classes)
    before = []
    for row in scores[1:]:
        best, place = total.max(0)
        stays = total >= best - change
        before.append(torch.where(stays, stayed, place))
        total = torch.where(stays, total, best - change) + row
    path = [int(total.argmax())]
    for came_from in reversed(before):
        path.append(int(came_from[path[-1]]))
    return torch.tensor(path[::-1])


def load_judge(folder: Path) -> Judge:
    """The judge of a folder of nano-audio.

    Raises:
        ModelNotFound: if there is none.
    """
    path = folder / FILE
    if not path.is_file():
        raise ModelNotFound(
            f"{str(folder)!r} holds no {FILE}, the second recogniser; train one with "
            "lfm2-mm train nano-audio-judge"
        )
    judge = Judge()
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    judge.load_state_dict(state, strict=False)
    return judge.eval()


def save_judge(judge: Judge, folder: Path) -> Path:
    """Write its weights in bf16, without the head that names sounds."""
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in judge.state_dict().items()
        if not name.startswith("sounds.") and value.is_floating_point()
    }
    save_file(state, path, metadata={"format": "pt"})
    return path


class Chosen:
    """A choice of recordings as features; see `lfm2_audio.training.Spoken`."""

    def __init__(self, parts: Sequence[tuple[Features, int]]) -> None:
        self._parts = parts
        self.utterances = [features.utterances[i] for features, i in parts]

    def __len__(self) -> int:
        return len(self._parts)

    def frames(self, i: int) -> int:
        """How many frames an utterance has."""
        features, place = self._parts[i]
        return features.frames(place)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        features, place = self._parts[i]
        return features[place]


def lessons(folder: Path, *, say: Callable[[str], None] = print) -> SpeechEncoder:
    """Words in the voices that it learns from."""
    native, index = foreign_accents(), 0
    made = []
    for word in answer_words():
        for _ in range(_VOICES_EACH):
            who = voice(stream("judge", SEED, index))
            while who.variant not in _VARIANTS:
                index += 1
                who = voice(stream("judge", SEED, index))
            index += 1
            accent = native.get(word, who.accent)
            spoken = Voice(accent=accent, variant=who.variant, speed=who.speed, pitch=who.pitch)
            made.append(Utterance(text=word, kind="word", voice=spoken))
    more = Features(
        record(made, folder / "judge-words", speak=synthesise, say=say),
        folder / "judge-words",
        analyse,
    )
    train = data(folder, say=say)["train"]
    parts = [(more, i) for i in range(len(more))]
    for recordings, name in spoken_recordings(folder, say=say):
        own = Features(recordings, folder / name, _analysed)
        parts += [(own, i) for i in range(len(own))] * _OWN
    for i, one in enumerate(train.utterances):
        if one.kind == "word" and one.voice.variant in _VARIANTS:
            parts.append((train, i))
    letters = [part for part in parts if len(part[0].utterances[part[1]].text) == 1]
    parts += letters * (_LETTERS - 1)
    sounds = _sounds(folder, native)
    return SpeechEncoder(Chosen(parts), tokenizer(), sounds, words=words())


def _analysed(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    return analyse(resampled(wave, GriffinLimConfig().rate, RATE))


def _sounds(folder: Path, native: dict[str, str]) -> dict[str, list[int]]:
    """Sounds of every word as numbers from 1; those of answers' words come behind."""
    found = dict(sound_classes(folder))
    first = max(max(numbers) for numbers in found.values()) + 1
    spoken = {word: phonemes(word, native.get(word, "en-us")) for word in answer_words()}
    names = sorted({sound for sounds in spoken.values() for sound in sounds})
    # the same sound may have two numbers; it is only asked so that words are found sooner
    for word, sounds in spoken.items():
        found[word] = [min(first + names.index(sound), _SOUNDS - 1) for sound in sounds]
    return found


def judge_loss(judge: Judge, batch: SpeechBatch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the word and the sound of each row.

    No CTC: before most words are known it undoes what rows have learnt (docs/LOG.md).
    """
    rows = equal_rows(judge.conformer, batch.mel)
    logits = judge.words(rows).float()
    total, right = row_loss(logits, batch.row_words)
    sounds, sounds_right = row_loss(judge.sounds(rows).float(), batch.row_sounds)
    parts = {"rows": float(total.detach()), "rows_right": right, "sounds_right": sounds_right}
    return total + sounds, parts


def train_judge(
    folder: Path,
    data_folder: Path,
    *,
    steps: int = STEPS,
    seed: int = SEED,
    until: int | None = None,
    say: Callable[[str], None] = print,
) -> Judge:
    """Run its recipe, or go on with the folder's checkpoint; averaged weights.

    Args:
        folder: Where checkpoints and logs go.
        data_folder: Where recordings are.
        steps: Length of the recipe.
        seed: Of weights and batches.
        until: Step to stop at.
        say: Where progress goes.
    """
    encoder = lessons(data_folder, say=say)
    torch.manual_seed(seed)
    judge = Judge()
    initialise(judge)

    def loss(batch: SpeechBatch) -> tuple[Tensor, dict[str, float]]:
        return judge_loss(judge, batch)

    trainer = Trainer(judge, loss, Schedule(steps=steps, warmup=40, peak=3e-3), folder)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")
    mild = Augmentation(warp=0.04, noise=0.3, tilt=4.0, time_masks=0, mel_masks=1)

    def batches(end: int) -> Iterator[SpeechBatch]:
        for step in range(trainer.step, end):
            longest = 2 if step < steps // 10 else 4
            yield encoder.step(
                seed, step, Mix(chains=1.0, chain=longest, batch=16, augmentation=mild)
            )

    end = min(until or steps, steps)
    if trainer.step < end:
        trainer.run(batches(end), save_every=100, say=say)
    copy = Judge()
    state = {name: value.detach().float().cpu() for name, value in trainer.averaged().items()}
    copy.load_state_dict(state, strict=False)
    return copy.eval()
