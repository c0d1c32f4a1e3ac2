"""Metadata filters: what a user writes becomes conditions, conditions become a mask of documents.

`{"lang": "de"}`, `{"year": {">=": 2020}}`, `{"path": {"glob": "manual/*"}}`, a list means any of;
or as text `lang=de,fr`, `year>=2020`, `path~manual/*`. Several conditions must all hold. Knows no
scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import FilterError, InputError
from lfm2_retrieval.index.segment import Record

__all__ = ["KEY", "Columns", "Condition", "Filter", "Scalar", "check_metadata", "parse_filter"]

Scalar = str | int | float | bool
Filter = str | Sequence[str] | Mapping[str, Any]

KEY = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_TEXT = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(>=|<=|!=|==?|>|<|~)\s*(.*)", re.ASCII | re.DOTALL)
_OPERATORS = ("=", "!=", ">", ">=", "<", "<=", "glob", "in")
_HELP = "write it as lang=de, year>=2020 or path~manual/*"


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on one key.

    Attributes:
        key: A metadata key, or `id`, `path`, `title`, `lang`.
        operator: One of `=`, `!=`, `>`, `>=`, `<`, `<=`, `glob`; the wanted value may be a tuple
            for `=`, `!=` and `glob`.
        wanted: What to compare with.
    """

    key: str
    operator: str
    wanted: tuple[Scalar, ...]

    def holds(self, value: Scalar | None) -> bool:
        """Whether a stored value fits; one that is missing fits `!=` only."""
        if self.operator == "!=":
            return not any(_same(value, one) for one in self.wanted)
        if value is None:
            return False
        if self.operator == "=":
            return any(_same(value, one) for one in self.wanted)
        if self.operator == "glob":
            return any(fnmatchcase(str(value), str(one)) for one in self.wanted)
        return any(_ordered(value, self.operator, one) for one in self.wanted)


def _same(value: Scalar | None, wanted: Scalar) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    if isinstance(value, str) != isinstance(wanted, str):
        number = _number(value), _number(wanted)
        return number[0] is not None and number[0] == number[1]
    return value == wanted


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def _ordered(value: Scalar, operator: str, wanted: Scalar) -> bool:
    numbers = _number(value), _number(wanted)
    if None not in numbers:
        return _COMPARE[operator](*numbers)
    if isinstance(value, str) and isinstance(wanted, str):
        return _COMPARE[operator](value, wanted)
    return False


def parse_filter(filter: Filter | None) -> tuple[Condition, ...]:
    """Read a filter.

    Raises:
        FilterError: if it cannot be understood.
    """
    if filter is None:
        return ()
    if isinstance(filter, str):
        return (_from_text(filter),)
    if isinstance(filter, Mapping):
        return tuple(one for key, value in filter.items() for one in _from_value(key, value))
    return tuple(_from_text(one) for one in filter)


def _from_text(text: Any) -> Condition:
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None or not found[3].strip():
        raise FilterError(f"the filter {text!r} cannot be understood; {_HELP}")
    operator = {"~": "glob", "==": "="}.get(found[2], found[2])
    wanted = found[3].strip()
    parts = wanted.split(",") if operator in ("=", "!=", "glob") else [wanted]
    return Condition(found[1], operator, tuple(part.strip() for part in parts))


def _from_value(key: Any, value: Any) -> Iterable[Condition]:
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise FilterError(f"the filter names the key {key!r}; {_HELP}")
    pairs = value.items() if isinstance(value, Mapping) else [("=", value)]
    for operator, wanted in pairs:
        if operator not in _OPERATORS:
            raise FilterError(
                f"the filter on {key!r} has the operator {operator!r}; use one of "
                f"{', '.join(_OPERATORS)}"
            )
        several = isinstance(wanted, list | tuple | set | frozenset)
        values = tuple(wanted) if several else (wanted,)
        if not values or not all(isinstance(one, str | int | float | bool) for one in values):
            raise FilterError(
                f"the filter on {key!r} compares with {wanted!r}; use texts, numbers or booleans"
            )
        if several and operator in (">", ">=", "<", "<="):
            raise FilterError(
                f"the filter on {key!r} compares {operator} with the list {wanted!r}; use one value"
            )
        yield Condition(key, "=" if operator == "in" else operator, values)


class Columns:
    """The values of some documents by key: each different value once, and which a document has.

    Args:
        records: The documents.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        values: dict[str, dict[tuple[type, Any], int]] = {}
        columns: dict[str, list[tuple[int, int]]] = {}
        count = 0
        for count, record in enumerate(records, 1):
            own = {"id": record.id, "path": record.path, "title": record.title}
            own["lang"] = record.language
            for key, value in {**own, **record.metadata}.items():
                if value is not None:
                    known = values.setdefault(key, {})
                    number = known.setdefault((type(value), value), len(known))
                    columns.setdefault(key, []).append((count - 1, number))
        self._count = count
        self._values = {key: [v for _, v in known] for key, known in values.items()}
        self._columns: dict[str, NDArray[np.int32]] = {}
        for key, pairs in columns.items():
            column = np.full(count, len(self._values[key]), np.int32)
            where = np.array(pairs, np.int32)
            column[where[:, 0]] = where[:, 1]
            self._columns[key] = column

    def mask(self, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
        """Which documents fit all conditions, bool [documents]."""
        mask = np.ones(self._count, bool)
        for one in conditions:
            if one.key not in self._columns:
                mask &= one.holds(None)
                continue
            fits = [one.holds(value) for value in (*self._values[one.key], None)]
            mask &= np.array(fits, bool)[self._columns[one.key]]
        return mask


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Scalar]:
    """A copy of a document's metadata.

    Raises:
        InputError: if a key or value cannot be stored.
    """
    checked: dict[str, Scalar] = {}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise InputError(
                f"metadata has the key {key!r}; use letters, digits, _ . - and begin with a letter"
            )
        if not isinstance(value, str | int | float | bool) or value != value:
            raise InputError(f"metadata {key!r} is {value!r}; store a text, a number or a boolean")
        if isinstance(value, str) and (control := re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value)):
            raise InputError(
                f"metadata {key!r} holds the control character {control[0]!r}; remove it"
            )
        checked[key] = value
    return checked
