"""Changes to an index: batches, deletions, merges; each is one new state on disk, or none.

Small segments are merged as they gather; vectors are stored as they are until there are enough of
them to train a codebook on. Knows no encoder and no documents but their rows.
"""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex
from lfm2_retrieval.index import files, manifest
from lfm2_retrieval.index.builder import SegmentBuilder, copy_live
from lfm2_retrieval.index.codec import SAMPLE_PER_CENTROID, Codebook, Reservoir, n_centroids
from lfm2_retrieval.index.lock import WriterLock
from lfm2_retrieval.index.manifest import Codes, Deleted, Manifest, Model, Part
from lfm2_retrieval.index.segment import Place, Record
from lfm2_retrieval.index.snapshot import Snapshot, open_snapshot

__all__ = ["EXACT_TOKENS", "Batch", "Sizes", "Writer", "create_index"]

EXACT_TOKENS = 1 << 16
"""Up to this many tokens vectors are stored as they are (17 MB at 128 dimensions): no slower."""


class Sizes:
    """When things are done. Tests make them small."""

    exact: int = EXACT_TOKENS
    train: int = 1 << 21
    """In the middle of a long addition the codebook is trained at this many tokens."""
    smallest: int = 1 << 15
    """Segments below it count as equally small."""
    fanout: int = 8
    """So many segments of about one size become one."""
    segment: int = 1 << 24
    """Larger segments are not merged: bounds the memory of a merge."""
    outgrown: int = 4
    """The codebook is trained anew when so many times its centroids are wanted."""
    sample: int = 1 << 19
    """Training tokens at most: 268 MB at 128 dimensions."""


class Batch:
    """Documents that become visible together.

    Args:
        writer: The writer, whose lock is held.
        dim: Length of a token's vector.
    """

    def __init__(self, writer: Writer, dim: int) -> None:
        self._writer = writer
        self._builder = SegmentBuilder(writer.folder, writer.new_name(), dim, writer.snapshot.book)
        self.ids: list[str] = []
        self._known: set[str] = set()

    def __contains__(self, id: str) -> bool:
        return id in self._known

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._builder.tokens

    def begin(self, record: Record) -> None:
        """Start a document; it will replace an earlier one of its id."""
        self._builder.begin(record)
        self.replace(record.id)

    def replace(self, id: str) -> None:
        """An earlier document of this id will go."""
        self.ids.append(id)
        self._known.add(id)

    def add(self, rows: NDArray[Any], text: str, place: Place) -> None:
        """Add a passage of the document that was begun."""
        self._builder.add(rows, text, place)

    def commit(self) -> None:
        """Make all of it durable and visible: that is acknowledged when this returns."""
        writer = self._writer
        parts: tuple[Part, ...] = ()
        if self._builder.passages:
            parts = (self._builder.finish(),)
        else:
            self.abandon()
        gone: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        for id in self.ids:
            for number, _, places in writer.snapshot.find(id):
                gone[number].append(places)
        if parts or gone:
            segments = (*writer.tombstones(gone), *parts)
            writer.publish(segments=segments)

    def abandon(self) -> None:
        """Give up what was not committed."""
        self._builder.abandon()


