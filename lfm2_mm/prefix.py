"""Prefixes already computed: boundaries of finished prompts, found again by content.

Keeps snapshots under the identity of the positions before them (token ids, and the content of
images and audio), so that a second question about a picture starts where the picture ended. Knows
no model and no request.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict

from jaxtyping import Int
from torch import Tensor

from lfm2_mm.cache import Snapshot

__all__ = ["PrefixCache"]


_DIGEST = 16  # bytes; a conversation has a boundary for each second of speech, so keys are small


class PrefixCache:
    """Snapshots by a digest of their prefix, bounded in bytes, least recently used out first.

    Attributes:
        hits: Lookups that found a prefix.
        misses: Lookups that found none.
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self.max_bytes, self.hits, self.misses = max_bytes, 0, 0
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes kept alive; snapshots that share a buffer count it once."""
        kept = self._kept.values()
        buffers = {snapshot.buffer_id: snapshot.buffer_nbytes for snapshot in kept}
        return sum(_DIGEST + snapshot.nbytes for snapshot in kept) + sum(buffers.values())

    def find(self, identity: Int[Tensor, " n"]) -> Snapshot | None:
        """The longest kept boundary strictly inside these positions, or None."""
        best: bytes | None = None
        read, done = hashlib.blake2b(digest_size=_DIGEST), 0
        for n in sorted(n for n in self._lengths if n < len(identity)):
            read.update(identity[done:n].numpy().tobytes())
            done, key = n, read.digest()
            if key in self._kept:
                best = key
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(best)
        return self._kept[best]

    def keep(self, identity: Int[Tensor, " n"], snapshot: Snapshot) -> None:
        """Remember a boundary; `identity` names the positions before it."""
        if self.max_bytes <= 0 or snapshot.length == 0:
            return
        prefix = identity[: snapshot.length].numpy().tobytes()
        key = hashlib.blake2b(prefix, digest_size=_DIGEST).digest()
        self._lengths[snapshot.length] += key not in self._kept
        self._kept[key] = snapshot
        self._kept.move_to_end(key)
        while self._kept and self.nbytes > self.max_bytes:
            gone = self._kept.popitem(last=False)[1].length
            self._lengths[gone] -= 1
            if not self._lengths[gone]:
                del self._lengths[gone]

    def clear(self) -> None:
        """Forget every boundary."""
        self._kept.clear()
        self._lengths.clear()
