"""What may go into an index: ids, texts, vectors, and a folder of its own.

Knows the rules and their messages, nothing of storage.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import IndexFault, InputError
from lfm2_retrieval.index.filters import check_metadata
from lfm2_retrieval.index.segment import Record

__all__ = ["check_empty", "check_id", "checked_rows", "records_of"]

Vectors = Any  # a torch tensor or a numpy array

_LONGEST_ID = 4096
# also marks that turn the direction of what is printed behind them
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def check_id(id: Any) -> str:
    """An id or path that may be stored.

    Raises:
        InputError: if it is empty, too long, leads out of its folder or holds control characters.
    """
    if not isinstance(id, str) or not id or len(id) > _LONGEST_ID:
        shown = repr(id) if len(repr(id)) < 80 else repr(id)[:80] + "…"
        raise InputError(
            f"the document id or path is {shown}; use a text of 1 to {_LONGEST_ID} characters"
        )
    if control := _CONTROL.search(id):
        raise InputError(
            f"the document id or path {id!r} holds the control character {control[0]!r}; remove it"
        )
    if ".." in re.split(r"[/\\]", id):
        raise InputError(
            f"the document id or path {id!r} leads out of its folder; leave out the '..'"
        )
    return id


def check_empty(folder: Path) -> None:
    """An index takes a folder of its own: it removes what it does not know.

    Raises:
        IndexFault: if the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise IndexFault(f"{str(folder)!r} is a file; name a folder for the index")
    known = ("lock", "CURRENT", "manifest-")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not entry.name.startswith(known):
            raise IndexFault(
                f"the folder {str(folder)!r} holds {entry.name!r} and is no index; name a new or "
                "empty folder"
            )


def records_of(
    texts: Sequence[str],
    ids: Sequence[str] | None,
    metadata: Sequence[Mapping[str, Any]] | None,
) -> list[Record]:
    """Texts as documents of one passage.

    Raises:
        InputError: if texts, ids or metadata cannot be stored.
    """
    if isinstance(texts, str):
        raise InputError("the texts are one text; give a list of texts")
    for name, values in (("ids", ids), ("metadata", metadata)):
        if values is not None and len(values) != len(texts):
            raise InputError(
                f"{len(values)} {name} came with {len(texts)} texts; give one for each"
            )
    names = [uuid.uuid4().hex for _ in texts] if ids is None else [check_id(id) for id in ids]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the id {twice!r} is given more than once; give each text its own")
    records = []
    for number, (id, text) in enumerate(zip(names, texts, strict=True)):
        if not isinstance(text, str):
            raise InputError(f"text {number} is a {type(text).__name__}; give texts")
        about = check_metadata(metadata[number] if metadata is not None else None)
        if "path" in about:
            check_id(about["path"])
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        records.append(
            Record(id=id, digest=digest, path=None, title=None, language=None, metadata=about)
        )
    return records


def checked_rows(value: Vectors, dim: int, what: str) -> NDArray[np.float32]:
    """Rows of vectors as an array, [n, dim].

    Raises:
        InputError: if they have another shape, or are not finite.
    """
    rows = np.asarray(value.numpy() if hasattr(value, "numpy") else value, np.float32)
    if rows.ndim != 2 or rows.shape[1] != dim or not len(rows):
        raise InputError(
            f"the {what} has the shape {list(rows.shape)}, but the index holds rows of {dim} "
            "dimensions; give [n, dim] with n at least 1"
        )
    if not np.isfinite(rows).all():
        raise InputError(f"the {what} holds values that are not finite; check the model")
    return np.ascontiguousarray(rows)
