"""Prefixes already computed: boundaries of finished prompts, found again by content.

Keeps snapshots under the identity of the positions before them (token ids, and the content of
images and audio), so that a second question about a picture starts where the picture ended. Knows
no model and no request.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from jaxtyping import Int
from torch import Tensor

from lfm2_mm.cache import Snapshot

__all__ = ["PrefixCache"]


class PrefixCache:
    """Snapshots by prefix, bounded in bytes, least recently used out first.

    Attributes:
        hits: Lookups that found a prefix.
        misses: Lookups that found none.
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self.max_bytes, self.hits, self.misses = max_bytes, 0, 0
        self._kept: OrderedDict[bytes, tuple[Tensor, Snapshot]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes kept alive; snapshots that share a buffer count it once."""
        kept = self._kept.values()
        buffers = {snapshot.buffer_id: snapshot.buffer_nbytes for _, snapshot in kept}
        own = sum(2 * prefix.nbytes + snapshot.nbytes for prefix, snapshot in kept)
        return own + sum(buffers.values())

    def find(self, identity: Int[Tensor, " n"]) -> Snapshot | None:
        """The longest kept boundary strictly inside these positions, or None."""
        best: tuple[int, bytes] | None = None
        for key, (prefix, snapshot) in self._kept.items():
            n = snapshot.length
            longer = best is None or n > best[0]
            if longer and n < len(identity) and torch.equal(prefix, identity[:n]):
                best = (n, key)
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(best[1])
        return self._kept[best[1]][1]

    def keep(self, identity: Int[Tensor, " n"], snapshot: Snapshot) -> None:
        """Remember a boundary; `identity` names the positions before it."""
        if self.max_bytes <= 0 or snapshot.length == 0:
            return
        prefix = identity[: snapshot.length].clone()
        key = prefix.numpy().tobytes()
        self._kept[key] = (prefix, snapshot)
        self._kept.move_to_end(key)
        while self._kept and self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget every boundary."""
        self._kept.clear()
