"""Memory for weights, on huge pages where the system has them: fewer of them are looked up.

Small pieces are cut from large blocks, since a page is 2 MB. Knows bytes only.
"""

from __future__ import annotations

import mmap
import threading

import torch
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["huge"]

_PAGE = 2**21
_BLOCK = 2**25
_LINE = 64

_lock = threading.Lock()
_block: list[Tensor] = []  # what is left of the current one


def huge(nbytes: int) -> UInt8[Tensor, " n"]:
    """Zeros that start on a border of 64 bytes; freed with the last tensor of their block."""
    if nbytes > _BLOCK // 2:
        return _map(nbytes)
    with _lock:
        if not _block or len(_block[0]) < nbytes:
            _block[:] = [_map(_BLOCK)]
        room = _block[0]
        taken = -(-nbytes // _LINE) * _LINE
        _block[0] = room[taken:]
    return room[:nbytes]


def _map(nbytes: int) -> Tensor:
    """Pages of their own, from the border of a huge one on."""
    pages = mmap.mmap(-1, nbytes + 2 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # a system that has none
        pass
    room = torch.frombuffer(pages, dtype=torch.uint8)
    return room[-room.data_ptr() % _PAGE :][:nbytes]
