"""Encoder outputs kept by content key, least recently used out first.

A picture asked about twice is encoded once. Knows keys, tensors and a budget; no encoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lfm2_mm.errors import PlaceholderMismatch
from lfm2_mm.frontends import InputEncoder, Prepared

__all__ = ["FeatureCache"]


class FeatureCache:
    """Features of content parts, bounded in bytes.

    Attributes:
        encoded: How many parts an encoder really ran on.
        hits: How many were served from here.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes, self.encoded, self.hits = max_bytes, 0, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, encoder: InputEncoder, parts: Sequence[Prepared]) -> list[Tensor]:
        """Features `[n_positions, d]` of each part; those not kept are encoded in one batch.

        Raises:
            PlaceholderMismatch: if an encoder returns another number of rows than it announced.
        """
        found = {part.key: self._kept[part.key] for part in parts if part.key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        missing = list({part.key: part for part in parts if part.key not in found}.values())
        self.hits += len(parts) - len(missing)
        if missing:
            with torch.inference_mode():
                features = encoder.encode(missing)
            self.encoded += len(missing)
            for part, rows in zip(missing, features, strict=True):
                if rows.shape[0] != part.n_positions:
                    raise PlaceholderMismatch(
                        f"the encoder returned {rows.shape[0]} feature rows for a part with "
                        f"{part.n_positions} positions; the checkpoint's preprocessor files and "
                        "config disagree"
                    )
                if rows.untyped_storage().nbytes() > rows.nbytes:
                    rows = rows.clone()  # a view would keep its whole batch alive
                found[part.key] = rows
                self._keep(part.key, rows)
        return [found[part.key] for part in parts]

    def clear(self) -> None:
        """Forget everything kept."""
        self._kept.clear()
        self._bytes = 0

    def _keep(self, key: str, rows: Tensor) -> None:
        if rows.nbytes > self.max_bytes:
            return
        self._kept[key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self.max_bytes:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes
