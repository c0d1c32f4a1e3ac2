"""Training data of the audio frontend: recorded utterances as features, labels and token rows.

Features are analysed once, kept on disk before normalisation, and disturbed anew each time. Every
batch is a pure function of (seed, step). Knows neither losses nor a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from lfm2_audio.speech.augment import Augmentation, augment
from lfm2_audio.speech.manifest import Recordings, Utterance
from lfm2_audio.speech.sentences import lexicon
from lfm2_mm.train.objectives import IGNORE

__all__ = ["BLANK", "Features", "Mix", "SpeechBatch", "SpeechEncoder", "Spoken", "normalised"]

BLANK = 0
"""The class of a row in which no word is; word i of the lexicon is class i + 1."""

_EDGE = 10  # mel frames of silence that `manifest.trimmed` keeps at both ends
_LEAST = 9  # mel frames that the encoder needs
PROMPT = "<|startoftext|><|im_start|>system\nPerform ASR.<|im_end|>\n<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"

_CHOICE = 4  # times as many utterances are drawn as a batch takes, which are then of like length

Frames = NDArray[np.float32]
Row = tuple[Frames, str, NDArray[np.int64] | None]
"""Features `[t, m]` before normalisation, the words, and word and sound of each frame, `[t, 2]`."""


@dataclass
class SpeechBatch:
    """Utterances of one length.

    Attributes:
        mel: Normalised features, `[b, m, t]`, the zero frame at the end included.
        row_words: Class of each row of the encoder, `[b, ceil(t / 8)]`; `IGNORE` where it is not
            known.
        row_sounds: The sound that is about there, likewise.
        words: Classes of each utterance, one behind the other, and how many each has.
        word_counts: `[b]`.
        before: Token ids that stand before the sound, the same for all.
        after: Token ids behind the sound: the answer, padded with `IGNORE`, `[b, u]`.
        answers_from: How many of `after` are no answer.
    """

    mel: Tensor
    row_words: Tensor
    row_sounds: Tensor
    words: Tensor
    word_counts: Tensor
    before: Tensor
    after: Tensor
    answers_from: int

    def to(self, device: str) -> SpeechBatch:
        """On another device."""
        tensors = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What batches of a stage hold.

    Attributes:
        chains: Share of steps whose utterances are single words behind each other.
        chain: Most words of a chain.
        batch: Utterances in a step.
        augmentation: How they are disturbed.
    """

    chains: float
    chain: int = 6
    batch: int = 24
    augmentation: Augmentation = Augmentation()


class Features:
    """Log-mel features of recordings, before normalisation, as one memory map in fp16."""

    def __init__(self, recordings: Recordings, folder: Path, analyse: Callable[[Frames], Frames]):
        self.utterances = recordings.utterances
        ends_path, data_path = folder / "mel_ends.npy", folder / "mel.f16"
        if not ends_path.exists():
            ends = []
            with data_path.open("wb") as file:
                for i in range(len(recordings)):
                    mel = analyse(recordings.wave(i)).astype(np.float16)
                    file.write(mel.tobytes())
                    ends.append(len(mel))
                    width = mel.shape[1]
            np.save(ends_path, np.array([width, *np.cumsum(ends)]))
        width, *ends = np.load(ends_path).tolist()
        self._ends = ends
        self._data = np.memmap(data_path, np.float16, "r", shape=(ends[-1], width))

    def __len__(self) -> int:
        return len(self.utterances)

    def frames(self, i: int) -> int:
        """How many frames an utterance has."""
        count: int = self._ends[i] - (self._ends[i - 1] if i else 0)
        return count

    def __getitem__(self, i: int) -> Frames:
        start = self._ends[i - 1] if i else 0
        return self._data[start : self._ends[i]].astype(np.float32)


def normalised(mel: Frames) -> Frames:
    """Zero mean and unit (unbiased) deviation in each band, then one frame of zeros.

    What the reference inference hands to its encoder; see `lfm2_audio.mel`.
    """
    spread = mel.std(axis=0, ddof=1, keepdims=True) + 1e-5
    out = np.zeros((len(mel) + 1, mel.shape[1]), dtype=np.float32)
    out[:-1] = (mel - mel.mean(axis=0, keepdims=True)) / spread
    return out


class Spoken(Protocol):
    """Recordings as features: `Features`, or a choice of them."""

    @property
    def utterances(self) -> Sequence[Utterance]:
        """What is said."""
        ...

    def frames(self, i: int) -> int:
        """How many frames an utterance has."""
        ...

    def __getitem__(self, i: int) -> Frames: ...