class Writer:
    """The one who changes an index. Everything but `session` needs its lock held.

    Args:
        folder: The index.
        snapshot: The state last seen.

    Attributes:
        snapshot: The newest state this writer knows.
    """

    def __init__(self, folder: Path, snapshot: Snapshot) -> None:
        self.folder, self.snapshot = folder, snapshot
        self._lock = WriterLock(folder)
        self._batches: list[Batch] = []

    @property
    def state(self) -> Manifest:
        """The newest manifest this writer knows."""
        return self.snapshot.state

    @contextmanager
    def session(self) -> Iterator[Writer]:
        """Hold the lock; begin with the state in force and without leftovers.

        Raises:
            IndexLocked: if another writer is at work.
            IndexFault: if the folder cannot be written.
        """
        with files.writing(self.folder):
            inner = self._lock.held
            with self._lock:
                if inner:
                    yield self
                    return
                newest = open_snapshot(self.folder, self.snapshot)
                if newest is None:
                    raise CorruptIndex(
                        f"the index {str(self.folder)!r} has lost its file 'CURRENT'; restore it "
                        "from a backup or build the index anew"
                    )
                self.snapshot = newest
                manifest.sweep(self.folder, self.state)
                try:
                    yield self
                finally:
                    for batch in self._batches:
                        batch.abandon()
                    self._batches = []

    def new_name(self) -> str:
        """A name that no segment or codebook has had."""
        return f"{self.state.generation + 1:08d}-{secrets.token_hex(4)}"

    def batch(self, dim: int) -> Batch:
        """Begin a batch; what is not committed when the session ends is given up."""
        made = Batch(self, dim)
        self._batches = [made]
        return made

    def set_model(self, model: Model) -> None:
        """Say what makes the vectors; for an index that is empty."""
        self.publish(model=model)

    def publish(self, **changes: Any) -> None:
        """Make a new state the one in force, then remove what it does not name."""
        state = self.state.next(**changes)
        manifest.commit(self.folder, state)
        self.snapshot = Snapshot(self.folder, state, self.snapshot)
        manifest.sweep(self.folder, state)

    def delete(self, gone: dict[int, list[NDArray[np.int64]]]) -> None:
        """Delete passages, given by segment number and places."""
        if gone:
            self.publish(segments=self.tombstones(gone))

    def tombstones(self, gone: dict[int, list[NDArray[np.int64]]]) -> tuple[Part, ...]:
        """The segments in force, with further passages deleted; those without any left go."""
        room = self.folder / "deleted"
        if gone:
            files.new_folder(room)
        parts = []
        for number, part in enumerate(self.state.segments):
            segment = self.snapshot.segments[number]
            if number in gone:
                dead = ~self.snapshot.live_of(number)
                dead[np.concatenate(gone[number])] = True
                if dead.all():
                    continue
                name = f"{part.name}.{self.state.generation + 1:08d}"
                deleted = Deleted(
                    name=name,
                    stored=files.put(room / name, np.packbits(dead).tobytes()),
                    passages=int(dead.sum()),
                    tokens=int(np.diff(segment.offsets)[dead].sum()),
                )
                part = replace(part, deleted=deleted)
            parts.append(part)
        return tuple(parts)

    def maintain(self, *, final: bool = True) -> None:
        """Train the codebook when it is time, and merge small segments.

        Args:
            final: Whether an addition is over, so that what came so far is all there is.
        """
        tokens = self.state.tokens
        if self.snapshot.book is None:
            if tokens > (Sizes.exact if final else Sizes.train):
                self._rewrite_all(self._train(tokens))
                return
        elif final and self._outgrown(tokens):
            self._rewrite_all(self._train(tokens))
            return
        while (group := self._tier()) is not None:
            self._merge(group)

    def compact(self) -> None:
        """Drop deleted passages, merge segments; train the codebook anew if it is outgrown."""
        tokens = self.state.tokens
        book = self.snapshot.book
        if (book is None and tokens > Sizes.exact) or (book and self._outgrown(tokens)):
            self._rewrite_all(self._train(tokens))
            return
        whole = [part.deleted is None for part in self.state.segments]
        if len(whole) > 1 or not all(whole):
            self._rewrite_all(None)

    def _outgrown(self, tokens: int) -> bool:
        codes = self.state.codebook
        wanted = n_centroids(tokens)
        return codes is not None and wanted >= Sizes.outgrown * codes.centroids

    def _train(self, tokens: int) -> tuple[Codebook, Codes]:
        """A new codebook, trained on a uniform sample of all tokens."""
        state = self.state
        size = min(Sizes.sample, SAMPLE_PER_CENTROID * n_centroids(tokens), tokens)
        kept = Reservoir(max(size, 1), state.model.dim)
        # whole passages, as many as give about four times the sample: reading all would be slow
        share = min(1.0, 4 * size / max(tokens, 1))
        chance = np.random.default_rng(state.generation)
        for number, segment in enumerate(self.snapshot.segments):
            live = np.flatnonzero(self.snapshot.live_of(number))
            live = live[chance.random(len(live)) < share] if share < 1 else live
            for block in np.array_split(live, max(1, math.ceil(len(live) / 256))):
                if len(block):
                    kept.add(segment.rows(block))
        book = Codebook.train(kept.sample, tokens, state.bits)
        name = self.new_name()
        stored = book.write(self.folder / "codebooks" / name)
        files.sync_folder(self.folder / "codebooks")
        codes = Codes(name=name, centroids=len(book.centroids), trained_tokens=tokens, files=stored)
        return book, codes

    def _tier(self) -> list[int] | None:
        """Segments of about one size that should be one, or one that is mostly deleted."""
        tiers: dict[int, list[int]] = defaultdict(list)
        for number, part in enumerate(self.state.segments):
            if part.deleted is not None and 2 * part.deleted.passages > part.passages:
                return [number]
            if part.live_tokens < Sizes.segment // 2:
                size = max(part.live_tokens, Sizes.smallest) / Sizes.smallest
                tiers[int(math.log(size, Sizes.fanout) + 1e-9)].append(number)
        for numbers in tiers.values():
            if len(numbers) >= Sizes.fanout:
                return numbers
        return None

    def _merge(self, group: Sequence[int]) -> None:
        made = self._rewrite(group, self.snapshot.book)
        kept = [part for n, part in enumerate(self.state.segments) if n not in set(group)]
        self.publish(segments=(*kept, *made))

    def _rewrite_all(self, trained: tuple[Codebook, Codes] | None) -> None:
        book, codes = trained or (self.snapshot.book, self.state.codebook)
        made: list[Part] = []
        group: list[int] = []
        size = 0
        for number, part in enumerate(self.state.segments):
            if group and size + part.live_tokens > Sizes.segment:
                made += self._rewrite(group, book)
                group, size = [], 0
            group.append(number)
            size += part.live_tokens
        if group:
            made += self._rewrite(group, book)
        self.publish(segments=tuple(made), codebook=codes)

    def _rewrite(self, group: Iterable[int], book: Codebook | None) -> list[Part]:
        builder = SegmentBuilder(self.folder, self.new_name(), self.state.model.dim, book)
        try:
            for number in group:
                live = self.snapshot.live_of(number)
                same = book is self.snapshot.book
                copy_live(self.snapshot.segments[number], live, builder, same=same)
            if not builder.passages:
                return []
            return [builder.finish()]
        finally:
            builder.abandon()


def create_index(folder: Path, model: Model, bits: int) -> Snapshot:
    """Make an empty index in a new or empty folder.

    Raises:
        IndexFault: if the folder cannot be written.
        IndexLocked: if another process is making it.
    """
    with files.writing(folder):
        files.new_folder(folder)
        with WriterLock(folder):
            found = open_snapshot(folder)
            if found is None:
                state = Manifest(generation=1, model=model, bits=bits)
                manifest.commit(folder, state)
                found = Snapshot(folder, state)
            return found
