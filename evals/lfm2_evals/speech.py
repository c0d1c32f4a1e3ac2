"""The task `speech`: how many words a model hears wrongly, of voices and sentences held out.

What is said, and by whom, is fixed by `lfm2_audio.speech.manifest`; espeak-ng speaks it when it is
asked for. Each utterance is transcribed alone, greedily. Knows no report.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_evals.stats import Interval, ratio_bootstrap
from lfm2_mm.errors import MissingExtra

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel
    from lfm2_audio.waveform import Audio

__all__ = [
    "FLOOR",
    "TIERS",
    "Heard",
    "Hearing",
    "Run",
    "Words",
    "alike",
    "aloud",
    "errors",
    "evaluate",
    "plain",
    "utterances",
]

TIERS = {
    "voices": "Held-out voices, sentences as in training",
    "sentences": "Held-out sentences, voices of the training",
    "both": "Held-out sentences in held-out voices",
    "aloud": "Held-out sentences read aloud by the model, and heard by itself",
    "judged": "The same, heard by the second recogniser",
}
"""Sets of the task, with their headings."""

FLOOR = ("voices", 0.10)
"""The set that has a floor, and the word error rate that it asks for."""


class Hearing(Protocol):
    """What is scored: a model that transcribes."""

    def transcribe(self, source: Any) -> Any:
        """Something with the `text` that was said."""
        ...


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One utterance.

    Attributes:
        said: Its words.
        found: What the model wrote, words only.
        voice: Who spoke.
        seconds: Its length.
    """

    said: str
    found: str
    voice: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Words:
    """Errors over all utterances of a set.

    Attributes:
        errors: Substitutions, deletions and insertions, for each utterance.
        words: Words that were said, for each utterance.
    """

    errors: Sequence[int]
    words: Sequence[int]

    @property
    def rate(self) -> float:
        """Word error rate: errors for each word that was said."""
        return sum(self.errors) / max(1, sum(self.words))

    @property
    def interval(self) -> Interval:
        """95 % interval of the rate, by bootstrap over utterances."""
        return ratio_bootstrap(self.errors, self.words)


@dataclass(kw_only=True)
class Run:
    """What came of one set.

    Attributes:
        tier: Its name.
        total: Utterances that were to be heard.
        heard: Those that were.
        seconds: How long it took.
    """

    tier: str
    total: int
    heard: list[Heard] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every utterance was heard."""
        return len(self.heard) == self.total

    @property
    def score(self) -> Words:
        """The model's errors."""
        said, found = [one.said for one in self.heard], [one.found for one in self.heard]
        if self.tier == "judged":
            said, found = [alike(text) for text in said], [alike(text) for text in found]
        return errors(said, found)

    @property
    def deaf(self) -> Words:
        """The errors if each utterance were given what the model wrote about its neighbour.

        Neighbours by length: what is left for one who knows the kind of sentences and how long
        this one is, and has not listened.
        """
        order = sorted(self.heard, key=lambda one: one.seconds)
        others = [*order[1:], *order[:1]]
        return errors([one.said for one in order], [one.found for one in others])


def plain(text: str) -> str:
    """Words in lower case, single spaces between, no punctuation."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold()))


def alike(text: str) -> str:
    """A text in which words of one sound are one word, as the second recogniser hears them."""
    from lfm2_audio.nano_judge import alike as one_sound

    return one_sound(text)


def utterances(tier: str, count: int) -> list[tuple[str, str, Audio]]:
    """Words, voice and sound of the first utterances of a set, the same each time.

    Raises:
        MissingExtra: if espeak-ng is not installed.
    """
    import torch

    from lfm2_audio.speech.manifest import evaluation, trimmed
    from lfm2_audio.speech.synthesis import RATE, synthesise
    from lfm2_audio.waveform import Audio

    made = []
    for one in evaluation(tier, count):
        wave = trimmed(synthesise(one.text, one.voice))
        made.append((one.text, one.voice.name, Audio(torch.from_numpy(wave.copy()), RATE)))
    return made


def aloud(
    model: AudioModel, count: int, *, progress: Callable[[int, int], None] | None = None
) -> list[tuple[str, str, Audio]]:
    """The first held-out sentences, read aloud by a model; what `utterances` gives of voices."""
    from lfm2_audio.speech.manifest import evaluation

    made = []
    for one in evaluation("sentences", count):
        made.append((one.text, model.name, model.speak(one.text, temperature=0.0, max_seconds=10)))
        if progress is not None:
            progress(len(made), count)
    return made


def evaluate(
    tier: str,
    model: Hearing,
    spoken: Sequence[tuple[str, str, Audio]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Let a model hear every utterance; Ctrl-C keeps what was heard until then."""
    run = Run(tier=tier, total=len(spoken))
    began = time.perf_counter()
    try:
        for said, voice, audio in spoken:
            found = plain(model.transcribe(audio).text)
            run.heard.append(Heard(said=said, found=found, voice=voice, seconds=audio.duration))
            if progress is not None:
                progress(len(run.heard), run.total)
    except KeyboardInterrupt:
        pass
    run.seconds = time.perf_counter() - began
    return run


def errors(said: Sequence[str], found: Sequence[str]) -> Words:
    """Word errors of each text.

    Raises:
        MissingExtra: if jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise MissingExtra(
            "the package jiwer is needed to count word errors and is not installed; "
            "run pip install jiwer"
        ) from None
    counts = []
    for a, b in zip(said, found, strict=True):
        result = jiwer.process_words(a, b)
        counts.append(result.substitutions + result.deletions + result.insertions)
    return Words(errors=counts, words=[len(text.split()) for text in said])
