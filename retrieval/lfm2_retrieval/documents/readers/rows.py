"""Tables of documents: csv, tsv and jsonl, one extract for each row.

Columns of text are joined to the row's text; numbers, dates, booleans and labels that recur become
metadata. Which is which is decided on the first rows.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Extract, Limits, Scalar
from lfm2_retrieval.documents.readers.decoding import clean, decode
from lfm2_retrieval.documents.readers.scanning import lines

__all__ = ["read"]

Record = tuple[int, dict[str, Scalar]]  # the line it starts on, its columns

_LOOK = 1000  # rows that decide which columns are text
_LONG = 20  # characters on average from which a column is text
_TEXT = frozenset(
    "text body content title name headline question answer description summary abstract message "
    "comment notes passage document subject instruction instructions".split()
)
_TITLES = ("title", "headline", "name", "subject", "question")
_LANGUAGES = ("lang", "language")
_RESERVED = frozenset({"path", "format", "lang", "language", "title"})
_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,15})")  # a leading zero marks a code, not a number
_DECIMAL = re.compile(r"-?(?:0|[1-9]\d*)\.\d+(?:[eE][-+]?\d+)?")
_DATE = re.compile(r"\d{4}-\d\d(?:-\d\d(?:[T ][\d:.+Z-]*)?)?")
_LINK = re.compile(r"https?://\S+")
_HUGE = 10**300  # JSON's integers know no bound, floats do
_DEPTH, _MAX_VALUE, _MAX_TITLE = 5, 1000, 200


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The rows of a table file.

    Raises:
        DocumentError: if the file holds no rows, too many, or (after all the others) some that
            are not JSON objects.
    """
    text = decode(data, limits)
    suffix = PurePosixPath(name.lower()).suffix
    bad: list[int] = []
    if suffix in (".jsonl", ".ndjson"):
        records, form = _json_records(text, bad), "jsonl"
    else:
        csv.field_size_limit(limits.characters)
        records, form = _csv_records(text, "\t" if suffix == ".tsv" else _delimiter(text)), "csv"
    head = list(islice(records, _LOOK))
    texts, title = _text_columns([columns for _, columns in head])
    number = 0
    for number, (line, columns) in enumerate(chain(head, records), 1):
        if number > limits.rows:
            raise DocumentError(
                f"it has more than the {limits.rows} rows that are allowed: split it"
            )
        extract = _extract(columns, line, number, form, texts, title)
        if extract is not None:
            yield extract
    if bad:
        raise DocumentError(
            f"{len(bad)} of its lines are no JSON objects, the first on line {bad[0]}: "
            "mend them (the other rows were read)"
        )
    if not number:
        raise DocumentError("it holds no rows: there is nothing to index")


# ---- records ----


def _json_records(text: str, bad: list[int]) -> Iterator[Record]:
    for line in lines(text):
        if line.blank:
            continue
        try:
            value = json.loads(line.text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            bad.append(line.number)
            continue
        yield line.number, dict(_flat(value, "", _DEPTH))


def _flat(value: Any, name: str, depth: int) -> Iterator[tuple[str, Scalar]]:
    """Nested objects as dotted columns; lists of plain values as lines."""
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), depth - 1)
    elif isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        yield name, clean("\n".join(str(v) for v in value))
    elif isinstance(value, str):
        yield name, clean(value)
    elif isinstance(value, bool):
        yield name, value
    elif isinstance(value, int):
        yield name, value if abs(value) < 2**63 else float(min(max(value, -_HUGE), _HUGE))
    elif isinstance(value, float):
        yield name, value if math.isfinite(value) else str(value)
    elif value is not None:
        yield name, clean(json.dumps(value, ensure_ascii=False))


def _delimiter(text: str) -> str:
    first = text[: text.find("\n") if "\n" in text else 10_000][:10_000]
    outside = re.sub(r'"[^"]*"', "", first)
    return max(",;\t|", key=outside.count)


def _csv_records(text: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            at, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = _header(cells)
                if names is not None:
                    continue
                names = []
            yield (
                at,
                {
                    names[i] if i < len(names) else f"column_{i + 1}": _typed(cell)
                    for i, cell in enumerate(cells)
                    if cell.strip()
                },
            )
    except csv.Error as error:
        raise DocumentError(f"line {reader.line_num} is no csv ({error}): mend it") from error


def _header(cells: list[str]) -> list[str] | None:
    """The names of the columns, or None if the first row is data already."""
    names = [cell.strip() for cell in cells]
    plain = all(name and len(name) <= 64 and isinstance(_typed(name), str) for name in names)
    return names if plain and len(set(names)) == len(names) else None


def _typed(cell: str) -> Scalar:
    cell = cell.strip()
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if len(cell) < 40 and _DECIMAL.fullmatch(cell):
        return float(cell)
    return {"true": True, "false": False}.get(cell.lower(), cell)


# ---- rows ----


def _text_columns(head: list[dict[str, Scalar]]) -> tuple[frozenset[str], str | None]:
    """The columns that are text, and the one that names a row.

    Text is a column with a telling name, with long values on average, or whose values are words
    that hardly ever recur: names of the rows.
    """
    seen: dict[str, list[str]] = {}
    for columns in head:
        for name, value in columns.items():
            if isinstance(value, str) and not _DATE.fullmatch(value) and not _LINK.fullmatch(value):
                seen.setdefault(name, []).append(value)
    seen = {name: values for name, values in seen.items() if name.lower() not in _LANGUAGES}
    texts, names = set(), []
    for name, values in seen.items():
        long = sum(map(len, values)) >= _LONG * len(values)
        told = name.lower().rpartition(".")[2] in _TEXT
        words = [value for value in values if not any(c.isdigit() for c in value)]
        naming = not long and len(values) >= 3 and len(set(words)) > 0.9 * len(values)
        if long or told or naming:
            texts.add(name)
        if naming:
            names.append(name)
    known = [name for title in _TITLES for name in seen if name.lower() == title]
    return frozenset(texts or seen), next(iter(known + names), None)


def _extract(
    columns: dict[str, Scalar],
    line: int,
    number: int,
    form: str,
    texts: frozenset[str],
    title: str | None,
) -> Extract | None:
    """A row as an extract; None for a row without text."""
    parts: list[str] = []
    metadata: dict[str, Scalar] = {"format": form}
    for name, value in columns.items():
        if isinstance(value, str) and name in texts:
            parts.append(value.strip())
        elif name.lower() not in _LANGUAGES:
            _note(metadata, name, value)
    blocks, at = [], 0
    parts = [part for part in parts if part]
    for part in parts:
        blocks.append(Block(at, at + len(part), "row", None, line))
        at += len(part) + 1
    if not blocks:
        return None
    lower = {name.lower(): value for name, value in columns.items() if isinstance(value, str)}
    return Extract(
        "\n".join(parts),
        tuple(blocks),
        title=str(columns.get(title, ""))[:_MAX_TITLE] or None if title else None,
        language=next((lower[key] for key in _LANGUAGES if lower.get(key)), None),
        metadata=metadata,
        row=number,
    )


def _note(metadata: dict[str, Scalar], name: str, value: Scalar) -> None:
    """Keep a column as metadata, under a name that fits."""
    key = re.sub(r"[^\w.-]", "_", name.strip())[:100]
    if not re.match(r"[A-Za-z_]", key) or key.lower() in _RESERVED:
        key = f"_{key}"
    if len(metadata) < 100:
        metadata[key] = value[:_MAX_VALUE] if isinstance(value, str) else value
