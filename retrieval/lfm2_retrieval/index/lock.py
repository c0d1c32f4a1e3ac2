"""One writer at a time: an advisory lock on a file that says who holds it.

The system drops the lock when its process ends, however it ends. Knows nothing of the index.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from lfm2_mm.errors import IndexLocked

__all__ = ["WriterLock"]


class WriterLock:
    """The lock of an index folder; use it as a context manager.

    Entering again while it is held (by the same object) counts.

    Args:
        folder: The index.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._handle: int | None = None
        self._depth = 0

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._handle is not None

    def __enter__(self) -> WriterLock:
        if self._handle is None:
            self._handle = self._acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            handle, self._handle = self._handle, None
            # a child that was forked while we held it shares the lock; unlock for all
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _acquire(self) -> int:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise IndexLocked(
                f"process {holder or 'unknown'} is writing to the index "
                f"{str(self._path.parent)!r}; wait until it has finished and try again"
            ) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only its holder stays unnamed
        return handle
