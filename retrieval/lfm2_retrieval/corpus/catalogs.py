"""Message catalogs inside installed packages, as texts by language.

A message is found under its file and its key, in any of our languages. Reads plain data only and
imports nothing of the packages: gettext `.mo` and JSON here, others by `formats`. Knows no
licences and no splits.
"""

from __future__ import annotations

import gettext
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm2_retrieval.corpus.formats import module_texts, properties_texts
from lfm2_retrieval.corpus.text import clean

__all__ = ["LANGUAGES", "messages"]

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ja", "ko", "zh", "ar")
"""The languages of nano-colbert."""

# the names under which catalogs keep a language, the preferred one first
_LOCALES = {
    "en": ("en", "en_us", "en_gb"),
    "de": ("de", "de_de"),
    "fr": ("fr", "fr_fr"),
    "es": ("es", "es_es"),
    "it": ("it", "it_it"),
    "pt": ("pt_br", "ptbr", "pt", "pt_pt"),
    "ru": ("ru", "ru_ru"),
    "ja": ("ja", "ja_jp"),
    "ko": ("ko", "ko_kr"),
    "zh": ("zh_hans", "zh_cn", "zhcn", "zh", "zh_hans_cn"),
    "ar": ("ar", "ar_sa", "ar_eg", "ar_ae", "ar_ar"),
}
_RANK = {name: (lang, i) for lang, names in _LOCALES.items() for i, name in enumerate(names)}
_HASH = re.compile(r"-[0-9a-f]{16,}$")
_LONGEST = {"en": 220, "de": 280, "fr": 280, "es": 280, "it": 280, "pt": 280, "ru": 280}
_TARGET_LONGEST = 160
_LISTS = ("\0terms", "\0aliases")  # words that a thing is found by: others in each language
_WORD = re.compile(r"[A-Za-z]{3}")
_SCRIPT = {
    "ru": re.compile("[\u0400-\u04ff]"),
    "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]"),
    "ko": re.compile("[\uac00-\ud7af]"),
    "zh": re.compile("[\u4e00-\u9fff]"),
    "ar": re.compile("[\u0600-\u06ff]"),
}


def messages(
    files: Iterable[tuple[str, Path]], names: str = "", without: str = ""
) -> Iterator[dict[str, str]]:
    """The messages of some files, each as a cleaned text by language, English among them.

    Args:
        files: Names relative to the package's root, with where they lie.
        names: A regular expression that matches the names of those to read, where they do not
            tell the language as usual. Its group `locale` does, and is empty or missing for
            English; files that agree in its other groups belong together.
        without: The outermost name in a JSON file whose messages are left out.
    """
    pattern = re.compile(names) if names else None
    groups: dict[str, dict[str, tuple[int, Path]]] = {}
    for name, path in sorted(files):
        found = _locale(name) if pattern is None else _matched(pattern.fullmatch(name))
        if found is None:
            continue
        group, language, rank = found
        held = groups.setdefault(group, {})
        if language not in held or rank < held[language][0]:
            held[language] = (rank, path)
    for name in sorted(groups):
        if len(groups[name]) > 1 or name.endswith((".mo", ".po")):
            yield from _merged({lang: path for lang, (_, path) in groups[name].items()}, without)


def _locale(name: str) -> tuple[str, str, int] | None:
    """The file's group (its name without the language), its language and the language's rank."""
    parts = name.split("/")
    suffix = Path(name).suffix
    if suffix not in (".mo", ".json"):
        return None
    parts[-1] = _HASH.sub("", parts[-1].removesuffix(suffix))
    for i in reversed(range(len(parts))):
        found = _RANK.get(parts[i].replace("-", "_").lower())
        if found is not None:
            group = "/".join([*parts[:i], "*", *parts[i + 1 :]]) + suffix
            return group, *found
    return None


def _matched(found: re.Match[str] | None) -> tuple[str, str, int] | None:
    if found is None:
        return None
    known = _RANK.get((found["locale"] or "en").replace("-", "_").lower())
    others = (part or "" for name, part in found.groupdict().items() if name != "locale")
    return None if known is None else ("\0".join(others) + Path(found[0]).suffix, *known)


def _merged(files: Mapping[str, Path], without: str) -> Iterator[dict[str, str]]:
    """One dict for each message that is there in English and at least one more language."""
    by_key: dict[str, dict[str, str]] = {}
    gettext_files = False
    for language, path in files.items():
        gettext_files = path.suffix in (".mo", ".po")
        read = {".mo": _mo, ".po": _po}.get(path.suffix, _other)
        entries = read(path)
        for message, text in entries:
            if not (without and message.startswith(f"\0{without}\0")):
                by_key.setdefault(message, {})[language] = text
    for message, texts in by_key.items():
        if gettext_files and "en" not in texts:
            texts["en"] = message  # gettext's keys are the English texts
        cleaned = {language: clean(text) for language, text in texts.items()}
        if _is_english(cleaned.get("en", "")):
            kept = {lang: text for lang, text in cleaned.items() if _is_kept(lang, text, cleaned)}
            if len(kept) > 1:
                yield kept


def _is_english(text: str) -> bool:
    return 3 <= len(text) <= _LONGEST["en"] and text.isascii() and bool(_WORD.search(text))


def _is_kept(language: str, text: str, texts: Mapping[str, str]) -> bool:
    if language == "en":
        return True
    if language in _SCRIPT and not _SCRIPT[language].search(text):
        return False  # not translated
    longest = _LONGEST.get(language, _TARGET_LONGEST)
    return 1 <= len(text) <= longest and text.casefold() != texts["en"].casefold()


def _mo(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        catalog: dict[Any, Any] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for message, text in catalog.items():
        if isinstance(message, tuple):  # plural forms: the first stands for all
            if message[1] != 0:
                continue
            message = message[0]
        if message and isinstance(text, str) and text:
            yield message.split("\x04")[-1], text


def _po(path: Path) -> Iterator[tuple[str, str]]:
    from babel.messages.pofile import read_po

    with path.open("rb") as file:
        for message in read_po(file):
            # of plural forms the first stands for all
            name = message.id if isinstance(message.id, str) else message.id[0]
            text = (
                message.string if isinstance(message.string, str) else (message.string or ("",))[0]
            )
            if name and text and not message.fuzzy:
                yield name, text


def _other(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix in (".properties", ".txt"):
        yield from properties_texts(text)
    elif path.suffix == ".json":
        try:
            data = json.loads(text)
        except ValueError:
            return
        if isinstance(data, dict) and len(data) == 1:  # some files name their language outermost
            (name,) = data
            data = data[name] if name.replace("-", "_").lower() in _RANK else data
        yield from _leaves(data, "")
    else:
        for name, inner in module_texts(text):
            if inner.startswith("{\n"):  # JSON in a string
                yield from _leaves(json.loads(inner), "")
            else:
                yield name, inner


def _leaves(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{at}\x00{name}")
    elif isinstance(value, str) and value and not at.endswith(_LISTS):
        yield at, value
