"""What the retrieval frontend adds to `train`: nano-colbert's recipes, from packages to export.

Imported for `--help`, so nothing here imports torch before a recipe runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_mm.cli.plugins import Recipe
from lfm2_mm.train.runs import begin_run, note_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm2_retrieval.corpus.build import Concept

__all__ = ["NOTES", "RECIPES", "train_nano_colbert", "train_nano_colbert_more"]

NOTES: Mapping[str, str] = {
    "nano-colbert": "note: the embedded nano-colbert knows the words of program messages, names of "
    "countries and things, and simple sentences in 11 languages; for real corpora use "
    "-m LiquidAI/LFM2-ColBERT-350M"
}
"""What is to be said when the embedded model is used."""


def train_nano_colbert(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train the embedded retriever, or go on with the folder's checkpoint; export to `model`.

    Texts and tokenizer are made first, from the pip packages in `packages` below the folder (see
    `lfm2_retrieval.corpus.sources`), and kept there.

    Raises:
        MissingExtra: if one of the packages is not there.
        InputError: if the folder's run has another length or seed.
    """
    return _train(folder, False, steps, until, seed, device, workers, fresh, say)


def train_nano_colbert_more(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Go on from the embedded weights, with varied texts and hard batches; export to `model`.

    The tokenizer is the embedded one's, and the texts are those of `train_nano_colbert`.

    Raises:
        MissingExtra: if one of the packages is not there.
        InputError: if the folder's run has another length or seed.
    """
    return _train(folder, True, steps, until, seed, device, workers, fresh, say)


def _train(
    folder: Path,
    more: bool,
    steps: int | None,
    until: int | None,
    seed: int | None,
    device: str,
    workers: int,
    fresh: bool,
    say: Callable[[str], None],
) -> Path:
    from lfm2_retrieval import nano
    from lfm2_retrieval.corpus.build import held_out

    length, chosen = begin_run(
        folder,
        steps=steps,
        seed=seed,
        fresh=fresh,
        length=nano.MORE_STEPS if more else nano.STEPS,
        also=("tokenizer.json",),
    )
    recipe = nano.more if more else nano.recipe
    plan = recipe(length) if chosen is None else recipe(length, chosen)
    concepts = _concepts(folder, say)
    begin = None
    if more:
        begin, tokenizer = nano.embedded()
    else:
        tokenizer = _tokenizer(folder, concepts, say)
    note_run(folder, steps=length, seed=plan.seed)
    name = "nano-colbert-more" if more else "nano-colbert"
    say(f"{name}: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint to go on from")
    model = nano.train(
        plan,
        folder,
        tokenizer,
        concepts,
        held_out(),
        begin=begin,
        until=until,
        device=device,
        workers=workers,
        say=say,
    )
    nano.export(model, tokenizer, folder / "model", card=_card())
    return folder / "model"


def _concepts(folder: Path, say: Callable[[str], None]) -> list[Concept]:
    """The training texts, built if they are not there yet."""
    from lfm2_retrieval.corpus.build import CORPUS, build, read, write

    path = folder / CORPUS
    if not path.exists():
        say("reading the message catalogs (a minute)")
        train, _ = build([str(folder / "packages"), *sys.path], say=say)
        write(path, train)
    return read(path)


def _tokenizer(folder: Path, concepts: list[Concept], say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer, trained if it is not there yet."""
    from tokenizers import Tokenizer

    from lfm2_retrieval import nano
    from lfm2_retrieval.corpus.tokenizer import tokenizer_files, train_tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        say("training the tokenizer (a minute)")
        texts = (text for concept in concepts for text in concept.texts.values())
        files = tokenizer_files(train_tokenizer(texts, nano.VOCABULARY))
        path.write_text(files["tokenizer.json"], encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _card() -> str:
    """The model card: what it is, what it learnt from, under which licences."""
    from lfm2_retrieval.corpus.sources import (
        CLDR_LICENCE,
        HELD_OUT_PACKAGES,
        MORE_SOURCES,
        SOURCES,
        requirements,
    )

    pinned = requirements()
    rows = [
        f"| {source.package} | {pinned[source.package]} | {source.licence} |"
        for source in (*SOURCES, *MORE_SOURCES)
        if source.package not in HELD_OUT_PACKAGES
    ]
    names = [f"| {name} | {pinned[name]} | {CLDR_LICENCE} |" for name in ("Babel", "emoji")]
    return "\n".join(
        [
            "# nano-colbert",
            "",
            "A tiny bidirectional LFM2 for late-interaction search across languages, trained by",
            "`lfm2-mm train nano-colbert`, then `nano-colbert-more`, on message catalogs, CLDR",
            "names and sentences of our own, in en, de, fr, es, it, pt, ru, ja, ko, zh and ar. A",
            "demonstration and a test object; it does not know real corpora.",
            "",
            "Trained on texts of these packages (held out: " + ", ".join(HELD_OUT_PACKAGES) + "):",
            "",
            "| package | version | licence of what was read |",
            "| :-- | :-- | :-- |",
            *names,
            *rows,
            "",
        ]
    )


RECIPES: Mapping[str, Recipe] = {
    "nano-colbert": train_nano_colbert,
    "nano-colbert-more": train_nano_colbert_more,
}
"""What `train` can make, by name."""
