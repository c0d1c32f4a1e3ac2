"""Spoken questions answered: what a model writes, and what a second recogniser hears it say.

Questions are those that nano-audio can be asked, in voices held out; in one set their wordings are
held out too. The judge (`lfm2_audio.nano_judge`) shares no weight with the model. Knows no report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_evals.speech import Hearing, Words, alike, errors, plain
from lfm2_evals.stats import Interval, wilson

if TYPE_CHECKING:
    from lfm2_audio.speech.sentences import Split
    from lfm2_audio.waveform import Audio

__all__ = [
    "ANSWER_TIERS",
    "RIGHT_FLOOR",
    "WORDS_FLOOR",
    "AnswerRun",
    "Answered",
    "Asked",
    "Replying",
    "evaluate_answers",
    "questions",
]

ANSWER_TIERS: dict[str, str] = {
    "answers": "Spoken questions, held-out voices",
    "reworded": "Spoken questions, held-out wordings and voices",
    "again": "Spoken questions behind an answer that was interrupted, held-out voices",
}
"""Sets of spoken questions, with their headings."""

RIGHT_FLOOR, WORDS_FLOOR = 0.85, 0.15
"""Least share of answers that are right, most word errors in what is said; of the first set."""

_SPLITS: dict[str, Split] = {"answers": "train", "reworded": "held_out", "again": "train"}
LONGEST = 120  # frames of an answer


class Replying(Protocol):
    """What is scored: a model that answers in text and speech."""

    def reply(self, source: Any, **options: Any) -> Any:
        """Something with the answer's `text` and `audio`, and the `conversation` up to it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A spoken question.

    Attributes:
        text: Its words.
        kind: What it is about.
        answer: The right answer.
        voice: Who asks.
        audio: How it sounds.
    """

    text: str
    kind: str
    answer: str
    voice: str
    audio: Audio


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came of a question.

    Attributes:
        asked: Its words.
        kind: What it is about.
        answer: The right answer.
        voice: Who asked.
        written: What the model wrote.
        heard: What the judge heard in what it said.
        seconds: Length of what it said.
    """

    asked: str
    kind: str
    answer: str
    voice: str
    written: str
    heard: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the right answer was written."""
        return self.written == plain(self.answer)

    @property
    def said_right(self) -> bool:
        """Whether the right answer was heard, or what sounds just like it."""
        return alike(self.heard) == alike(plain(self.answer))


@dataclass(kw_only=True)
class AnswerRun:
    """What came of one set.

    Attributes:
        tier: Its name.
        total: Questions that were to be asked.
        answered: Those that were.
        seconds: How long it took.
    """

    tier: str
    total: int
    answered: list[Answered] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every question was asked."""
        return len(self.answered) == self.total

    @property
    def right(self) -> Interval:
        """Share of right answers in text, with its 95 % interval."""
        return wilson(sum(one.right for one in self.answered), len(self.answered))

    @property
    def said_right(self) -> Interval:
        """Share of right answers in speech, as the judge hears it."""
        return wilson(sum(one.said_right for one in self.answered), len(self.answered))

    @property
    def words(self) -> Words:
        """Word errors between what was written and what the judge heard of it."""
        written = [alike(one.written) for one in self.answered]
        return errors(written, [alike(one.heard) for one in self.answered])


def questions(tier: str, count: int) -> list[Asked]:
    """The first questions of a set, the same each time; none occurs twice.

    Raises:
        MissingExtra: if espeak-ng is not installed.
    """
    import torch

    from lfm2_audio.speech.manifest import EVAL_SEED, trimmed
    from lfm2_audio.speech.questions import answer, question
    from lfm2_audio.speech.sentences import stream
    from lfm2_audio.speech.synthesis import RATE, synthesise
    from lfm2_audio.speech.voices import voice
    from lfm2_audio.waveform import Audio

    made: dict[str, Asked] = {}
    i = 0
    while len(made) < count:
        text, kind = question(EVAL_SEED, i, _SPLITS[tier])
        who, right = voice(stream("voice", EVAL_SEED, i, tier), "held_out"), answer(text)
        i += 1
        if text in made or right is None:
            continue
        wave = torch.from_numpy(trimmed(synthesise(text, who)).copy())
        made[text] = Asked(
            text=text, kind=kind, answer=right, voice=who.name, audio=Audio(wave, RATE)
        )
    return list(made.values())


def evaluate_answers(
    tier: str,
    model: Replying,
    judge: Hearing,
    asked: Sequence[Asked],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> AnswerRun:
    """Ask every question, greedily; Ctrl-C keeps what was answered until then.

    In the set `again` each stands behind the one before it and the first half of its answer.
    """
    run = AnswerRun(tier=tier, total=len(asked))
    began = time.perf_counter()
    try:
        before: Any = None
        for one in asked:
            given = one.audio if before is None else before.user(one.audio)
            reply = model.reply(given, temperature=0.0, max_frames=LONGEST)
            if tier == "again":
                said = reply.conversation
                last = said.drop(len(said.turns) - 2)
                before = last.cut(last.turns[-1].n_frames // 2)
            run.answered.append(
                Answered(
                    asked=one.text,
                    kind=one.kind,
                    answer=one.answer,
                    voice=one.voice,
                    written=plain(reply.text),
                    heard=plain(judge.transcribe(reply.audio).text),
                    seconds=reply.audio.duration,
                )
            )
            if progress is not None:
                progress(len(run.answered), run.total)
    except KeyboardInterrupt:
        pass
    run.seconds = time.perf_counter() - began
    return run
