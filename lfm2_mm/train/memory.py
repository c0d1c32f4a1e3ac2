"""Memory that training frees stays with the process, for the next step to use.

Every step allocates the same large tensors. The C library gives each back to the system and asks
for it anew, and the system hands out zeroed pages one fault at a time; that took a tenth of a
training step on a CPU. Knows glibc and nothing of tensors.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # numbers of glibc's malloc.h
_PLENTY, _PAD = 2**31 - 1, 2**28


def keep_freed_memory() -> bool:
    """Tell the allocator of this process; says whether it was understood.

    Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is None:
        return False
    return all(
        tell(name, value) for name, value in ((_MMAP, _PLENTY), (_TRIM, _PLENTY), (_TOP_PAD, _PAD))
    )
