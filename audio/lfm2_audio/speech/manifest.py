"""Which utterances there are, and a folder that keeps their sound: made once, read as memory maps.

A list of utterances is a pure function of (name, count, seed). Training names its words and
sentences here, the evaluation its three held-out sets; no list shares a sentence-and-voice split
with training that it is meant to be held out by. Knows no features and no batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfm2_audio.speech.sentences import Split, lexicon, sentence, stream
from lfm2_audio.speech.synthesis import synthesise
from lfm2_audio.speech.voices import Voice, voice

__all__ = ["EVAL_SEED", "EVAL_SETS", "Recordings", "Utterance", "evaluation", "record", "training"]

EVAL_SETS: dict[str, tuple[Split, Split]] = {
    "voices": ("train", "held_out"),
    "sentences": ("held_out", "train"),
    "both": ("held_out", "held_out"),
}
"""Held-out sets: the split of their sentences and that of their voices."""

EVAL_SEED = 20261121
"""Names the held-out sentences; fixed before anything was trained."""

_MANIFEST, _WAVES = "manifest.jsonl", "waves.i16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """What is said, by whom.

    Attributes:
        kind: `word`, or the kind of the sentence.
    """

    text: str
    kind: str
    voice: Voice


def training(count: int, *, seed: int = 0, word_share: float = 0.25) -> list[Utterance]:
    """Utterances of the training splits: single words first, each as often, then sentences."""
    words = lexicon()
    made = []
    for i in range(count):
        who = voice(stream("voice", seed, i, "train"))
        if i < int(word_share * count):
            made.append(Utterance(text=words[i % len(words)], kind="word", voice=who))
        else:
            text, kind = sentence(seed, i)
            made.append(Utterance(text=text, kind=kind, voice=who))
    return made


def evaluation(name: str, count: int, *, seed: int = EVAL_SEED) -> list[Utterance]:
    """A held-out set, by its name in `EVAL_SETS`; no sentence occurs twice."""
    sentences, voices = EVAL_SETS[name]
    made: dict[str, Utterance] = {}
    i = 0
    while len(made) < count:
        text, kind = sentence(seed, i, sentences)
        who = voice(stream("voice", seed, i, name), voices)
        made.setdefault(text, Utterance(text=text, kind=kind, voice=who))
        i += 1
    return list(made.values())


class Recordings:
    """A folder of recorded utterances: 16 kHz, 16 bits, one behind the other in one file."""

    def __init__(self, folder: Path) -> None:
        with (folder / _MANIFEST).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        self.utterances = [
            Utterance(text=row["text"], kind=row["kind"], voice=Voice(**row["voice"]))
            for row in rows
        ]
        self._ends = np.cumsum([row["samples"] for row in rows])
        size = int(self._ends[-1]) if rows else 0
        self._waves: NDArray[np.int16] = (
            np.memmap(folder / _WAVES, np.int16, "r", shape=(size,)) if size else np.zeros(0, "i2")
        )

    def __len__(self) -> int:
        return len(self.utterances)

    def wave(self, i: int) -> NDArray[np.float32]:
        """Samples of one utterance, within ±1."""
        start = int(self._ends[i - 1]) if i else 0
        wave: NDArray[np.float32] = self._waves[start : int(self._ends[i])].astype(np.float32)
        wave /= 32768
        return wave


def record(
    utterances: Sequence[Utterance],
    folder: Path,
    *,
    speak: Callable[[str, Voice], NDArray[np.float32]] = synthesise,
    say: Callable[[str], None] = print,
) -> Recordings:
    """Speak every utterance into a folder, or read the folder if it holds just these.

    Args:
        utterances: What to record.
        folder: Where; written anew if it holds anything else.
        speak: Who makes the sound.
        say: Where progress goes.
    """
    if (folder / _MANIFEST).exists():
        found = Recordings(folder)
        if found.utterances == list(utterances):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with (folder / _WAVES).open("wb") as waves:
        for i, one in enumerate(utterances):
            wave = trimmed(speak(one.text, one.voice))
            waves.write((wave.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
            rows.append({**asdict(one), "samples": len(wave)})
            if (i + 1) % 2000 == 0:
                say(f"recorded {i + 1:,} of {len(utterances):,} utterances")
    part = folder / f"{_MANIFEST}.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(folder / _MANIFEST)
    return Recordings(folder)


def trimmed(
    wave: NDArray[np.float32], *, keep: int = 1600, level: float = 0.01
) -> NDArray[np.float32]:
    """Without the silence at both ends, but for `keep` samples of it."""
    loud = np.flatnonzero(np.abs(wave) > level * max(1e-6, float(np.abs(wave).max(initial=0))))
    if not len(loud):
        return wave
    return wave[max(0, int(loud[0]) - keep) : int(loud[-1]) + keep]
