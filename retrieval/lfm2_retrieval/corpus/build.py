"""Puts the training texts together: one JSON line for each thing that is said in two languages.

A concept is keyed by its English text without case and punctuation; the first translation into a
language wins. What a held-out package says is kept apart, unless a training package says the
same; what the committed held-out half says is never trained on. The outcome depends on the pinned
packages, that half and the seed only.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lfm2_mm.errors import InputError
from lfm2_retrieval.corpus import cldr, frames
from lfm2_retrieval.corpus.catalogs import LANGUAGES, messages
from lfm2_retrieval.corpus.sources import (
    HELD_OUT_FRAMES,
    HELD_OUT_PACKAGES,
    MORE_SOURCES,
    SOURCES,
    Package,
    find_packages,
    package_files,
)
from lfm2_retrieval.corpus.text import key

__all__ = ["CORPUS", "HELD_OUT", "Concept", "build", "held_out", "read", "write"]

CORPUS, HELD_OUT = "corpus.jsonl.gz", "held_out.jsonl.gz"
"""File names of the two halves."""

_RENDERED = 6000
_FILLINGS = 120


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing said in several languages.

    Attributes:
        source: The package it comes from, `cldr …`, `frame …` or `word`.
        texts: Text by language, English among them.
    """

    source: str
    texts: Mapping[str, str]

    @property
    def weight(self) -> int:
        """How many times as often as others it is drawn: what everyday texts are made of, more."""
        return {"word": 6, "cldr": 2, "frame": 2}.get(self.source.partition(" ")[0], 1)


def build(
    folders: list[str], *, seed: int = 0, say: Callable[[str], None] = print
) -> tuple[list[Concept], list[Concept]]:
    """Training and held-out concepts.

    Args:
        folders: Where the packages are: see `sources.find_packages`.
        seed: Names the fillings of frames, dates and lists.
        say: Told what each source gave.

    Raises:
        MissingExtra: if a package is not there.
    """
    packages = find_packages(folders)
    training: dict[str, dict[str, str]] = {}
    kept_out: dict[str, dict[str, str]] = {}
    origin: dict[str, str] = {}
    fixed = {key(concept.texts["en"]) for concept in held_out()}
    for source, texts in _all(packages, seed, say):
        name = key(texts["en"])
        kind, _, what = source.partition(" ")
        apart = kind in HELD_OUT_PACKAGES or (kind == "frame" and what in HELD_OUT_FRAMES)
        if name in fixed and not apart:
            continue
        concepts = kept_out if apart else training
        held = concepts.setdefault(name, {})
        origin.setdefault(f"{apart}{name}", source)
        for language in LANGUAGES:
            if language in texts:
                held.setdefault(language, " ".join(texts[language].split()))
    train = [Concept(origin[f"False{name}"], texts) for name, texts in training.items()]
    kept = [
        Concept(origin[f"True{name}"], texts)
        for name, texts in kept_out.items()
        if name not in training
    ]
    return train, kept


def _all(
    packages: Mapping[str, Package], seed: int, say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, str]]]:
    counts: Counter[str] = Counter()
    for source, texts in _every(packages, seed):
        if len(texts) > 1:
            counts[source.partition(" ")[0]] += 1
            yield source, texts
    say(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _every(packages: Mapping[str, Package], seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    for kind, named in cldr.names().items():
        for names in named:
            yield f"cldr {kind}", dict(names)
    things = cldr.emoji_names(packages["emoji"])
    for names in things:
        yield "cldr emoji", dict(names)
    for word in frames.words():
        yield "word", dict(word)
    for texts in cldr.rendered(seed, _RENDERED):
        yield "cldr rendered", texts
    for name, texts in frames.filled(seed, _FILLINGS, things):
        yield f"frame {name}", texts
    for source in (*SOURCES, *MORE_SOURCES):
        found = package_files(packages[source.package], source.under)
        for texts in messages(found, source.names, source.without):
            yield source.package, texts


def write(path: Path, concepts: Iterable[Concept]) -> None:
    """Write concepts as gzipped JSON lines, at once or not at all; equal concepts, equal bytes."""
    rows = ({"source": concept.source, **concept.texts} for concept in concepts)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(part, path)


def read(path: Path) -> list[Concept]:
    """Read what `write` wrote.

    Raises:
        InputError: if the file is not of that kind.
    """
    try:
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        return [Concept(row.pop("source"), row) for row in rows]
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"the texts in {str(path)!r} cannot be read ({error}); build them again"
        ) from None


def held_out() -> list[Concept]:
    """The texts of evaluation, as they were fixed before the first training run."""
    return read(Path(str(files(__package__).joinpath(HELD_OUT))))
