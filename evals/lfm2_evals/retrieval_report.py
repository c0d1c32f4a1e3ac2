"""What the task `retrieval` found, for people and for programs.

Plain strings from results; it knows neither encoders nor texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_evals.report import bar_chart, markdown_table, write_files
from lfm2_evals.retrieval import TIERS, Found, Run
from lfm2_evals.task import Score

__all__ = ["RetrievalReport"]

_HEADER = (
    "direction",
    "questions",
    "late, %",
    "95 %",
    "trigrams, %",
    "95 %",
    "hybrid, %",
    "95 %",
    "floor",
)


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recall@1 by direction.

    Attributes:
        facts: What was run, with what and how long; shown as a list.
        runs: One for each tier.
    """

    facts: Mapping[str, str]
    runs: Sequence[Run]

    @property
    def floors(self) -> tuple[int, int]:
        """Directions that reach their floor, and those that have one."""
        judged = [one for run in self.runs if run.tier == "packages" for one in run.found]
        judged = [one for one in judged if one.has_floor]
        return sum(one.reached for one in judged), len(judged)

    def markdown(self) -> str:
        """Heading, facts and a table for each tier and sort of direction."""
        parts = ["# Recall@1 across languages"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.facts.items()))
        for run in self.runs:
            parts.append(f"## {TIERS[run.tier]}")
            if not run.complete:
                parts.append("Stopped early: these are the directions until then.")
            for title, same in (("Two scripts", False), ("One script, literals stripped", True)):
                found = [one for one in run.found if one.direction.same_script is same]
                if found:
                    floors = run.tier == "packages"
                    rows = [_row(one, floors=floors) for one in found]
                    table = markdown_table(_HEADER, [*rows, _mean(found)])
                    parts += [f"### {title}", table]
        reached, judged = self.floors
        if judged:
            parts.append(
                f"{reached} of {judged} directions with at least 300 questions reach their floor: "
                "two scripts at least 50 % and above trigrams, one script the hybrid above "
                "trigrams. 95 %: Wilson interval. Late: late interaction alone; hybrid: fused "
                "with trigrams by reciprocal rank."
            )
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        reached, judged = self.floors
        return {
            "title": "Recall@1 across languages",
            "facts": dict(self.facts),
            "floors": {"reached": reached, "of": judged},
            "tiers": {
                run.tier: {
                    "complete": run.complete,
                    "directions": [one.to_dict() for one in run.found],
                }
                for run in self.runs
            },
        }

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Write `name.md`, `name.json` and `name.svg`; returns their paths.

        Raises:
            InputError: if the folder cannot be written.
        """
        groups = [
            (f"{TIERS[run.tier]}: late interaction (hollow mark: trigrams)", _bars(run))
            for run in self.runs
        ]
        return write_files(
            folder,
            {
                f"{name}.md": self.markdown(),
                f"{name}.json": json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n",
                f"{name}.svg": bar_chart("Recall@1 across languages", groups),
            },
        )


def _name(found: Found) -> str:
    return f"{found.direction.source} → {found.direction.target}"


def _row(found: Found, *, floors: bool) -> list[str]:
    cells = [_name(found), str(found.n)]
    for name in ("late", "trigrams", "hybrid"):
        share = getattr(found, name).mean() if found.n else 0.0
        cells += [f"{100 * share:.1f}", str(found.interval(name))]
    verdict = "reached" if found.reached else "missed"
    return [*cells, verdict if floors and found.has_floor else ""]


def _mean(found: Sequence[Found]) -> list[str]:
    """The mean over directions; no interval, since they share texts."""
    cells = ["mean", str(sum(one.n for one in found))]
    for name in ("late", "trigrams", "hybrid"):
        shares = [getattr(one, name).mean() for one in found if one.n]
        cells += [f"{100 * sum(shares) / max(1, len(shares)):.1f}", ""]
    return [*cells, ""]


def _bars(run: Run) -> list[Score]:
    return [
        Score(
            name=_name(one),
            right=int(one.late.sum()),
            n=one.n,
            blind_right=int(one.trigrams.sum()),
        )
        for one in run.found
    ]
