"""When the context is full: which of the oldest turns go, so that the rest leaves room.

Knows a conversation's turns and a model's context; drops nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm2_audio.voice.seam import Dialogue, VoiceModel

__all__ = ["Fit", "fitted", "limit"]


@dataclass(frozen=True)
class Fit:
    """A shortened conversation.

    Attributes:
        dropped: How many turns are gone.
        before: Positions it had.
        after: Positions it has.
    """

    conversation: Dialogue
    dropped: int
    before: int
    after: int


def limit(model: VoiceModel, reserve: int | None) -> int:
    """Positions that a prompt may fill; None reserves an eighth of the context for the answer."""
    whole = model.max_positions
    return whole - (whole // 8 if reserve is None else min(reserve, whole - 1))


def fitted(model: VoiceModel, whole: Dialogue, most: int, keep: float) -> Fit | None:
    """The newest turns that fill at most `keep` of `most` positions, or None if there is room.

    By so much less than `most` because all that is left is computed anew. What stays begins with a
    user's turn; a question at the end always stays.
    """
    try:
        before = now = len(whole.to_prompt(model))
        if before <= most:
            return None
        dropped, shorter, last = 0, whole, len(whole.turns)
        last -= last > 0 and whole.turns[-1].role == "user"
        while dropped < last and (now > keep * most or whole.turns[dropped].role != "user"):
            dropped += 1
            shorter = whole.drop(dropped)
            now = len(shorter.to_prompt(model))
    except Exception:
        return None  # whoever asks the model meets it again, and reports it
    return Fit(shorter, dropped, before, now) if dropped else None
