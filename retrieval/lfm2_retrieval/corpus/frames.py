"""Texts written for this project, in eleven languages: everyday words, and sentences with slots.

Each frame says the same in every language; CLDR names go into its slots without inflection, so
sentences are built around them. Knows no split.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from random import Random

from lfm2_retrieval.corpus import cldr
from lfm2_retrieval.corpus.catalogs import LANGUAGES

__all__ = ["filled", "frames", "words"]


@cache
def frames() -> Mapping[str, Mapping[str, str]]:
    """Frame name to its sentence by language, from `frames.toml` beside this module."""
    text = (files(__package__) / "frames.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = tomllib.loads(text)
    return found


@cache
def words() -> tuple[Mapping[str, str], ...]:
    """Everyday words and short phrases by language, from `words.tsv` beside this module."""
    text = (files(__package__) / "words.tsv").read_text(encoding="utf-8")
    languages, *rows = (line.split("\t") for line in text.splitlines())
    return tuple(dict(zip(languages, row, strict=True)) for row in rows)


def filled(
    seed: int, count: int, things: Sequence[cldr.Names]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Every frame with so many fillings; without slots it comes once.

    Args:
        seed: Names the fillings.
        count: Fillings of each frame.
        things: What `{thing}` stands for.
    """
    known = {**cldr.names(), "thing": things}
    whole = {kind: [n for n in names if len(n) == len(LANGUAGES)] for kind, names in known.items()}
    for name, sentences in frames().items():
        slots = sorted(set(re.findall(r"\{(\w+)\}", sentences["en"])))
        rng = Random(f"frame {name} {seed}")
        seen = set()
        for _ in range(count if slots else 1):
            chosen = {slot: _choose(rng, slot, whole) for slot in slots}
            texts = {
                language: sentence.format_map({s: n[language] for s, n in chosen.items()})
                for language, sentence in sentences.items()
            }
            if texts["en"] not in seen:
                seen.add(texts["en"])
                yield name, texts


def _choose(rng: Random, slot: str, names: Mapping[str, Sequence[cldr.Names]]) -> cldr.Names:
    kind = slot.rstrip("0123456789")
    if kind == "number":
        return dict.fromkeys(LANGUAGES, str(rng.randint(2, 90)))
    return rng.choice(names[kind])
