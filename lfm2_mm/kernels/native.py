"""The compiled library: found, checked, and set to the instruction sets that this CPU has.

Whoever calls a kernel asks `function` for it, and computes with torch where that is None. This
module knows the library's few general functions; each kernel's arguments stand beside its twin.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lfm2_mm.errors import SettingError

__all__ = [
    "LIBRARY",
    "CpuPath",
    "NativeStatus",
    "choose",
    "function",
    "library",
    "status",
    "threads",
]

LIBRARY = Path(__file__).parent / "_native.so"
CpuPath = Literal["torch", "plain", "avx2", "avx512", "amx", "neon"]

_INTERFACE = 2  # as in src/dispatch.cpp
_PATHS = ("plain", "avx2", "avx512", "amx", "neon")  # by number, as in src/native.h


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Which path computes, and why.

    Attributes:
        path: "torch" where there is no library, else the instruction sets in use.
        features: The paths that this CPU could run, least first; empty without a library.
        reason: One clause for a person.
    """

    path: CpuPath
    features: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class _Loaded:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


def library() -> ctypes.CDLL | None:
    """The library, set to the path in force; None where torch computes.

    Raises:
        SettingError: LFM2_MM_CPU or LFM2_MM_NATIVE has an unknown value.
    """
    return _load(*_asked()).library


def function(name: str, arguments: Sequence[Any], result: Any = None) -> Any | None:
    """An exported function with its types set; None where torch computes, or the library lacks it.

    Args:
        name: As in the sources.
        arguments: ctypes of the arguments.
        result: ctypes of the result.
    """
    found = library()
    if found is None:
        return None
    return _function(found, name, tuple(arguments), result)


def choose(path: CpuPath | None) -> str:
    """Use this path from now on (None: the best) and return the one then in force; for tests.

    A path that the CPU lacks becomes the best one it has.
    """
    found = library()
    if found is None:
        return "torch"
    return _PATHS[found.lfm2_choose(-1 if path is None else _PATHS.index(path))]


def threads() -> int:
    """How many threads a kernel shall use: as many as torch does, whose OpenMP it shares."""
    import torch

    return torch.get_num_threads()


def status() -> NativeStatus:
    """Which path computes, and why; settings that cannot be used raise `SettingError`."""
    loaded = _load(*_asked())
    if loaded.library is None:
        return NativeStatus("torch", (), loaded.reason)
    bits = loaded.library.lfm2_paths()
    features = tuple(name for i, name in enumerate(_PATHS) if bits >> i & 1)
    path = _PATHS[loaded.library.lfm2_choose(_wanted(_asked()[1]))]
    reason = loaded.reason
    asked = _asked()[1]
    if asked and asked != path:
        reason = f"LFM2_MM_CPU={asked} is more than this CPU can run"
    elif asked:
        reason = f"LFM2_MM_CPU={asked}"
    if not loaded.library.lfm2_parallel_built():
        reason += ", without OpenMP: one thread"
    return NativeStatus(cast(CpuPath, path), features, reason)


def _asked() -> tuple[bool, str]:
    """What the environment says: whether to use the library at all, and which path."""
    switch = os.environ.get("LFM2_MM_NATIVE", "")
    if switch not in ("", "0", "1"):
        raise SettingError(f"LFM2_MM_NATIVE is {switch!r}: set it to 0 or 1, or not at all")
    path = os.environ.get("LFM2_MM_CPU", "")
    if path and path not in _PATHS:
        raise SettingError(f"LFM2_MM_CPU is {path!r}: set it to one of {', '.join(_PATHS)}")
    return switch != "0", path


def _wanted(path: str) -> int:
    return _PATHS.index(path) if path else -1


@functools.cache
def _load(wanted: bool, path: str, where: Path = LIBRARY) -> _Loaded:
    if not wanted:
        return _Loaded(None, "LFM2_MM_NATIVE=0")
    if not where.exists():
        return _Loaded(
            None,
            "no library was built when the package was installed (install a C++ compiler, then "
            "the package again)",
        )
    import torch  # noqa: F401  # first: the library then shares its OpenMP

    try:
        found = ctypes.CDLL(str(where))
        interface = found.lfm2_interface()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"{where.name} cannot be loaded ({error}); install the package again")
    if interface != _INTERFACE:
        return _Loaded(
            None,
            f"{where.name} has interface {interface}, not {_INTERFACE}: install the package again",
        )
    found.lfm2_choose(_wanted(path))
    return _Loaded(found, "the best that this CPU can run")


@functools.cache
def _function(found: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any) -> Any | None:
    try:
        made = found[name]  # a new object: the types are this caller's
    except AttributeError:
        return None
    made.argtypes, made.restype = list(arguments), result
    return made
