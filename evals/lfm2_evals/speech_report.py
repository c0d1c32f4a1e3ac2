"""What the task `speech` found, for people and for programs.

Plain strings from results; it knows neither models nor sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm2_evals.report import markdown_table, write_files
from lfm2_evals.speech import FLOOR, TIERS, Run, Words

__all__ = ["SpeechReport"]

_TITLE = "Word errors in synthetic speech"
_HEADER = ("set", "utterances", "words", "WER, %", "95 %", "without listening, %", "floor")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SpeechReport:
    """Word error rates by held-out set.

    Attributes:
        facts: What was run, with what and how long; shown as a list.
        runs: One for each set.
    """

    facts: Mapping[str, str]
    runs: Sequence[Run]

    def markdown(self) -> str:
        """Heading, facts, one table, and a few of the errors."""
        parts = [f"# {_TITLE}"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.facts.items()))
        if not all(run.complete for run in self.runs):
            parts.append("Stopped early: this is what was heard until then.")
        parts.append(markdown_table(_HEADER, [_row(run) for run in self.runs]))
        parts.append(
            "Synthetic voices (espeak-ng) and a vocabulary of 279 words: nothing here says "
            "anything about people. Each utterance alone, greedy. 95 %: bootstrap over "
            "utterances. Without listening: each utterance given what the model wrote about the "
            "one next in length. Read aloud: its own ears judge, so that set flatters it."
        )
        for run in self.runs:
            wrong = [one for one in run.heard if one.said != one.found][:_SHOWN]
            if wrong:
                rows = [(one.voice, one.said, one.found) for one in wrong]
                parts.append(f"## Errors: {TIERS[run.tier]}")
                parts.append(markdown_table(("voice", "said", "written"), rows))
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


def _numbers(words: Words) -> dict[str, Any]:
    return {
        "wer": words.rate,
        "interval": [words.interval.low, words.interval.high],
        "errors": sum(words.errors),
        "words": sum(words.words),
    }
