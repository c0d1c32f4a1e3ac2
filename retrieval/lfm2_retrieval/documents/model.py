"""What reading gives: documents and chunks for the caller, extracted text for the chunker.

Plain data: this module knows no file format, no process and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

__all__ = [
    "DEFAULT_LIMITS",
    "Block",
    "Chunk",
    "Document",
    "Extract",
    "Kind",
    "Limits",
    "Scalar",
    "Unchanged",
    "Unreadable",
]

Scalar = str | int | float | bool
Kind = Literal["heading", "paragraph", "item", "row", "code", "definition"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one file may cost.

    Attributes:
        bytes: The largest file, and the most that a packed file (gz, docx) may unpack to.
        characters: The longest text taken from one file.
        memory: Bytes of address space a reader may use beyond its own start.
        seconds: The longest time a reader may work on one file.
        rows: The most rows of one table file.
    """

    bytes: int = 100 * 2**20
    characters: int = 100_000_000
    memory: int = 2**30
    seconds: float = 120.0
    rows: int = 1_000_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One passage; `text` is exactly `extracted_text[start:end]`.

    Headings stay where they stand in the text. A passage further down in a section does not repeat
    them in `text`: `heading` names them instead.

    Attributes:
        text: The passage.
        page: The page its start is on, from 1; None where a format has no pages.
        line: The line its start is on, from 1 (docx: the paragraph or table row, counted among
            those that hold text); None where no line is known.
        start: Its first character in the document's extracted text.
        end: The character behind its last.
        heading: The headings above it, outermost first, joined by " > ".
    """

    text: str
    page: int | None
    line: int | None
    start: int
    end: int
    heading: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    r"""One document that was read: a file, or one row of a table file.

    Attributes:
        path: Relative to the folder that was walked, or the file as given, with "/" between the
            parts; a row carries its number behind "#", from 1.
        digest: SHA-256 of the file's bytes as hex; of a row, of what the row says.
        title: Its title, where it names one.
        language: ISO 639 code, where one is certain enough.
        chunks: Its passages, in order.
        metadata: What else is known; keys match `[A-Za-z_][\w.-]*`.
    """

    path: str
    digest: str
    title: str | None
    language: str | None
    chunks: tuple[Chunk, ...]
    metadata: dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that was not read (or, of a table file, not all of it), and why, in one sentence."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A document whose digest is the known one."""

    path: str


class Block(NamedTuple):
    """One piece of structure in an extracted text.

    Attributes:
        start: First character.
        end: The character behind the last.
        kind: What it is; a "definition" is code that starts something named, such as a function.
        page: The page it starts on, from 1.
        line: The line it starts on, from 1.
        level: Depth of a heading, from 1; 0 for anything else.
    """

    start: int
    end: int
    kind: Kind
    page: int | None = None
    line: int | None = None
    level: int = 0


@dataclass(frozen=True, slots=True)
class Extract:
    """What a reader finds in a file, before it is cut into chunks.

    Attributes:
        text: The text; no control characters but tab, newline and form feed.
        blocks: Its structure: ascending, not overlapping; what lies between is markup or space.
        title: The title the file names.
        language: The language the file says this document is in.
        language_hint: The same where it is often wrong (a page template): only for texts whose
            language cannot be told.
        metadata: Further facts.
        row: The number of the row, from 1, if the file is a table of documents.
    """

    text: str
    blocks: tuple[Block, ...]
    title: str | None = None
    language: str | None = None
    language_hint: str | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))
    row: int | None = None
