"""`lfm2-mm search`: the best passages for a question, with the words that matched.

Knows hits, spans and a terminal; nothing of how a search is done.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.errors import InputError
from lfm2_retrieval.opening import index_argument, open_with_model, print_json, retriever_options

if TYPE_CHECKING:
    from lfm2_retrieval.highlight import Snippet
    from lfm2_retrieval.index.encoders import EncoderLike
    from lfm2_retrieval.index.model import Hit

__all__ = ["plain_snippet", "search"]


@click.command(short_help="Find passages in an index, in any language.")
@index_argument
@click.argument("query")
@retriever_options
@click.option(
    "-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="How many."
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only documents like lang=de, year>=2020 or path~manual/*; may be repeated.",
)
@click.option(
    "--hybrid/--no-hybrid", default=None, help="Let shared words count too (BM25), or not."
)
@click.option("--exact", is_flag=True, help="Score every passage instead of the likely ones.")
@click.option(
    "--explain",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write a page that shows the heat of every token.",
)
def search(index: Path, query: str, **params: Any) -> None:
    """Find the passages of INDEX that answer QUERY, which may be in another language than they.

    \b
    lfm2-mm search notes.idx "Wie entkalke ich die Maschine?" --filter lang=en
    """  # noqa: D301
    page: Path | None = params["explain"]
    if page is not None and not page.absolute().parent.is_dir():
        raise InputError(f"--explain names the folder {str(page.parent)!r}, which is not there")
    if not query.strip():
        raise InputError(f"the query is {query!r}; write what to look for")
    opened, encoder = open_with_model(index, params)
    hits = opened.search(
        query,
        params["count"],
        filter=list(params["filters"]) or None,
        hybrid=params["hybrid"],
        exact=params["exact"],
    )
    if page is not None:
        _write_page(page, query, hits, encoder)
        terminal.say(f"explained: {page}", quiet=params["quiet"])
    if params["as_json"]:
        found = [_to_dict(number, hit) for number, hit in enumerate(hits, 1)]
        print_json({"query": query, "index": str(index), "model": encoder.name, "hits": found})
        return
    if not hits:
        why = "fits the filter" if params["filters"] else "is in the index"
        terminal.say(f"nothing was found: no passage {why}", quiet=params["quiet"])
    _print(hits)


def _write_page(page: Path, query: str, hits: Sequence[Hit], encoder: EncoderLike) -> None:
    from lfm2_retrieval.explain import explain_page

    try:
        page.write_text(explain_page(query, hits, encoder), encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{str(page)!r} cannot be written ({why}); check the path") from None


def _to_dict(rank: int, hit: Hit) -> dict[str, Any]:
    from lfm2_retrieval.highlight import snippet

    return {
        "rank": rank,
        "id": hit.id,
        "score": round(hit.score, 6),
        "path": hit.path,
        "page": hit.page,
        "line": hit.line,
        "title": hit.title,
        "language": hit.language,
        "metadata": hit.metadata,
        "snippet": plain_snippet(snippet(hit.text, hit.spans), mark=""),
        "text": hit.text,
        "spans": [[start, end, round(weight, 4)] for start, end, weight in hit.spans],
    }


def _print(hits: Sequence[Hit]) -> None:
    from lfm2_retrieval.highlight import snippet

    styled = terminal.is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    for number, hit in enumerate(hits, 1):
        found = snippet(hit.text, hit.spans)
        if styled:
            _print_styled(number, hit, found)
        else:
            click.echo(f"{number}. {' · '.join(_heading(hit))}")
            click.echo(f"   {plain_snippet(found)}\n")


def _heading(hit: Hit) -> list[str]:
    """Where it stands, its title, its score."""
    from lfm2_retrieval.answers import place

    words = [place(hit), *([hit.title] if hit.title else []), f"{hit.score:.4g}"]
    return [" ".join(terminal.clean(word).split()) for word in words]


def plain_snippet(found: Snippet, mark: str = "**") -> str:
    """On one line, matched words between marks."""
    pieces = [(_one_line(text), weight) for text, weight in found.pieces()]
    line = "".join(f"{mark}{text}{mark}" if weight else text for text, weight in pieces)
    return _dotted(found, line.strip())


def _print_styled(number: int, hit: Hit, found: Snippet) -> None:
    """For a person: wrapped, matched words the stronger the better they match."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    where, *rest = _heading(hit)
    console = Console(highlight=False)
    console.print(
        Text.assemble((f"{number}. ", "dim"), (where, "bold"), (f" · {' · '.join(rest)}", "dim"))
    )
    before, after = ("…" if cut else "" for cut in found.cut)
    words = Text(before)
    for text, weight in found.pieces():
        style = "" if not weight else "bold yellow" if weight >= 0.5 else "yellow"
        words.append(_one_line(text), style=style)
    words.append(after)
    console.print(Padding(words, (0, 0, 1, 3)))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", terminal.clean(text))


def _dotted(found: Snippet, line: str) -> str:
    before, after = found.cut
    return ("…" if before else "") + line + ("…" if after else "")
