"""The scene world of nano-vl: drawn scenes, questions about them, and the tokenizer they need.

Imports no torch and nothing else of this package.
"""

from __future__ import annotations

from .draw import SIGN_LABEL, label_map, render
from .questions import CORE_KINDS, KINDS, QA, ask_all, describe, for_evaluation, pick
from .sample import (
    CORE,
    EXTRA,
    MORE_SHAPES,
    SIGNS,
    SMALL_THINGS,
    Profile,
    Sample,
    canvas,
    generate,
    generate_scene,
    stream,
)
from .text import build_tokenizer
from .world import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    CORE_SHAPES,
    EXTRA_COLOURS,
    EXTRA_SHAPES,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    UNNAMED,
    WORDS,
    Ground,
    Scene,
    Sign,
    Thing,
)

__all__ = [
    "ALL_COLOURS",
    "ALL_SHAPES",
    "COLOURS",
    "CORE",
    "CORE_KINDS",
    "CORE_SHAPES",
    "EXTRA",
    "EXTRA_COLOURS",
    "EXTRA_SHAPES",
    "HELD_OUT_PAIRS",
    "HELD_OUT_WORDS",
    "KINDS",
    "MORE_SHAPES",
    "QA",
    "SIGNS",
    "SIGN_LABEL",
    "SMALL_THINGS",
    "UNNAMED",
    "WORDS",
    "Ground",
    "Profile",
    "Sample",
    "Scene",
    "Sign",
    "Thing",
    "ask_all",
    "build_tokenizer",
    "canvas",
    "describe",
    "for_evaluation",
    "generate",
    "generate_scene",
    "label_map",
    "pick",
    "render",
    "stream",
]
