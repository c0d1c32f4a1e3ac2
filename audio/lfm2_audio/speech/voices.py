"""Who speaks: accents and voice variants of espeak-ng, and which of them training never hears.

Knows names only; no sound is made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lfm2_audio.speech.sentences import Split

__all__ = ["ACCENTS", "ASSISTANT", "HELD_OUT_VARIANTS", "TRAIN_VARIANTS", "Voice", "voice"]

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
"""Accents of English; each is heard in training."""

HELD_OUT_VARIANTS = ("f2", "m3", "m6", "Alicia", "Mike", "klatt3", "pablo", "steph2", "Annie", "ed")
"""Voices that training never hears, fixed before anything was trained."""

TRAIN_VARIANTS = tuple(
    "f1 f3 f4 f5 m1 m2 m4 m5 m7 m8 klatt klatt2 klatt4 klatt5 adam Alex Andrea Andy antonio aunty "
    "belinda benjamin boris caleb david edward Gene gustave Henrique Hugo iven Jacky john Lee "
    "linda marcelo Marco Mario max Michael michel miguel norbert paul pedro quincy rob robert "
    "sandro shelby steph steph3 travis victor zac anika grandma grandpa Diogo Denis".split()
)
"""Voices of the training set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """One way to speak.

    Attributes:
        accent: espeak-ng's language.
        variant: Its variant of the voice.
        speed: Words a minute.
        pitch: 0 to 99.
    """

    accent: str
    variant: str
    speed: int = 160
    pitch: int = 50

    @property
    def name(self) -> str:
        """As espeak-ng's `-v` takes it."""
        return f"{self.accent}+{self.variant}"


ASSISTANT = Voice(accent="en-us", variant="f4", speed=165, pitch=45)
"""The one voice in which nano-audio answers."""


def voice(rng: Random, split: Split = "train") -> Voice:
    """A voice of a split, with a speed and a pitch of its own."""
    variants = TRAIN_VARIANTS if split == "train" else HELD_OUT_VARIANTS
    return Voice(
        accent=rng.choice(ACCENTS),
        variant=rng.choice(variants),
        speed=rng.randint(125, 195),
        pitch=rng.randint(25, 75),
    )
