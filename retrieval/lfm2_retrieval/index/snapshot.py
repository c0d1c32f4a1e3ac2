"""One state of an index, open for reading: all its segments under one numbering of passages.

A passage's number is its place in its segment plus the passages of the segments before. Knows which
passages are deleted and how rows are looked up, not how anything is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex
from lfm2_retrieval.index import files, manifest
from lfm2_retrieval.index.codec import Codebook
from lfm2_retrieval.index.filters import Columns, Condition
from lfm2_retrieval.index.manifest import Manifest, Part
from lfm2_retrieval.index.segment import Record, Segment

__all__ = ["Snapshot", "find_passages", "open_snapshot", "passage_id"]

_TRIES = 20


def passage_id(document: str, chunk: int) -> str:
    """The id of a passage."""
    return f"{document}#{chunk}"


class Snapshot:
    """An open state.

    Args:
        folder: The index.
        state: Its manifest.
        before: An earlier snapshot of the same index, whose open segments are used again.

    Attributes:
        segments: The open segments.
        firsts: Number of each segment's first passage, and the number of passages behind the last.
        live: Which passages are not deleted.
        book: The codebook; None while all segments are flat.
    """

    def __init__(self, folder: Path, state: Manifest, before: Snapshot | None = None) -> None:
        self.folder, self.state = folder, state
        dim, codes = state.model.dim, state.codebook
        self.book: Codebook | None = None
        if codes is not None:
            same = before is not None and before.state.codebook == codes
            self.book = (
                before.book if before and same else Codebook.read(folder, codes, dim, state.bits)
            )
        kept = {one.part.name: one for one in before.segments} if before else {}
        if self.book is not (before.book if before else None):
            kept = {}
        self.segments: list[Segment] = []
        self._live: list[NDArray[np.bool_]] = []
        for part in state.segments:
            segment = kept.get(part.name)
            if segment is None:
                for name, stored in part.files.items():
                    files.check_content(folder / "segments" / part.name / name, stored)
                segment = Segment(folder, part, dim, self.book)
            self.segments.append(segment)
            self._live.append(_live(folder, part))
        sizes = [0, *(len(segment) for segment in self.segments)]
        self.firsts: NDArray[np.int64] = np.cumsum(np.array(sizes, np.int64))

    @cached_property
    def live(self) -> NDArray[np.bool_]:
        """Which passages are not deleted, bool [passages]."""
        return np.concatenate([np.zeros(0, bool), *self._live])

    @property
    def n_documents(self) -> int:
        """Documents that have a live passage."""
        pairs = zip(self.segments, self._live, strict=True)
        return sum(len(np.unique(segment.places[live, 0])) for segment, live in pairs)

    def live_of(self, number: int) -> NDArray[np.bool_]:
        """Which passages of one segment are not deleted."""
        return self._live[number]

    @property
    def n_passages(self) -> int:
        """Stored passages, deleted ones included."""
        return int(self.firsts[-1])

    def allowed(self, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
        """Which passages are live and belong to a document that fits, bool [passages]."""
        if not conditions:
            return self.live
        masks = [np.zeros(0, bool)]
        for segment, live in zip(self.segments, self._live, strict=True):
            documents = columns_of(segment).mask(conditions)
            masks.append(documents[segment.places[:, 0]] & live)
        return np.concatenate(masks)

    def locate(self, passage: int) -> tuple[Segment, int]:
        """The segment of a passage and its place in it."""
        number = int(np.searchsorted(self.firsts, passage, side="right")) - 1
        return self.segments[number], passage - int(self.firsts[number])

    def by_segment(self, passages: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Segment by segment: its number, and which of the given passages (their places) it has."""
        home = np.searchsorted(self.firsts, passages, side="right") - 1
        for number in np.unique(home).tolist():
            yield number, np.flatnonzero(home == number)

    def id_of(self, passage: int) -> str:
        """The id of a passage."""
        segment, place = self.locate(passage)
        document, chunk = segment.places[place, :2].tolist()
        return passage_id(segment.record(document).id, chunk)

    def find(self, id: str) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """A document's live passages: segment number, document number, places in the segment."""
        for number, segment in enumerate(self.segments):
            document = segment.find(id)
            if document is not None:
                begin, end = segment.firsts[document : document + 2].tolist()
                places = np.arange(begin, end)
                places = places[self._live[number][begin:end]]
                if len(places):
                    yield number, document, places

    def record(self, id: str) -> Record | None:
        """What is stored of a live document."""
        for number, document, _ in self.find(id):
            return self.segments[number].record(document)
        return None

    def documents(self) -> Iterator[tuple[Record, int, int]]:
        """Every live document with its number of live passages and of their tokens."""
        for segment, live in zip(self.segments, self._live, strict=True):
            lengths = np.diff(segment.offsets) * live
            for document in range(segment.part.documents):
                begin, end = segment.firsts[document : document + 2].tolist()
                if count := int(live[begin:end].sum()):
                    yield segment.record(document), count, int(lengths[begin:end].sum())

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            CorruptIndex: if one differs; names it.
        """
        for path, stored in self.state.named(self.folder).items():
            files.check_content(path, stored, full=True)


def find_passages(snapshot: Snapshot, id: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Live passages of a document or of one passage id: segment number and places."""
    found = False
    for number, _, places in snapshot.find(id):
        found = True
        yield number, places
    document, mark, chunk = id.rpartition("#")
    if found or not mark or not chunk.isdecimal():
        return
    for number, _, places in snapshot.find(document):
        chosen = places[snapshot.segments[number].places[places, 1] == int(chunk)]
        if len(chosen):
            yield number, chosen


def columns_of(segment: Segment) -> Columns:
    """The metadata columns of a segment, read when first needed."""
    found: Columns | None = getattr(segment, "_columns", None)
    if found is None:
        found = Columns(segment.records())
        segment._columns = found  # type: ignore[attr-defined]
    return found


def _live(folder: Path, part: Part) -> NDArray[np.bool_]:
    if part.deleted is None:
        return np.ones(part.passages, bool)
    size = (part.passages + 7) // 8
    bitmap = files.map_bytes(folder / "deleted" / part.deleted.name, size)
    return ~np.unpackbits(bitmap, count=part.passages).astype(bool)


def open_snapshot(folder: Path, before: Snapshot | None = None) -> Snapshot | None:
    """Open the state in force; None if the folder holds no index.

    A writer may replace the state while it is being opened: then the next one is opened.

    Raises:
        CorruptIndex: if a file is missing or damaged.
        IndexMismatch: if it was made in another format version.
    """
    for attempt in range(_TRIES):
        state: Manifest | None = None
        try:
            state = manifest.current(folder)
            if state is None:
                return None
            if before is not None and state.generation == before.state.generation:
                return before
            return Snapshot(folder, state, before)
        except (FileNotFoundError, CorruptIndex) as error:
            newer = _generation(folder)
            if attempt + 1 < _TRIES and newer is not None and newer != (state and state.generation):
                continue
            if isinstance(error, CorruptIndex):
                raise
            raise CorruptIndex(
                f"the index file {error.filename!r} is missing; restore it from a backup or build "
                "the index anew"
            ) from error
    raise CorruptIndex(f"the index {str(folder)!r} changes faster than it can be opened; try again")


def _generation(folder: Path) -> int | None:
    try:
        state = manifest.current(folder)
    except (FileNotFoundError, CorruptIndex):
        return None
    return None if state is None else state.generation