class SpeechEncoder:
    """Makes the batch of a step.

    Args:
        features: Of the training recordings, single words before sentences.
        tokenizer: Of the model.
        sounds: Number of each sound of a word, from 1.
        factor: Mel frames of one row.
        words: What each class is, from 1; the lexicon by default.
    """

    def __init__(
        self,
        features: Spoken,
        tokenizer: Tokenizer,
        sounds: Mapping[str, Sequence[int]],
        *,
        factor: int = 8,
        words: Sequence[str] | None = None,
    ) -> None:
        self.features, self.tokenizer, self.factor = features, tokenizer, factor
        self.sounds = sounds
        known = lexicon() if words is None else words
        self.classes = {word: i + 1 for i, word in enumerate(known)}
        kinds = [one.kind == "word" for one in features.utterances]
        self._words = np.flatnonzero(kinds)
        self._sentences = np.flatnonzero(~np.array(kinds, dtype=bool))

    def step(self, seed: int, step: int, mix: Mix) -> SpeechBatch:
        """The batch of a step: chains of words, or sentences, brought to one length."""
        rng = np.random.default_rng((seed, step))
        if rng.random() < mix.chains or not len(self._sentences):
            count = int(rng.integers(1, mix.chain + 1))
            drawn = [rng.choice(self._words, count).tolist() for _ in range(_CHOICE * mix.batch)]
        else:
            drawn = rng.choice(self._sentences, (_CHOICE * mix.batch, 1)).tolist()
        drawn.sort(key=lambda chain: sum(self.features.frames(i) for i in chain))
        start = int(rng.integers(0, _CHOICE)) * mix.batch
        rows = [self._joined(chain, rng) for chain in drawn[start : start + mix.batch]]
        tempo = 1 + rng.uniform(-mix.augmentation.tempo, mix.augmentation.tempo)
        frames = max(_LEAST, round(tempo * float(np.mean([len(mel) for mel, _, _ in rows]))))
        made = []
        for mel, text, labels in rows:
            disturbed = augment(mel, rng, mix.augmentation, frames=frames)
            made.append((disturbed, text, _stretched(labels, frames)))
        return self.batch(made)

    def _joined(self, chain: Sequence[int], rng: np.random.Generator) -> Row:
        """One utterance, or several words behind each other with the class of each frame."""
        utterances = [self.features.utterances[i] for i in chain]
        text = " ".join(one.text for one in utterances)
        if utterances[0].kind != "word":
            return self.features[chain[0]], text, None
        parts, labels = [], []
        for i, one in zip(chain, utterances, strict=True):
            mel = self.features[i]
            classes = np.zeros((len(mel), 2), dtype=np.int64)
            spoken = classes[_EDGE : len(mel) - _EDGE]
            spoken[:, 0] = self.classes[one.text]
            # about where each sound is: all as long as each other
            sounds = np.array(self.sounds[one.text])
            spoken[:, 1] = sounds[np.arange(len(spoken)) * len(sounds) // max(1, len(spoken))]
            # words stand at different distances
            inside = slice(int(rng.integers(0, _EDGE)), len(mel) - int(rng.integers(0, _EDGE)))
            parts.append(mel[inside])
            labels.append(classes[inside])
        return np.concatenate(parts), text, np.concatenate(labels)

    def batch(self, rows: Sequence[Row]) -> SpeechBatch:
        """Rows of one length: features before normalisation, text, class of each frame if known."""
        mel = torch.from_numpy(np.stack([normalised(mel).T for mel, _, _ in rows]))
        n_rows = -(-mel.shape[2] // self.factor)
        frames = torch.full((len(rows), n_rows, 2), IGNORE)
        classes, counts, answers = [], [], []
        lead = self._ids(ANSWER)
        for i, (_, text, labels) in enumerate(rows):
            if labels is not None:
                known = labels[self.factor // 2 :: self.factor][:n_rows]
                frames[i] = BLANK
                frames[i, : len(known)] = torch.from_numpy(known)
            words = [self.classes[word] for word in text.split()]
            classes += words
            counts.append(len(words))
            answers.append(lead + self._ids(text) + self._ids(END))
        longest = max(len(answer) for answer in answers)
        return SpeechBatch(
            mel=mel,
            row_words=frames[..., 0],
            row_sounds=frames[..., 1],
            words=torch.tensor(classes),
            word_counts=torch.tensor(counts),
            before=torch.tensor(self._ids(PROMPT)),
            after=torch.tensor([a + [IGNORE] * (longest - len(a)) for a in answers]),
            answers_from=len(lead),
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _stretched(labels: NDArray[np.int64] | None, frames: int) -> NDArray[np.int64] | None:
    """Labels of as many frames."""
    if labels is None:
        return None
    return labels[np.linspace(0, len(labels) - 1, frames).round().astype(np.int64)]
