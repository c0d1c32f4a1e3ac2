"""The demo of search: shipped documents in eight languages, questions in other languages.

Writes the index, and a page that explains the first answer, into the demo's folder. Knows the
shipped files and the public face of an index.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_mm.cli.plugins import Answered
from lfm2_retrieval.reranking import DEFAULT_MODEL, load_encoder

if TYPE_CHECKING:
    from lfm2_retrieval.index.encoders import EncoderLike

__all__ = ["QUESTIONS", "documents", "questions", "run"]

QUESTIONS = (
    "How hot should the water for green tea be?",
    "Wasser sparen im Garten",
    "图书馆借书",
    "炊飯器でお粥を炊く",
)
"""What the demo asks, of those that nano-colbert can; `queries.json` knows the right documents."""

_INDEX = "search.idx"
_PAGE = "search.html"


def documents() -> Path:
    """The folder of shipped documents."""
    return Path(str(resources.files("lfm2_retrieval").joinpath("samples", "documents")))


def questions() -> dict[str, str]:
    """All questions to the shipped documents, with the right document of each."""
    path = documents().parent / "queries.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {row["query"]: row["document"] for row in rows}


def run(
    seed: int,
    folder: Path,
    *,
    asked: Sequence[str] = QUESTIONS,
    encoder: EncoderLike | None = None,
) -> Iterator[Answered]:
    """Index the documents anew and ask; an answer is right if its document comes first.

    Args:
        seed: Of the demo; nothing here is drawn.
        folder: Where the index and the page go.
        asked: Questions of `queries.json`.
        encoder: The retriever; by default the embedded one.
    """
    from lfm2_retrieval.explain import explain_page
    from lfm2_retrieval.highlight import snippet
    from lfm2_retrieval.index.index import Index
    from lfm2_retrieval.searching import plain_snippet

    encoder = encoder or load_encoder(DEFAULT_MODEL)
    truths = questions()
    target = folder / _INDEX
    if target.exists():
        shutil.rmtree(target)  # of an earlier demo
    with Index.open(target, encoder) as index:
        report = index.add(documents())
        languages = {row.language for row in index.documents() if row.language}
        about = (
            f"{_INDEX}: {report.added} documents in {len(languages)} languages, "
            f"{report.passages} passages, indexed in {report.seconds:.1f} s"
        )
        for question in asked:
            hits = index.search(question, 3)
            page: tuple[str, ...] = ()
            if question == asked[0]:
                html = explain_page(question, hits, encoder)
                (folder / _PAGE).write_text(html, encoding="utf-8")
                page = (_PAGE,)
            found = f"{hits[0].path}: " if hits else "nothing"
            if hits:
                found += plain_snippet(snippet(hits[0].text, hits[0].spans, width=120))
            yield Answered(
                about=about,
                question=question,
                answer=found,
                truth=truths[question],
                right=bool(hits) and hits[0].path == truths[question],
                files=page,
            )
