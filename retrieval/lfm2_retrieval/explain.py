"""A page that shows why passages were found: the heat of tokens, the matches of query tokens.

A single HTML file without scripts, links or anything to fetch; it follows the reader's light or
dark setting. All that documents say is escaped. Knows alignments and HTML; nothing of how a search
is done.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lfm2_retrieval.highlight import Alignment, align

if TYPE_CHECKING:
    from lfm2_retrieval.index.encoders import EncoderLike
    from lfm2_retrieval.index.model import Hit

__all__ = ["explain_page"]

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --dim: #666; --line: #ddd;
  --heat: 255 149 0; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e6e6; --dim: #9a9a9a;
  --line: #34373d; --heat: 255 140 20; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .3rem; }
p.about, td.number { color: var(--dim); } p.about { margin: .2rem 0; font-size: .9rem; }
p.passage { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem;
  border: 1px solid var(--line); border-radius: .4rem; }
mark { color: inherit; border-radius: .2rem; background: rgb(var(--heat) / var(--w)); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: start; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: end; font-variant-numeric: tabular-nums; }
.scale mark { padding: 0 .6rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def explain_page(query: str, hits: Sequence[Hit], encoder: EncoderLike) -> str:
    """The page of a search.

    Args:
        query: What was asked.
        hits: What was found, best first; their passages are encoded anew.
        encoder: Of the index.

    Returns:
        The HTML text.
    """
    shown = [_hit(n, hit, one) for n, (hit, one) in enumerate(_aligned(query, hits, encoder), 1)]
    none = "<p>Nothing was found.</p>"
    scale = " ".join(f'<mark style="--w:{w:.1f}">{w:.1f}</mark>' for w in (0.1, 0.3, 0.5, 0.7, 0.9))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_safe(query)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f'<h1 dir="auto">{_safe(query)}</h1>',
            f'<p class="about">Model: {_safe(encoder.name)}. A token is the warmer, the more it '
            "resembles a token of the query beyond what everyday words do; point at it to see "
            f'which. <span class="scale">{scale}</span></p>',
            *(shown or [none]),
            "</body></html>\n",
        ]
    )


def _aligned(
    query: str, hits: Sequence[Hit], encoder: EncoderLike
) -> Iterator[tuple[Hit, Alignment]]:
    return zip(hits, align(encoder, query, [hit.text for hit in hits]), strict=True)


def _hit(number: int, hit: Hit, alignment: Alignment) -> str:
    place = [f"page {hit.page}"] if hit.page is not None else []
    place += [f"line {hit.line}"] if hit.line is not None else []
    facts = [f"score {hit.score:.4g}", f"MaxSim {alignment.score:.3f}", *place]
    if hit.language:
        facts.append(_safe(hit.language))
    title = f'<p class="about" dir="auto">{_safe(hit.title)}</p>' if hit.title else ""
    return "\n".join(
        [
            f"<section><h2>{number}. <span dir='auto'>{_safe(hit.path or hit.id)}</span></h2>",
            title,
            f'<p class="about">{" · ".join(facts)}</p>',
            f'<p class="passage" dir="auto">{_heated(alignment)}</p>',
            _table(alignment),
            "</section>",
        ]
    )


def _heated(alignment: Alignment) -> str:
    """The passage with its tokens' heat; tokens that share a character share its piece."""
    heats = alignment.heat.tolist()
    whose = alignment.lift.argmax(0).tolist() if len(alignment.query_tokens) else []
    found: list[str] = []
    at = 0
    for row, (_, start, end) in enumerate(alignment.document_tokens):
        start = max(start, at)
        if end <= start or heats[row] < 0.02:
            continue
        asked = alignment.query_tokens[whose[row]][0]
        similarity = float(alignment.similarity[whose[row], row])
        found.append(_safe(alignment.text[at:start]))
        found.append(
            f'<mark style="--w:{heats[row]:.2f}" title="{_safe(asked)}: similarity '
            f'{similarity:.2f}, heat {heats[row]:.2f}">{_safe(alignment.text[start:end])}</mark>'
        )
        at = end
    found.append(_safe(alignment.text[at:]))
    return "".join(found)


def _table(alignment: Alignment) -> str:
    """Each query token with the passage token nearest to it; the filling in one line."""
    if not alignment.similarity.numel():
        return ""
    best, where = alignment.similarity.max(1)
    rows = []
    others: list[float] = []
    for i, (piece, start, _) in enumerate(alignment.query_tokens):
        j = int(where[i])
        if start < 0:
            others.append(float(best[i]))
            continue
        numbers = (f"{float(best[i]):.3f}", f"{float(alignment.lift[i, j]):.2f}")
        rows.append(_row(piece, alignment.document_tokens[j][0], *numbers))
    if others:
        label = f"{len(others)} special and filling tokens"
        rows.append(_row(label, "", f"{sum(others):.3f}", ""))
    head = "<tr><th>query token<th>nearest token<th>similarity<th>heat</tr>"
    return f"<details><summary>Query tokens</summary><table>{head}{''.join(rows)}</table></details>"


def _row(asked: str, found: str, *numbers: str) -> str:
    cells = "".join(f'<td class="number">{number}' for number in numbers)
    return f'<tr><td dir="auto">{_safe(asked)}<td dir="auto">{_safe(found)}{cells}</tr>'


def _safe(text: Any) -> str:
    """Escaped for HTML, with what steers terminals and readers made visible."""
    return html.escape(_STEERING.sub(_visible, str(text)), quote=True)


def _visible(match: re.Match[str]) -> str:
    return "\N{REPLACEMENT CHARACTER}" if match[0] != "\r" else ""


_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
