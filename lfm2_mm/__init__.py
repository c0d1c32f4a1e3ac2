"""lfm2_mm: run, serve, search with, evaluate and train the LFM2 multimodal family.

This face is lazy: importing the package imports no torch; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "Answer": "lfm2_mm.model",
    "Constraint": "lfm2_mm.constrain",
    "Done": "lfm2_mm.events",
    "Engine": "lfm2_mm.engine",
    "Lfm2Error": "lfm2_mm.errors",
    "Model": "lfm2_mm.model",
    "Sampling": "lfm2_mm.sampling",
    "TextDelta": "lfm2_mm.events",
    "Timings": "lfm2_mm.events",
    "Usage": "lfm2_mm.events",
    "load": "lfm2_mm.loading",
}

__all__ = [  # noqa: RUF100
    "Answer",
    "Constraint",
    "Done",
    "Engine",
    "Lfm2Error",
    "Model",
    "Sampling",
    "TextDelta",
    "Timings",
    "Usage",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from lfm2_mm.constrain import Constraint
    from lfm2_mm.engine import Engine
    from lfm2_mm.errors import Lfm2Error
    from lfm2_mm.events import Done, TextDelta, Timings, Usage
    from lfm2_mm.loading import load
    from lfm2_mm.model import Answer, Model
    from lfm2_mm.sampling import Sampling


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_mm' has no attribute {name!r}")
    return getattr(import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
