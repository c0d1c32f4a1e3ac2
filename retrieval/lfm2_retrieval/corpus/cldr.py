"""Names and patterns of CLDR: countries, languages, currencies, units, dates, lists, emoji names.

The names come from Babel, those of emoji from the package `emoji`. They serve twice: as texts of
their own, and as fillings of sentence frames. Knows no file format and no split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from lfm2_mm.errors import MissingExtra
from lfm2_retrieval.corpus.catalogs import LANGUAGES
from lfm2_retrieval.corpus.sources import Package

if TYPE_CHECKING:
    from babel import Locale

__all__ = ["Names", "emoji_names", "names", "rendered"]

Names = Mapping[str, str]
"""One thing's name by language, English among them."""

_LOCALES = {**{language: language for language in LANGUAGES}, "pt": "pt_BR", "zh": "zh_Hans"}


@cache
def _locales() -> dict[str, Locale]:
    try:
        from babel import Locale
    except ImportError:
        raise MissingExtra(
            "the training texts need Babel, which is not installed; run `pip install "
            "'lfm2-mm[train]'`"
        ) from None
    return {language: Locale.parse(name) for language, name in _LOCALES.items()}


def _by_code(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Names]:
    """Tables of languages turned round: code to names."""
    found: dict[str, dict[str, str]] = {}
    for language, table in tables.items():
        for code, name in table.items():
            if isinstance(name, str) and name:
                found.setdefault(str(code), {})[language] = name
    return {code: found[code] for code in sorted(found) if "en" in found[code]}


@cache
def names() -> dict[str, tuple[Names, ...]]:
    """Names by kind: territory, language, script, currency, unit, month, weekday, city."""
    locales = _locales()

    def kind(read: Any) -> tuple[Names, ...]:
        tables = {language: dict(read(locale)) for language, locale in locales.items()}
        return tuple(_by_code(tables).values())

    def titles(units: Mapping[str, Any]) -> dict[str, Any]:
        return {code: forms.get("long") or forms.get("short") for code, forms in units.items()}

    data = {language: locale._data for language, locale in locales.items()}
    regions = kind(lambda locale: locale.territories)
    return {
        "territory": tuple(n for n in regions if not n["en"].startswith("Outlying")),
        "language": kind(lambda locale: locale.languages),
        "script": kind(lambda locale: locale.scripts),
        "currency": kind(lambda locale: locale.currencies),
        "unit": tuple(
            _by_code({lang: titles(d["unit_display_names"]) for lang, d in data.items()}).values()
        ),
        "month": kind(lambda locale: locale.months["stand-alone"]["wide"]),
        "weekday": kind(lambda locale: locale.days["stand-alone"]["wide"]),
        "city": kind(
            lambda locale: {
                zone: facts.get("city", zone.rpartition("/")[2].replace("_", " "))
                for zone, facts in locale.time_zones.items()
                if "/" in zone and "city" in facts
            }
        ),
    }


def emoji_names(found: Package) -> tuple[Names, ...]:
    """Names of things that have an emoji: animals, food, tools, faces, activities.

    Args:
        found: The package `emoji`.
    """
    tables = {}
    for language in LANGUAGES:
        stem = "emoji" if language == "en" else f"emoji_{language}"
        path = Path(str(found.locate_file(f"emoji/unicode_codes/{stem}.json")))
        data = json.loads(path.read_text(encoding="utf-8"))
        tables[language] = {
            sign: _plain(value["en"] if isinstance(value, dict) else value)
            for sign, value in data.items()
            if not isinstance(value, dict) or "en" in value
        }
    every = _by_code(tables).values()
    unique = {n["en"]: n for n in reversed(list(every)) if not _is_variant(n)}
    return tuple(unique[name] for name in sorted(unique))


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("  ", " ").strip()


def _is_variant(name: Names) -> bool:
    """Whether it is one of the many skin tones or families, or a country's flag."""
    english = name["en"]
    return "skin tone" in english or "," in english or name.get("de", "").startswith("flagge ")


def rendered(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Dates, times, amounts, quantities and lists of names, written as each language does."""
    from babel.dates import format_date
    from babel.lists import format_list
    from babel.numbers import format_currency, format_percent
    from babel.units import format_unit

    locales, known = _locales(), names()
    rng = Random(f"rendered {seed}")
    full = [n for kind in ("territory", "language", "city") for n in known[kind] if len(n) == 11]
    units = sorted(set.intersection(*(set(loc._data["unit_patterns"]) for loc in locales.values())))
    for _ in range(count):
        kind = rng.choice(("date", "date", "unit", "list", "list", "money", "percent"))
        if kind == "date":
            day = date(1950, 1, 1) + timedelta(days=rng.randrange(36500))
            style = rng.choice(("full", "full", "long", "medium"))
            texts = {lang: format_date(day, style, loc) for lang, loc in locales.items()}
        elif kind == "unit":
            number, unit = rng.choice((1, 2, 3, 5, 10, 20, 25, 100)), rng.choice(units)
            texts = {
                lang: format_unit(number, unit, "long", locale=loc) for lang, loc in locales.items()
            }
        elif kind == "list":
            chosen: Sequence[Names] = rng.sample(full, rng.randint(2, 3))
            joined: Literal["standard", "or"] = rng.choice(("standard", "standard", "or"))
            texts = {
                lang: format_list([n[lang] for n in chosen], joined, loc)
                for lang, loc in locales.items()
            }
        elif kind == "money":
            amount = rng.choice((1, 5, 20, 99.95, 120, 1500, 20000))
            code = rng.choice(("EUR", "USD", "JPY", "GBP", "CNY", "KRW", "CHF", "INR", "BRL"))
            texts = {
                lang: format_currency(amount, code, locale=loc, format_type="name")
                for lang, loc in locales.items()
            }
        else:
            share = rng.randrange(1, 100) / 100
            texts = {lang: format_percent(share, locale=loc) for lang, loc in locales.items()}
        yield texts
