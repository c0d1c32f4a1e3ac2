"""The language of a text, by py3langid: offline, and silent where it is not certain.

This module knows no document.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Any

from lfm2_mm.errors import MissingExtra

__all__ = ["LANGUAGES", "detect"]

# Languages of much written text. The library knows 140; among so many, short texts go astray into
# the small ones.
LANGUAGES = tuple(
    "ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu hy id is it ja ka kk km kn ko lo "
    "lt lv mk ml mn mr ms my ne nl no pa pl pt ro ru si sk sl sq sr sv sw ta te th tl tr uk ur "
    "uz vi zh".split()
)

_FLOOR = 0.7  # probability below which no language is named
_MIN_LETTERS, _MIN_IDEOGRAPHS = 20, 6
_SLICE, _SLICES = 1000, 3
_NOISE = re.compile(r"https?://\S+|\S+@\S+|[\d_|#*=<>{}\[\]()/\\+~^`\"]+")
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0e7f]")


def detect(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, judged on slices of its start, middle and end.

    Returns:
        A member of `LANGUAGES`; None for a text that is short, or whose language is not clear.

    Raises:
        MissingExtra: if py3langid is not installed.
    """
    sample = _NOISE.sub(" ", _sample(text))
    letters = sum(letter.isalpha() for letter in sample)
    if letters < _MIN_LETTERS and len(_IDEOGRAPH.findall(sample)) < _MIN_IDEOGRAPHS:
        return None
    language, probability = _identifier().classify(sample)
    return str(language) if probability >= _FLOOR else None


def _sample(text: str) -> str:
    if len(text) <= _SLICE * _SLICES:
        return text
    step = (len(text) - _SLICE) // (_SLICES - 1)
    return "\n".join(text[i * step : i * step + _SLICE] for i in range(_SLICES))


@cache
def _identifier() -> Any:
    try:
        langid: Any = import_module("py3langid.langid")
    except ImportError as error:
        raise MissingExtra(
            "telling the language of documents needs the package 'py3langid', which is not "
            "installed: run pip install 'lfm2-mm[retrieval]'"
        ) from error
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
