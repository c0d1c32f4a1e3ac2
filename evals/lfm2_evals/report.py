"""Reports for people and for programs: Markdown, JSON and one bar chart as SVG.

Plain strings from scores; it knows neither tasks nor models, and needs no plotting library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lfm2_evals.task import Score
from lfm2_mm.errors import InputError

__all__ = ["Report", "Section", "bar_chart", "markdown_table", "write_files"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """The scores of one part of a benchmark.

    Attributes:
        name: Short name.
        title: Heading.
        scores: One a row.
        slices: The same rows over parts of the examples, by the name of the part.
        complete: False if the run was stopped early.
    """

    name: str
    title: str
    scores: Sequence[Score]
    slices: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "complete": self.complete,
            "scores": [score.to_dict() for score in self.scores],
            "slices": {
                name: [score.to_dict() for score in group] for name, group in self.slices.items()
            },
        }

    def markdown(self) -> str:
        """Heading and tables."""
        lines = [f"## {self.title}", ""]
        if not self.complete:
            lines += ["Stopped early: these are the answers until then.", ""]
        lines.append(markdown_table(*_score_rows(self.scores)))
        if self.slices:
            lines += ["", markdown_table(*_slice_rows(self.slices))]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a benchmark found.

    Attributes:
        title: Heading.
        facts: What was run, with what and how long; shown as a list.
        sections: One for each part.
        notes: Sentences that belong under the tables.
        details: Further JSON values, for programs only.
    """

    title: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        parts = [f"# {self.title}", facts, *(section.markdown() for section in self.sections)]
        if self.notes:
            parts.append("\n".join(self.notes))
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "sections": [section.to_dict() for section in self.sections],
            **self.details,
        }

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Write `name.md`, `name.json` and `name.svg`; returns their paths.

        Raises:
            InputError: if the folder cannot be written.
        """
        groups = [(section.title, section.scores) for section in self.sections]
        return write_files(
            folder,
            {
                f"{name}.md": self.markdown(),
                f"{name}.json": json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n",
                f"{name}.svg": bar_chart(self.title, groups),
            },
        )


def write_files(folder: str | Path, files: Mapping[str, str]) -> list[Path]:
    """Write text files into a folder, which is made if absent; a file is never half written.

    Raises:
        InputError: if the folder cannot be written.
    """
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = Path(folder) / name
            partial = path.with_name(f".{name}.part")
            partial.write_text(text, encoding="utf-8", newline="\n")
            os.replace(partial, path)
            paths.append(path)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {str(folder)!r} ({error.strerror}); name another "
            "folder with --out"
        ) from None
    return paths


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    marks = [":--", *("--:" for _ in header[1:])]
    lines = [header, marks, *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _score_rows(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    header = ["", "right, %", "95 %", "blind, %", "questions", "floor, %"]
    rows = []
    for score in scores:
        floor = ""
        if score.floor is not None:
            floor = f"{100 * score.floor:.0f} {'reached' if score.reached else 'missed'}"
        numbers = [_percent(score.accuracy), str(score.interval), _percent(score.blind)]
        rows.append([score.name, *numbers, str(score.n), floor])
    return header, rows


def _slice_rows(slices: Mapping[str, Sequence[Score]]) -> tuple[list[str], list[list[str]]]:
    header = ["right, % (questions)", *slices]
    rows = [
        [group[0].name, *(f"{_percent(s.accuracy)} ({s.n})" if s.n else "" for s in group)]
        for group in zip(*slices.values(), strict=True)
    ]
    return header, rows


_LEFT, _WIDTH, _ROW, _TOP = 190, 360, 24, 46  # pixels of the chart


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Score]]]) -> str:
    """Bars of accuracy with their 95 % intervals, the blind guesser and the floor, as SVG."""
    body, y = [], _TOP
    for heading, scores in groups:
        body.append(f'<text x="8" y="{y + 14}" class="h">{escape(heading)}</text>')
        y += _ROW
        for score in scores:
            body += _bar(score, y)
            y += _ROW
        y += 8
    ticks = [
        f'<line x1="{_x(t)}" y1="{_TOP - 4}" x2="{_x(t)}" y2="{y}" class="g"/>'
        f'<text x="{_x(t)}" y="{_TOP - 8}" class="t">{int(100 * t)} %</text>'
        for t in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    height, width = y + 28, _LEFT + _WIDTH + 70
    legend = (
        f'<text x="{_LEFT}" y="{y + 16}" class="l">bar: right answers, whisker: 95 % interval, '
        "hollow mark: blind guess, red line: floor</text>"
    )
    style = (
        "text{font:12px sans-serif;fill:#222}.h{font-weight:bold}.t{text-anchor:middle;fill:#666}"
        ".l{fill:#666;font-size:11px}.n{text-anchor:end}.g{stroke:#ddd}.b{fill:#4c78a8}"
        ".w{stroke:#111;stroke-width:1.5}.m{fill:#fff;stroke:#111}.f{stroke:#c33;stroke-width:2}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{style}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="18" class="h">{escape(title)}</text>',
        *ticks,
        *body,
        legend,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(share: float) -> float:
    return round(_LEFT + _WIDTH * share, 1)


def _bar(score: Score, y: int) -> list[str]:
    name = score.name if len(score.name) <= 28 else score.name[:27] + "…"
    interval, middle = score.interval, y + 9
    marks = [
        f'<text x="{_LEFT - 8}" y="{y + 13}" class="n">{escape(name)}</text>',
        f'<rect x="{_LEFT}" y="{y + 2}" width="{round(_WIDTH * score.accuracy, 1)}" height="14" '
        'class="b"/>',
        f'<line x1="{_x(interval.low)}" y1="{middle}" x2="{_x(interval.high)}" y2="{middle}" '
        'class="w"/>',
        f'<text x="{_LEFT + _WIDTH + 10}" y="{y + 13}">{_percent(score.accuracy)} %</text>',
    ]
    if score.blind is not None:
        marks.append(f'<circle cx="{_x(score.blind)}" cy="{middle}" r="4" class="m"/>')
    if score.floor is not None:
        at = _x(score.floor)
        marks.append(f'<line x1="{at}" y1="{y}" x2="{at}" y2="{y + 18}" class="f"/>')
    return marks
