"""`Index`: add, delete and search passages; one folder, one writer at a time, many readers.

Every change is one new state on disk: when a method that changes the index returns, no crash can
undo it. Knows who does what; the doing is in the other modules of this room.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex, IndexFault, IndexMismatch, InputError, SettingError
from lfm2_retrieval.index import exact as exact_search
from lfm2_retrieval.index import lexical, plaid
from lfm2_retrieval.index.adding import Digests, add_documents
from lfm2_retrieval.index.checks import check_empty, checked_rows, records_of
from lfm2_retrieval.index.codec import BITS
from lfm2_retrieval.index.encoders import EncoderLike, ModelSource
from lfm2_retrieval.index.filters import Filter, parse_filter
from lfm2_retrieval.index.model import AddReport, DocumentRow, Hit, Status
from lfm2_retrieval.index.segment import Place
from lfm2_retrieval.index.snapshot import Snapshot, find_passages, open_snapshot
from lfm2_retrieval.index.views import document_rows, hits, status_of
from lfm2_retrieval.index.writer import Writer, create_index

__all__ = ["Index"]

HYBRID = False
"""Whether words take part in a search that does not say: off until it measures better."""
_DEEP = 100
"""Passages of each ranking that are fused, at least."""

Vectors = Any  # a torch tensor or a numpy array


class Index:
    """A search index in a folder. Use `Index.open`.

    Reading methods see the state at opening, that of this object's own last change, or that of the
    last `refresh`.
    """

    def __init__(
        self, folder: Path, snapshot: Snapshot, source: ModelSource, *, read_only: bool
    ) -> None:
        self._folder, self._source = folder, source
        self._read_only = read_only
        self._writer: Writer | None = Writer(folder, snapshot)
        self._bulk = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: str | EncoderLike | None = None,
        *,
        create: bool = True,
        read_only: bool = False,
        bits: int = 4,
        pool_factor: int | None = None,
    ) -> Index:
        """Open an index; make it if there is none.

        Args:
            path: Its folder.
            encoder: What makes vectors of texts, or its name; by default what the index names.
            create: Whether to make it if absent.
            read_only: Refuse changes; nothing in the folder is touched.
            bits: Of a new index: bits a dimension of compressed vectors, 2, 4 or 8.
            pool_factor: Of a new index: of so many token vectors of a text one is kept (1 keeps
                all); for one that exists it must be what it was made with.

        Raises:
            CorruptIndex: if a file is missing or damaged.
            IndexFault: if there is none and it may not be made.
            IndexMismatch: if another model, format version or pool factor made it.
            SettingError: if `bits` or `pool_factor` cannot be used.
        """
        if bits not in BITS:
            raise SettingError(f"bits is {bits!r}; choose 2, 4 or 8")
        if pool_factor is not None and pool_factor < 1:
            raise SettingError(f"pool_factor is {pool_factor}; use 1 (no pooling) or more")
        folder = Path(path)
        source = ModelSource(folder, encoder)
        snapshot = open_snapshot(folder)
        if snapshot is not None:
            source.check(snapshot.state.model)
            made = snapshot.state.model.pool_factor
            if pool_factor not in (None, made):
                raise IndexMismatch(
                    f"the index {str(folder)!r} was made with pool factor {made}, not "
                    f"{pool_factor}; leave the pool factor out, or make a new index"
                )
        elif create and not read_only:
            check_empty(folder)
            model = replace(source.describe(), pool_factor=pool_factor or 1)
            snapshot = create_index(folder, model, bits)
        else:
            raise IndexFault(f"there is no index at {str(folder)!r}; check the path or add to it")
        return cls(folder, snapshot, source, read_only=read_only)

    # ---- changes ----

    def add(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        progress: Callable[[AddReport], None] | None = None,
        **options: Any,
    ) -> AddReport:
        """Index files and folders; what is unchanged is left, what changed is replaced.

        Documents are committed as they come, so an interruption keeps what is done and running it
        again continues.

        Args:
            paths: Files and folders.
            progress: Told the report so far after each document.
            **options: For `read_documents`: `chunk_tokens`, `overlap`, `limits`, `only`.
        """
        from lfm2_retrieval.documents import read_documents

        encoder = self._encoder()
        chosen = [paths] if isinstance(paths, str | Path) else list(paths)
        with self._changing() as writer:
            items = read_documents(
                chosen, count_tokens=encoder.count_tokens, known=Digests(writer), **options
            )
            return add_documents(writer, encoder, items, progress)

    def add_texts(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Index texts, each as a document of one passage; the same id again replaces.

        Args:
            texts: The texts; what is longer than the model's document length is not seen by it.
            ids: Of the documents; by default new ones.
            metadata: Of the documents.

        Returns:
            The ids.

        Raises:
            InputError: if ids, metadata or texts cannot be stored.
        """
        encoder = self._encoder()
        records = records_of(texts, ids, metadata)
        with self._changing() as writer:
            for at in range(0, len(texts), 1024):
                batch = writer.batch(encoder.dim)
                some = slice(at, at + 1024)
                vectors = encoder.encode_documents(
                    texts[some], pool_factor=writer.state.model.pool_factor
                )
                for record, text, rows in zip(records[some], texts[some], vectors, strict=True):
                    batch.begin(record)
                    batch.add(rows.numpy(), text, Place(end=len(text)))
                batch.commit()
            self._maintain(writer)
        return [record.id for record in records]

    def add_vectors(
        self,
        vectors: Sequence[Vectors],
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Index texts whose token vectors were made elsewhere.

        Args:
            vectors: Normalised rows of each text, [n, dim] with n at least 1.
            texts: The texts; may be empty.
            ids: Of the documents; by default new ones.
            metadata: Of the documents.

        Returns:
            The ids.

        Raises:
            InputError: if something does not fit together.
        """
        records = records_of(texts, ids, metadata)
        if len(vectors) != len(texts):
            raise InputError(
                f"{len(vectors)} vectors came with {len(texts)} texts; give one for each"
            )
        if not len(texts):
            return []
        dim = self._state.model.dim or int(np.shape(vectors[0])[-1])
        arrays = [checked_rows(one, dim, "vectors of a text") for one in vectors]
        with self._changing() as writer:
            if not writer.state.model.dim:
                writer.set_model(replace(writer.state.model, dim=dim))
            batch = writer.batch(dim)
            for record, text, rows in zip(records, texts, arrays, strict=True):
                batch.begin(record)
                batch.add(rows, text, Place(end=len(text)))
            batch.commit()
            self._maintain(writer)
        return [record.id for record in records]

    def delete(self, ids: str | Sequence[str]) -> int:
        """Delete documents, or single passages, by id.

        An id is looked for among documents first, then among passages.

        Returns:
            How many of the ids were found.
        """
        wanted = dict.fromkeys([ids] if isinstance(ids, str) else ids)
        gone: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        found = 0
        with self._changing() as writer:
            for id in wanted:
                hits = list(find_passages(writer.snapshot, id))
                found += bool(hits)
                for number, places in hits:
                    gone[number].append(places)
            writer.delete(gone)
            self._maintain(writer)
        return found

    def compact(self) -> None:
        """Drop what is deleted, merge segments, train the codebook anew if it is outgrown."""
        with self._changing() as writer:
            writer.compact()

    @contextmanager
    def bulk(self) -> Iterator[Index]:
        """Hold the writer's lock over many additions, and train and merge when they are over.

        Each addition is acknowledged as always.
        """
        with self._changing() as writer:
            self._bulk += 1
            try:
                yield self
            finally:
                self._bulk -= 1
            self._maintain(writer)

    # ---- reading ----

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        filter: Filter | None = None,
        hybrid: bool | None = None,
        exact: bool = False,
        spans: bool = True,
    ) -> list[Hit]:
        """The best passages for a question, best first.

        Args:
            query: The question.
            k: How many.
            filter: On metadata, applied before scoring: `{"lang": "de"}`, `"year>=2020"`.
            hybrid: Whether words (BM25) take part; None for the default.
            exact: Whether to score every passage.
            spans: Whether to mark the matched words of the hits.

        Raises:
            FilterError: if the filter cannot be understood.
            InputError: if the query is empty or `k` is not positive.
        """
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"the query is {query!r}; write what to look for")
        encoder = self._encoder()
        rows = encoder.encode_queries([query])[0].numpy()
        both = HYBRID if hybrid is None else hybrid
        snapshot = self._snapshot
        with self._reading():
            allowed = snapshot.allowed(parse_filter(filter))
            deep = max(_DEEP, 10 * k) if both else k
            passages, scores = self._best(rows, deep, allowed, exact)
            ranked = list(zip(passages.tolist(), scores.tolist(), strict=True))
            if both:
                ranked = lexical.fuse(passages.tolist(), self._by_words(query, deep, allowed))
            return hits(snapshot, encoder, query, ranked[:k], spans=spans)

    def search_vectors(
        self,
        query: Vectors,
        k: int = 10,
        *,
        filter: Filter | None = None,
        exact: bool = False,
    ) -> list[tuple[str, float]]:
        """The best passages for query rows [q, dim]: ids and MaxSim scores, best first.

        Raises:
            FilterError: if the filter cannot be understood.
            InputError: if the rows do not fit the index or `k` is not positive.
        """
        conditions = parse_filter(filter)
        dim = self._state.model.dim
        rows = checked_rows(query, dim or int(np.shape(query)[-1]), "query")
        with self._reading():
            allowed = self._snapshot.allowed(conditions)
            passages, scores = self._best(rows, k, allowed, exact)
            pairs = zip(passages.tolist(), scores.tolist(), strict=True)
            return [(self._snapshot.id_of(passage), score) for passage, score in pairs]

    def vectors(self, id: str) -> NDArray[np.float32]:
        """The token vectors of a passage as the index knows them, [n, dim].

        Raises:
            InputError: if there is no such passage.
        """
        for number, places in find_passages(self._snapshot, id):
            return self._snapshot.segments[number].rows(places)
        raise InputError(f"there is no passage {id!r} in the index; list it to see the ids")

    def documents(self) -> Iterator[DocumentRow]:
        """Every document, in the order of storage."""
        return document_rows(self._snapshot)

    def status(self, verify: bool = False) -> Status:
        """How the index stands.

        Args:
            verify: Read every file and compare it with its checksum.

        Raises:
            CorruptIndex: if a file is damaged; names it.
        """
        if verify:
            self._snapshot.verify()
        return status_of(self._snapshot, verified=verify)

    def refresh(self) -> bool:
        """See what other writers did since; whether there was anything."""
        writer = self._open
        newest = open_snapshot(self._folder, writer.snapshot)
        if newest is None or newest is writer.snapshot:
            return False
        writer.snapshot = newest
        return True

    def close(self) -> None:
        """Let go of the files. Closing again does nothing."""
        self._writer = None

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ----

    @property
    def _open(self) -> Writer:
        if self._writer is None:
            raise IndexFault(f"the index {str(self._folder)!r} is closed; open it again")
        return self._writer

    @property
    def _snapshot(self) -> Snapshot:
        return self._open.snapshot

    @property
    def _state(self) -> Any:
        return self._snapshot.state

    def _encoder(self) -> EncoderLike:
        return self._source.encoder(self._state.model)

    @contextmanager
    def _changing(self) -> Iterator[Writer]:
        if self._read_only:
            raise IndexFault(
                f"the index {str(self._folder)!r} was opened read-only; open it without read_only"
            )
        with self._open.session() as writer:
            yield writer

    def _maintain(self, writer: Writer) -> None:
        writer.maintain(final=not self._bulk)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A damaged file may lead out of an array: say so, and how to find it."""
        try:
            yield
        except (IndexError, UnicodeDecodeError) as error:
            raise CorruptIndex(
                f"the index {str(self._folder)!r} contradicts itself ({error}); run `lfm2-mm index "
                "status --verify` to find the damaged file"
            ) from error

    def _best(
        self, rows: NDArray[np.float32], k: int, allowed: NDArray[np.bool_], exact: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k is {k!r}; ask for at least 1 passage")
        snapshot = self._snapshot
        if not allowed.any():
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if not exact and snapshot.book is not None:
            return plaid.search(snapshot, rows, k, allowed)
        passages = np.flatnonzero(allowed)
        scores = exact_search.score_all(snapshot, rows, passages)
        best = plaid.top(scores, k)
        return passages[best], scores[best]

    def _by_words(self, query: str, count: int, allowed: NDArray[np.bool_]) -> list[int]:
        snapshot = self._snapshot
        pairs = [
            (int(first), segment.lexical)
            for first, segment in zip(snapshot.firsts[:-1], snapshot.segments, strict=True)
        ]
        scores = lexical.score(query, pairs, snapshot.n_passages)
        scores[~allowed] = 0.0
        best = plaid.top(scores, count)
        return [int(one) for one in best if scores[one] > 0]
