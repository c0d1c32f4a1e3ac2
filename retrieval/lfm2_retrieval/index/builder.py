"""A segment, as a writer makes it: passages come in, files grow, little stays in memory.

Knows the layout that `segment` reads; knows no manifest in force, no lock and no encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_retrieval.index import files, kernels
from lfm2_retrieval.index.codec import Codebook, code_dtype
from lfm2_retrieval.index.files import FileWriter, Stored
from lfm2_retrieval.index.lexical import LexicalWriter
from lfm2_retrieval.index.manifest import Part
from lfm2_retrieval.index.segment import NOWHERE, Place, Record, Segment, key_of

__all__ = ["SegmentBuilder", "copy_live"]

_TOKENS = 1 << 15
"""Tokens that wait in memory before they are written."""


class _Numbers:
    """Running offsets, written in blocks."""

    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer
        self._waiting: list[int] = [0]
        self.last = 0

    def add(self, length: int) -> None:
        self.last += length
        self._waiting.append(self.last)
        if len(self._waiting) >= 4096:
            self.flush()

    def flush(self) -> None:
        self._writer.write(np.array(self._waiting, "<i8"))
        self._waiting = []


class SegmentBuilder:
    """Writes one segment. `finish` makes it durable; naming it in a manifest is for the caller.

    Args:
        folder: The index.
        name: A new name for the segment.
        dim: Length of a token's vector.
        book: Compresses the tokens; None stores them as they are, in fp16.
    """

    def __init__(self, folder: Path, name: str, dim: int, book: Codebook | None) -> None:
        self.name, self._book, self._dim = name, book, dim
        self._where = folder / "segments" / name
        self._writers: dict[str, FileWriter] = {}
        self.documents = self.passages = self.tokens = 0
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0
        self._keys: list[int] = []
        self._chunk = 0
        files.new_folder(self._where)
        self._offsets = _Numbers(self._open("offsets.bin"))
        self._text_offsets = _Numbers(self._open("text_offsets.bin"))
        self._record_offsets = _Numbers(self._open("document_offsets.bin"))
        self._firsts = _Numbers(self._open("document_passages.bin"))
        names = ["texts.bin", "documents.bin", "places.bin"]
        names += ["vectors.bin"] if book is None else ["codes.bin", "residuals.bin"]
        for one in names:
            self._open(one)
        self._lexical = LexicalWriter(self._open)

    def _open(self, name: str) -> FileWriter:
        writer = self._writers[name] = FileWriter(self._where / name)
        return writer

    def begin(self, record: Record) -> None:
        """Start a document; the passages that follow are its own."""
        if self.documents:
            self._firsts.add(self.passages - self._firsts.last)
        data = record.to_bytes()
        self._writers["documents.bin"].write(data)
        self._record_offsets.add(len(data))
        self._keys.append(key_of(record.id))
        self.documents += 1
        self._chunk = 0

    def add(self, rows: NDArray[Any], text: str, place: Place, chunk: int | None = None) -> None:
        """Add a passage of the document that was begun.

        Args:
            rows: Its normalised token vectors, [n, dim], n at least 1.
            text: Its text.
            place: Where it stands.
            chunk: Its number in the document; by default the next.
        """
        self._waiting.append(rows)
        self._n_waiting += len(rows)
        if self._n_waiting >= _TOKENS:
            self._flush_tokens()
        self._note(len(rows), text, place, chunk)

    def add_encoded(
        self,
        codes: NDArray[Any],
        residuals: NDArray[Any],
        passages: Sequence[tuple[int, str, Place, int, Record | None]],
    ) -> None:
        """Add passages that are encoded already, with the same codebook.

        Args:
            codes: Of all their tokens.
            residuals: Of all their tokens.
            passages: Tokens, text, place and number of each; a record begins its document first.
        """
        self._flush_tokens()
        self._writers["codes.bin"].write(codes)
        self._writers["residuals.bin"].write(residuals)
        for length, text, place, chunk, record in passages:
            if record is not None:
                self.begin(record)
            self._note(length, text, place, chunk)

    def finish(self) -> Part:
        """Write the rest, build the inverted lists, make everything durable."""
        self._flush_tokens()
        if self.documents:
            self._firsts.add(self.passages - self._firsts.last)
        for numbers in (self._offsets, self._text_offsets, self._record_offsets, self._firsts):
            numbers.flush()
        keys = np.array(self._keys, "<u8")
        order = np.argsort(keys, kind="stable").astype("<i4")
        self._open("keys.bin").write(keys[order])
        self._open("key_order.bin").write(order)
        if self._book is not None:
            self._invert()
        self._lexical.finish()
        stored: Mapping[str, Stored] = {name: one.close() for name, one in self._writers.items()}
        self._writers = {}
        files.sync_folder(self._where)
        files.sync_folder(self._where.parent)
        return Part(
            name=self.name,
            kind="flat" if self._book is None else "residual",
            documents=self.documents,
            passages=self.passages,
            tokens=self.tokens,
            files=stored,
        )

    def abandon(self) -> None:
        """Give up: close and remove what was written. After `finish` nothing happens."""
        if self._writers:
            for writer in self._writers.values():
                writer.abandon()
            self._writers = {}
            files.remove(self._where)

    def _note(self, length: int, text: str, place: Place, chunk: int | None) -> None:
        number = self._chunk if chunk is None else chunk
        self._chunk = number + 1
        data = text.encode("utf-8", "surrogatepass")
        self._writers["texts.bin"].write(data)
        self._text_offsets.add(len(data))
        self._offsets.add(length)
        page = NOWHERE if place.page is None else place.page
        line = NOWHERE if place.line is None else place.line
        row = [self.documents - 1, number, page, line, place.start, place.end]
        self._writers["places.bin"].write(np.array(row, "<i4"))
        self._lexical.add(text)
        self.passages += 1
        self.tokens += length

    def _flush_tokens(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting, self._n_waiting = [], 0
        if self._book is None:
            self._writers["vectors.bin"].write(rows.astype("<f2"))
        else:
            codes, residuals = self._book.encode(np.ascontiguousarray(rows, np.float32))
            self._writers["codes.bin"].write(codes)
            self._writers["residuals.bin"].write(residuals)

    def _invert(self) -> None:
        """Centroid -> passages, each once: counted in one pass over the codes, filled in another.

        A passage lies within one block, so what is unique in a block is unique.
        """
        assert self._book is not None
        count = len(self._book.centroids)
        dtype = code_dtype(count)
        self._writers["codes.bin"].flush()
        self._writers["offsets.bin"].flush()
        codes = files.map_array(self._where / "codes.bin", dtype, (self.tokens,))
        offsets = files.map_array(self._where / "offsets.bin", "<i8", (self.passages + 1,))
        sizes = np.zeros(count + 1, np.int64)
        for found, _ in _pairs(codes, offsets):
            sizes[1:] += np.bincount(found, minlength=count)
        ends = np.cumsum(sizes)
        lists = np.empty(int(ends[-1]), "<i4")
        at = ends[:-1].copy()
        for found, passages in _pairs(codes, offsets):
            filled = np.bincount(found, minlength=count)
            # pairs come sorted by centroid: the n-th of a centroid goes n places on
            lists[kernels.gather_ranges(at, filled)] = passages
            at += filled
        self._open("list_offsets.bin").write(ends.astype("<i8"))
        self._open("lists.bin").write(lists)


def _pairs(
    codes: NDArray[Any], offsets: NDArray[Any]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """Unique (centroid, passage) pairs of blocks of passages, sorted."""
    for begin, end in _blocks(offsets, 32 * _TOKENS):
        lengths = np.diff(offsets[begin : end + 1])
        numbers = np.repeat(np.arange(end - begin, dtype=np.int64), lengths)
        block = codes[offsets[begin] : offsets[end]].astype(np.int64)
        pairs = np.unique(block * (end - begin) + numbers)
        yield pairs // (end - begin), (pairs % (end - begin) + begin).astype(np.int32)


def _blocks(offsets: NDArray[Any], tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of passages with at most so many tokens, or of a single one that has more."""
    begin = 0
    while begin < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[begin] + tokens, side="right")) - 1
        yield begin, (end := max(begin + 1, end))
        begin = end


