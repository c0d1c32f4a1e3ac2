"""Memory-mapped files that nobody wrote to, and letting go of their pages.

A page of such a mapping can leave memory at any time and comes back from the file when it is
touched. Linux only: elsewhere none is found. Knows addresses, not what lies there.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["CleanPages"]


@dataclass(frozen=True)
class CleanPages:
    """Mappings of files, unchanged in memory when they were looked for.

    Attributes:
        ranges: First address and the one behind the last, of each mapping.
    """

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def find(cls, smaps: Path = Path("/proc/self/smaps")) -> CleanPages:
        """The mappings of this process; none where the system does not tell."""
        try:
            lines = smaps.read_text("utf-8", "replace").splitlines()
        except OSError:
            return cls(())
        found: dict[tuple[int, int], bool] = {}
        current = (0, 0)
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):  # address range, rights, offset, device, inode, path
                low, high = name.split("-")
                current = int(low, 16), int(high, 16)
                found[current] = rest.split()[3] != "0"
            elif name in ("Anonymous:", "Swap:"):  # what was written to is no longer the file's
                found[current] &= rest.split()[0] == "0"
        return cls(tuple(place for place, clean in found.items() if clean))

    def hold(self, tensor: Tensor) -> bool:
        """Whether a contiguous tensor lies within one of them."""
        start, end = _extent(tensor)
        return any(low <= start and end <= high for low, high in self.ranges)

    def release(self, tensor: Tensor) -> None:
        """Let go of the pages that this tensor fills alone; its values stay what they are.

        Raises:
            ValueError: if it lies elsewhere: its values would be lost.
        """
        if not self.hold(tensor):
            raise ValueError("the tensor does not lie in a clean mapping")
        page, (start, end) = mmap.PAGESIZE, _extent(tensor)
        start, end = -(-start // page) * page, end // page * page
        if start < end:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
