"""What the machine itself gives: bytes a second from memory, operations a second in 8 bits.

The two limits that no program passes: writing a token reads every weight once, reading a prompt
multiplies with every weight for every token. Knows torch, and nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["int8_rate", "memory_rate"]

_TRIES = 5


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_rate(threads: int) -> float:
    """Bytes a second that `torch.sum` reads from memory, the best of some tries."""
    import torch

    with _threads(threads):
        numbers = torch.ones(2**27)  # larger than the caches; integers are added up one by one
        best = 0.0
        for _ in range(_TRIES):
            began = time.perf_counter()
            numbers.sum()
            best = max(best, numbers.nbytes / (time.perf_counter() - began))
        return best


def int8_rate(threads: int) -> float:
    """Operations a second (two a product) of `torch._int_mm`, the best of some tries."""
    import torch

    rows, inputs, outputs = 512, 2048, 4096
    with _threads(threads):
        x = torch.ones(rows, inputs, dtype=torch.int8)
        w = torch.ones(inputs, outputs, dtype=torch.int8)
        best = 0.0
        for _ in range(_TRIES):
            began = time.perf_counter()
            torch._int_mm(x, w)
            best = max(best, 2 * rows * inputs * outputs / (time.perf_counter() - began))
        return best
