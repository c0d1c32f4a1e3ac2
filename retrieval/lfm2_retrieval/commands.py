"""What the retrieval frontend adds: `index`, `search`, `ask --index`, a recipe, a demo.

Imported for `--help`, so nothing here imports torch or faiss before a verb runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.cli.plugins import Answered, Demo, Plugin, Recipe
from lfm2_mm.errors import SettingError
from lfm2_mm.locate import embedded_models
from lfm2_retrieval import answers
from lfm2_retrieval.indexing import index
from lfm2_retrieval.recipes import NOTES, RECIPES
from lfm2_retrieval.reranking import DEFAULT_MODEL
from lfm2_retrieval.searching import search

if TYPE_CHECKING:
    from lfm2_mm.chat import Prompt
    from lfm2_mm.model import Model
    from lfm2_retrieval.answers import Source
    from lfm2_retrieval.index.index import Index

__all__ = ["RetrievalPlugin", "plugin"]

_UNABLE = (
    "note: the embedded nano-vl cannot read documents, so its answer will make no sense; the "
    "sources are right all the same; use -m LiquidAI/LFM2.5-1.2B-Instruct"
)
_SOURCES = "retrieval.sources"


class RetrievalPlugin(Plugin):
    """The plug-in object; see `lfm2_mm.cli.plugins.Plugin`."""

    commands: Sequence[click.Command] = (index, search)
    ask_options: Sequence[click.Option] = (
        click.Option(
            ["--index"],
            type=click.Path(file_okay=False, path_type=Path),
            metavar="INDEX",
            help="Answer from the documents of this index, citing them as [1], [2], …",
        ),
        click.Option(
            ["--passages"],
            type=click.IntRange(min=1),
            metavar="N",
            help=f"So many passages of the index are given.  [default: {answers.PASSAGES}]",
        ),
        click.Option(
            ["--filter", "filters"],
            multiple=True,
            metavar="KEY=VALUE",
            help="Only documents like lang=de or year>=2020; may be repeated.",
        ),
    )
    recipes: Mapping[str, Recipe] = RECIPES
    notes: Mapping[str, str] = NOTES

    def __init__(self) -> None:
        self._index: Index | None = None

    @property
    def demos(self) -> Sequence[Demo]:  # type: ignore[override]  # read-only here
        """Questions to shipped documents in other languages, where the model is embedded."""
        return (_demo,) if any(m.name == DEFAULT_MODEL for m in embedded_models()) else ()

    def load_options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """No option of a model; but an index that cannot be used is refused before one loads."""
        self._index = None
        folder = params.get("index")
        if folder is None:
            # verbs of others may have parameters of these names, but then no --index beside them
            for name in ("passages", "filters") if "index" in params else ():
                if params.get(name):
                    option = "--filter" if name == "filters" else f"--{name}"
                    raise SettingError(f"{option} says what to take from an index; add --index")
            return {}
        from lfm2_retrieval.opening import open_with_model

        # device, number format and threads are said of the model that answers
        self._index, _ = open_with_model(Path(folder), {"quiet": params.get("quiet")})
        return {}

    def before_prompt(
        self, model: Model, messages: list[dict[str, Any]], params: MutableMapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Put the passages for the question before it."""
        if params.get("index") is None or self._index is None:
            return messages
        if model.name == "nano-vl":
            terminal.say(_UNABLE, quiet=bool(params.get("quiet")))
        hits = answers.find(
            self._index,
            _question(messages[-1]),
            k=params.get("passages") or answers.PASSAGES,
            filter=list(params.get("filters") or ()) or None,
        )
        limit = int(params.get("max_tokens") or 512)
        grounded, sources = answers.ground(model, messages, hits, max_tokens=limit)
        params[_SOURCES] = sources
        return grounded

    def answer_fields(self, answer_text: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The passages that were given."""
        sources: Sequence[Source] | None = params.get(_SOURCES)
        if sources is None:
            return {}
        numbers, _ = answers.cited(answer_text, sources)
        return {"sources": [s.to_dict(cited=s.number in numbers) for s in sources]}

    def after_answer(
        self, model: Model, prompt: Prompt, answer_text: str, params: Mapping[str, Any]
    ) -> None:
        """List the sources below an answer: those it cites, or all if it cites none."""
        sources: Sequence[Source] | None = params.get(_SOURCES)
        if sources is None or "line" in params or params.get("as_json"):
            return
        numbers, wrong = answers.cited(answer_text, sources)
        shown = [s for s in sources if not numbers or s.number in numbers]
        title = "Sources" if numbers else "Passages given (the answer cites none)"
        constrained = params.get("json_schema") is not None or params.get("regex") is not None
        lines = [f"\n{title}:", *(f"[{s.number}] {_where(s)}" for s in shown)]
        for line in lines:
            click.echo(terminal.clean(line), err=constrained)
        if wrong:
            listed = ", ".join(f"[{n}]" for n in wrong)
            terminal.warn(f"the answer cites {listed}, but there is no such passage")


def _question(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def _where(source: Source) -> str:
    words = [answers.place(source.hit), *([source.hit.title] if source.hit.title else [])]
    return " · ".join(" ".join(word.split()) for word in words)


def _demo(model: Model, seed: int, folder: Path) -> Iterator[Answered]:
    missing = [name for name in ("faiss", "bm25s", "trafilatura") if find_spec(name) is None]
    if missing:
        terminal.say(
            f"note: the search demo is left out, for {', '.join(missing)} is not installed; run "
            "pip install 'lfm2-mm[retrieval]'"
        )
        return
    from lfm2_retrieval.demo import run

    yield from run(seed, folder)


plugin = RetrievalPlugin()
