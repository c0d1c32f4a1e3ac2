"""`read_documents`: paths in, documents out, one at a time as they are read.

Finding, parsing, chunking and telling the language are modules of their own; this one joins them
and lets no single file end the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.chunking import Chunker
from lfm2_retrieval.documents.language import detect
from lfm2_retrieval.documents.model import (
    DEFAULT_LIMITS,
    Document,
    Extract,
    Limits,
    Unchanged,
    Unreadable,
)
from lfm2_retrieval.documents.readers import family, refusal
from lfm2_retrieval.documents.sandbox import Sandbox
from lfm2_retrieval.documents.walk import Found, read_bytes, roots, walk

__all__ = ["read_documents"]

_NOTHING_KNOWN: Mapping[str, str] = MappingProxyType({})


def read_documents(
    paths: Sequence[str | Path],
    *,
    count_tokens: Callable[[str], int],
    chunk_tokens: int = 300,
    overlap: int = 40,
    limits: Limits = DEFAULT_LIMITS,
    known: Mapping[str, str] = _NOTHING_KNOWN,
    only: Collection[str] | None = None,
) -> Iterator[Document | Unreadable | Unchanged]:
    """Read files and folders, in the order given, each folder in the order of its names.

    Args:
        paths: Files and folders; folders are walked. Hidden names are passed over.
        count_tokens: The number of the model's tokens in a text.
        chunk_tokens: The most tokens of a chunk.
        overlap: The most tokens that a chunk repeats of the one before.
        limits: What one file may cost.
        known: Digests of documents by their paths: those still the same are not chunked again.
        only: Names of files and folders below those given: the others are not opened.

    Yields:
        Each document as it is read; what could not be read, with the reason; what is unchanged.
        Of a table file each row is a document. A row or file that is gone yields nothing: the
        caller sees which of its known paths were not named.

    Raises:
        SettingError: if `chunk_tokens` or `overlap` cannot be used.
        MissingExtra: if a package that a format needs is not installed.
    """
    chunker = Chunker(count_tokens, chunk_tokens=chunk_tokens, overlap=overlap)
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    return _read(named, chunker, limits, known, None if only is None else frozenset(only))


def _read(
    paths: Sequence[str | Path],
    chunker: Chunker,
    limits: Limits,
    known: Mapping[str, str],
    only: frozenset[str] | None,
) -> Iterator[Document | Unreadable | Unchanged]:
    seen: dict[str, Path] = {}
    with Sandbox(limits) as sandbox:
        for found in _find(paths):
            if isinstance(found, Unreadable):
                if only is None or _among(found.path, only):
                    yield found
                continue
            if only is not None and not _among(found.name, only):
                continue
            other = seen.get(found.name)
            seen[found.name] = found.real
            if other is None:
                yield from _file(found, sandbox, chunker, limits, known)
            elif other != found.real:
                yield Unreadable(
                    found.name,
                    "another of the folders holds a file of the same name: name the folder above "
                    "both instead",
                )


def _among(name: str, only: frozenset[str]) -> bool:
    """Whether a file is named, or a folder that it lies in."""
    return name in only or any(str(above) in only for above in PurePosixPath(name).parents)


def _find(paths: Sequence[str | Path]) -> Iterator[Found | Unreadable]:
    for root in roots(paths):
        if isinstance(root, Unreadable):
            yield root
        else:
            yield from walk(root)


def _file(
    found: Found, sandbox: Sandbox, chunker: Chunker, limits: Limits, known: Mapping[str, str]
) -> Iterator[Document | Unreadable | Unchanged]:
    reason = refusal(found.name)
    if reason is not None:
        yield Unreadable(found.name, reason)
        return
    try:
        data = read_bytes(found, limits)
        digest = hashlib.sha256(data).hexdigest()
        if known.get(found.name) == digest:
            yield Unchanged(found.name)
            return
        code = family(found.name) == "source"
        for extract in sandbox.parse(found.real.name, data):
            path = found.name if extract.row is None else f"{found.name}#{extract.row}"
            if extract.row is not None:
                digest = _row_digest(extract)
                if known.get(path) == digest:
                    yield Unchanged(path)
                    continue
            yield _document(path, digest, extract, chunker, code)
    except DocumentError as error:
        yield Unreadable(found.name, str(error))


def _document(path: str, digest: str, extract: Extract, chunker: Chunker, code: bool) -> Document:
    language = extract.language
    if language is None and not code:
        language = detect(extract.text) or extract.language_hint
    return Document(
        path=path,
        digest=digest,
        title=extract.title,
        language=language,
        chunks=tuple(chunker.chunks(extract)),
        metadata=dict(extract.metadata),
    )


def _row_digest(extract: Extract) -> str:
    """SHA-256 of what a row says, so that one changed row leaves the others unchanged."""
    said = [extract.text, extract.title, extract.language, dict(extract.metadata)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
