"""Documents into an index: read, encoded in batches, committed as they come.

Memory holds one group of passages and one of files' texts, whatever the corpus. Knows the order of
things; reading, encoding and writing are done by others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm2_mm.errors import InputError
from lfm2_retrieval.index.checks import check_id
from lfm2_retrieval.index.encoders import EncoderLike
from lfm2_retrieval.index.filters import check_metadata
from lfm2_retrieval.index.model import AddReport, Skipped
from lfm2_retrieval.index.segment import Place, Record
from lfm2_retrieval.index.writer import Batch, Writer

if TYPE_CHECKING:
    from lfm2_retrieval.documents.model import Chunk, Document

__all__ = ["Digests", "add_documents"]

Progress = Callable[[AddReport], None]

_GROUP = 256
"""Passages that are encoded at once."""
_COMMIT_TOKENS = 1 << 17
_COMMIT_SECONDS = 10.0


class Digests(Mapping[str, str]):
    """Path -> digest of what is indexed, looked up when asked; takes no memory.

    Args:
        writer: Whose state is asked.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __getitem__(self, path: str) -> str:
        record = self._writer.snapshot.record(path)
        if record is None:
            raise KeyError(path)
        return record.digest

    def __iter__(self) -> Iterator[str]:
        return (record.id for record, _, _ in self._writer.snapshot.documents())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def add_documents(
    writer: Writer,
    encoder: EncoderLike,
    items: Iterable[Any],
    progress: Progress | None = None,
) -> AddReport:
    """Index what was read. Needs the writer's lock.

    Args:
        writer: Writes.
        encoder: Encodes.
        items: `Document`, `Unreadable` and `Unchanged` of `lfm2_retrieval.documents`.
        progress: Told the report so far after each document.

    An interruption (Ctrl-C) loses what was not committed; running it again continues.
    """
    adding = _Adding(writer, encoder, progress)
    group: list[tuple[Document, Chunk | None]] = []
    for item in items:
        if not adding.wants(item):
            continue
        chunks: Sequence[Chunk | None] = item.chunks or (None,)
        for chunk in chunks:
            group.append((item, chunk))
            if len(group) >= _GROUP:
                adding.put(group)
                group = []
    adding.put(group)
    adding.finish()
    return adding.report


class _Adding:
    """One addition under way."""

    def __init__(self, writer: Writer, encoder: EncoderLike, progress: Progress | None) -> None:
        self._writer, self._encoder, self._progress = writer, encoder, progress
        self._began = self._committed = time.monotonic()
        self._batch: Batch | None = None
        self._last: Document | None = None
        self._rows: dict[str, int] = {}
        self.report = AddReport()

    def wants(self, item: Any) -> bool:
        """Whether an item is a document to index; notes what it is otherwise."""
        path, _, row = item.path.rpartition("#")
        if row.isdecimal():
            self._rows[path] = max(self._rows.get(path, 0), int(row))
        if hasattr(item, "chunks"):
            try:
                check_id(item.path)
                check_metadata(item.metadata)
                return True
            except InputError as error:
                self.report.skipped.append(Skipped(item.path, str(error)))
        elif hasattr(item, "reason"):
            self._rows[item.path] = -1  # not all of it was read: nothing of it goes
            self.report.skipped.append(Skipped(item.path, item.reason))
        else:
            self.report.unchanged += 1
        self._tell()
        return False

    def put(self, group: Sequence[tuple[Document, Chunk | None]]) -> None:
        """Encode passages and hand them to the batch; commit between documents."""
        texts = [chunk.text for _, chunk in group if chunk is not None]
        factor = self._writer.state.model.pool_factor
        encoded = self._encoder.encode_documents(texts, pool_factor=factor) if texts else []
        vectors = iter(encoded)
        for document, chunk in group:
            if document is not self._last:
                self._begin(document, empty=chunk is None)
            if chunk is not None:
                assert self._batch is not None
                rows = next(vectors).numpy()
                place = Place(chunk.page, chunk.line, chunk.start, chunk.end)
                self._batch.add(rows, chunk.text, place)
                self.report.passages += 1
                self.report.tokens += len(rows)

    def finish(self) -> None:
        """Commit the rest; drop the rows that a table no longer has."""
        self._last = None
        for path, count in self._rows.items():
            number = count + 1
            while count >= 0 and self._writer.snapshot.record(f"{path}#{number}") is not None:
                self._open().replace(f"{path}#{number}")
                self.report.removed += 1
                number += 1
        self._commit()
        self._writer.maintain()
        self._tell()

    def _begin(self, document: Document, *, empty: bool) -> None:
        batch = self._open()
        late = time.monotonic() - self._committed > _COMMIT_SECONDS
        if batch.ids and (batch.tokens >= _COMMIT_TOKENS or late or document.path in batch):
            self._commit()
            self._writer.maintain(final=False)
            batch = self._open()
        self._last = document
        known = self._writer.snapshot.record(document.path) is not None
        if empty:
            batch.replace(document.path)
            self.report.removed += known
        else:
            record = Record(
                id=document.path,
                digest=document.digest,
                path=document.path,
                title=document.title,
                language=document.language,
                metadata=check_metadata(document.metadata),
            )
            batch.begin(record)
            self.report.updated += known
            self.report.added += not known
        self.report.current = document.path
        self._tell()

    def _open(self) -> Batch:
        if self._batch is None:
            self._batch = self._writer.batch(self._encoder.dim)
        return self._batch

    def _commit(self) -> None:
        if self._batch is not None:
            batch, self._batch = self._batch, None
            batch.commit()
        self._committed = time.monotonic()

    def _tell(self) -> None:
        self.report.seconds = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(self.report)
