"""What the task `speech` found, for people and for programs.

Plain strings from results; it knows neither models nor sound.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm2_evals.report import markdown_table, write_files
from lfm2_evals.speech import FLOOR, TIERS, Run, Words
from lfm2_evals.speech_answers import ANSWER_TIERS, RIGHT_FLOOR, WORDS_FLOOR, AnswerRun

__all__ = ["SpeechReport"]

_TITLE = "Word errors in synthetic speech"
_HEADER = ("set", "utterances", "words", "WER, %", "95 %", "without listening, %", "floor")
_ASKED = ("set", "questions", "written right, %", "95 %", "said right, %", "said, WER %", "floors")
_KINDS = ("set", "kind", "questions", "written right, %", "said right, %")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SpeechReport:
    """Word error rates by held-out set.

    Attributes:
        facts: What was run, with what and how long; shown as a list.
        runs: One for each set of things to be heard.
        answers: One for each set of questions.
    """

    facts: Mapping[str, str]
    runs: Sequence[Run] = ()
    answers: Sequence[AnswerRun] = ()

    def markdown(self) -> str:
        """Heading, facts, one table, and a few of the errors."""
        parts = [f"# {_TITLE}"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.facts.items()))
        every: list[Run | AnswerRun] = [*self.runs, *self.answers]
        if not all(run.complete for run in every):
            parts.append("Stopped early: this is what was heard until then.")
        if self.runs:
            parts.append(markdown_table(_HEADER, [_row(run) for run in self.runs]))
            parts.append(
                "Synthetic voices (espeak-ng) and a vocabulary of 279 words: nothing here says "
                "anything about people. Each utterance alone, greedy. 95 %: bootstrap over "
                "utterances. Without listening: each utterance given what the model wrote about "
                "the one next in length. Read aloud and heard by itself: its own ears judge, for "
                "better or worse."
            )
        if self.answers:
            parts.append(markdown_table(_ASKED, [_asked_row(run) for run in self.answers]))
            parts.append(
                "Written right: the text of the answer is the right one, to the word; 95 %: "
                "Wilson. Said right: so is what the second recogniser hears, which knows words "
                "and no sentences and shares no weight with the model. WER: between what was "
                "written and what it hears of it."
            )
            parts.append(markdown_table(_KINDS, _by_kind(self.answers)))
        for run in self.runs:
            wrong = [one for one in run.heard if one.said != one.found][:_SHOWN]
            if wrong:
                rows = [(one.voice, one.said, one.found) for one in wrong]
                parts.append(f"## Errors: {TIERS[run.tier]}")
                parts.append(markdown_table(("voice", "said", "written"), rows))
        for asked in self.answers:
            missed = [one for one in asked.answered if not one.said_right][:_SHOWN]
            if missed:
                lines = [(one.asked, one.answer, one.written, one.heard) for one in missed]
                parts.append(f"## Errors: {ANSWER_TIERS[asked.tier]}")
                parts.append(markdown_table(("asked", "answer", "written", "heard"), lines))
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": _TITLE,
            "facts": dict(self.facts),
            "sets": {
                run.tier: {
                    "complete": run.complete,
                    "score": _numbers(run.score),
                    "without_listening": _numbers(run.deaf),
                    "heard": [asdict(one) for one in run.heard],
                }
                for run in self.runs
            },
            "answers": {
                run.tier: {
                    "complete": run.complete,
                    "written_right": _share(one.right for one in run.answered),
                    "said_right": _share(one.said_right for one in run.answered),
                    "said": _numbers(run.words),
                    "answered": [asdict(one) for one in run.answered],
                }
                for run in self.answers
            },
        }

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Write `name.md` and `name.json`; returns their paths.

        Raises:
            InputError: if the folder cannot be written.
        """
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        return write_files(folder, {f"{name}.md": self.markdown(), f"{name}.json": content})


def _row(run: Run) -> list[str]:
    score, (judged, most) = run.score, FLOOR
    verdict = ""
    if run.tier == judged:
        verdict = f"{'reached' if score.rate <= most else 'missed'} ({100 * most:.0f})"
    return [
        TIERS[run.tier],
        str(len(score.words)),
        str(sum(score.words)),
        f"{100 * score.rate:.1f}",
        str(score.interval),
        f"{100 * run.deaf.rate:.1f}",
        verdict,
    ]


def _share(found: Iterable[bool]) -> float:
    kept = list(found)
    return sum(kept) / max(1, len(kept))


def _asked_row(run: AnswerRun) -> list[str]:
    right = _share(one.right for one in run.answered)
    said = _share(one.said_right for one in run.answered)
    wrong = run.words.rate
    floors = ""
    if run.tier == next(iter(ANSWER_TIERS)):
        verdicts = [
            f"{'reached' if right >= RIGHT_FLOOR else 'missed'} ({100 * RIGHT_FLOOR:.0f})",
            f"{'reached' if wrong <= WORDS_FLOOR else 'missed'} ({100 * WORDS_FLOOR:.0f})",
        ]
        floors = ", ".join(verdicts)
    return [
        ANSWER_TIERS[run.tier],
        str(len(run.answered)),
        f"{100 * right:.1f}",
        str(run.right),
        f"{100 * said:.1f}",
        f"{100 * wrong:.1f}",
        floors,
    ]


def _by_kind(runs: Sequence[AnswerRun]) -> list[list[str]]:
    rows = []
    for run in runs:
        for kind in sorted({one.kind for one in run.answered}):
            chosen = [one for one in run.answered if one.kind == kind]
            shares = (_share(one.right for one in chosen), _share(one.said_right for one in chosen))
            right, said = (f"{100 * share:.0f}" for share in shares)
            rows.append([ANSWER_TIERS[run.tier], kind, str(len(chosen)), right, said])
    return rows


def _numbers(words: Words) -> dict[str, Any]:
    return {
        "wer": words.rate,
        "interval": [words.interval.low, words.interval.high],
        "errors": sum(words.errors),
        "words": sum(words.words),
    }