def copy_live(
    source: Segment, live: NDArray[np.bool_], into: SegmentBuilder, *, same: bool
) -> None:
    """Copy what is not deleted from one segment into another.

    Args:
        source: Where from.
        live: Which of its passages are not deleted.
        into: Where to.
        same: Whether both have the same codebook, so that nothing need be encoded anew.
    """
    current = NOWHERE
    for begin, end in _blocks(source.offsets, _TOKENS):
        chosen = np.flatnonzero(live[begin:end]) + begin
        if not len(chosen):
            continue
        lengths = source.offsets[chosen + 1] - source.offsets[chosen]
        described = []
        for passage, length in zip(chosen.tolist(), lengths.tolist(), strict=True):
            document, chunk, page, line, start, end = source.places[passage].tolist()
            record = source.record(document) if document != current else None
            current = document
            place = Place(
                None if page == NOWHERE else page, None if line == NOWHERE else line, start, end
            )
            described.append((length, source.text(passage), place, chunk, record))
        if same and source.codes is not None:
            tokens = kernels.gather_ranges(source.offsets[chosen], lengths)
            into.add_encoded(source.codes[tokens], source.residuals[tokens], described)
            continue
        rows = np.split(source.rows(chosen), np.cumsum(lengths)[:-1])
        for vectors, (_, text, place, chunk, record) in zip(rows, described, strict=True):
            if record is not None:
                into.begin(record)
            into.add(vectors, text, place, chunk)
