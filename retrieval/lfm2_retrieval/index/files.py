"""Files that survive a crash: written under their own name, hashed, fsynced, and only then named.

Every step that changes the disk passes `trace`, so that a test can stop a process between any two
of them. Knows nothing of what the files say.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex, IndexFault

__all__ = [
    "FileWriter",
    "Stored",
    "check_content",
    "map_array",
    "map_bytes",
    "new_folder",
    "put",
    "remove",
    "sync_folder",
    "trace",
    "writing",
]

_SMALL, _CHUNK = 1 << 16, 1 << 20

_WHY = {
    errno.ENOSPC: "the disk is full; free some space and run it again",
    errno.EDQUOT: "the disk quota is used up; free some space and run it again",
    errno.EFBIG: "a file would be larger than is allowed here; raise the limit and run it again",
    errno.EROFS: "the file system is read-only; open it with read_only=True or copy it elsewhere",
    errno.EACCES: "permission was denied; open it with read_only=True or change its owner",
    errno.EPERM: "permission was denied; open it with read_only=True or change its owner",
}


def _nothing(step: str, path: Path) -> None:
    """What `trace` is outside of tests."""


trace: Callable[[str, Path], None] = _nothing
"""Called before each step: `open`, `write`, `sync`, `rename`, `sync-folder`, `folder`, `remove`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file must hold: its size in bytes and the hex SHA-256 of its content."""

    size: int
    sha256: str

    def to_json(self) -> list[Any]:
        """As it stands in a manifest."""
        return [self.size, self.sha256]

    @classmethod
    def from_json(cls, value: Any) -> Stored:
        """From a manifest.

        Raises:
            ValueError: if it is something else.
        """
        size, sha256 = value
        if not isinstance(size, int) or size < 0 or not isinstance(sha256, str):
            raise ValueError("no size and checksum")
        return cls(size, sha256)


class FileWriter:
    """A new file that is hashed while it is written; `close` makes it durable.

    The folder's entry is made durable by `sync_folder`.
    """

    def __init__(self, path: Path) -> None:
        trace("open", path)
        self.path = path
        self._file = open(path, "xb", buffering=0)
        self._hash = hashlib.sha256()
        self._waiting = bytearray()
        self._size = 0

    def write(self, data: bytes | NDArray[Any]) -> None:
        """Append bytes, or an array's values in C order and the byte order of the machine."""
        if isinstance(data, np.ndarray):
            plain: Any = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            content = memoryview(plain)
        else:
            content = memoryview(data)
        if len(content) < _SMALL:
            self._waiting += content
            if len(self._waiting) >= _SMALL:
                self.flush()
            return
        self.flush()
        for begin in range(0, len(content), _CHUNK):
            self._put(content[begin : begin + _CHUNK])

    def flush(self) -> None:
        """Hand everything to the system, so that it can be read."""
        waiting, self._waiting = self._waiting, bytearray()
        if waiting:
            self._put(memoryview(waiting))

    def _put(self, data: memoryview) -> None:
        trace("write", self.path)
        self._hash.update(data)
        self._size += len(data)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> Stored:
        """Make the content durable; what it is."""
        self.flush()
        trace("sync", self.path)
        os.fsync(self._file.fileno())
        self._file.close()
        return Stored(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without a promise; the file stays as a leftover."""
        self._file.close()


def put(path: Path, data: bytes) -> Stored:
    """Write a file whole: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp")
    remove(temporary)
    writer = FileWriter(temporary)
    try:
        writer.write(data)
        stored = writer.close()
    except BaseException:
        writer.abandon()
        raise
    trace("rename", temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return stored


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    trace("sync-folder", path)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def new_folder(path: Path) -> None:
    """Make a folder and its parents, durably; one that exists is left as it is."""
    if path.is_dir():
        return
    new_folder(path.parent)
    trace("folder", path)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; what is not there is no matter."""
    if path.is_dir() and not path.is_symlink():
        trace("remove", path)
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():
        trace("remove", path)
        path.unlink(missing_ok=True)


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map an array of a file into memory, read-only.

    Raises:
        CorruptIndex: if the file is missing or has another size.
    """
    wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    _check_size(path, wanted)
    if not wanted:
        return np.empty(shape, dtype)
    # a plain array over the mapping: slices of np.memmap cost several times as much
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))


def map_bytes(path: Path, size: int) -> NDArray[np.uint8]:
    """Map a file of a known size as bytes."""
    return map_array(path, np.uint8, (size,))


def _check_size(path: Path, wanted: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorruptIndex(
            f"the index file {str(path)!r} cannot be read ({error.strerror}); restore it from a "
            "backup or build the index anew"
        ) from error
    if size != wanted:
        raise CorruptIndex(
            f"the index file {str(path)!r} has {size} bytes instead of {wanted}; restore it from "
            "a backup or build the index anew"
        )


def check_content(path: Path, stored: Stored, *, full: bool = False) -> None:
    """Check a file's size and, if `full`, its content.

    Raises:
        CorruptIndex: if it differs; names the file.
    """
    _check_size(path, stored.size)
    if full:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != stored.sha256:
            raise CorruptIndex(
                f"the index file {str(path)!r} has the checksum {found[:12]}… instead of "
                f"{stored.sha256[:12]}…; restore it from a backup or build the index anew"
            )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one sentence.

    Raises:
        IndexFault: if the disk is full, read-only or forbidden.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WHY:
            raise
        raise IndexFault(
            f"the index {str(folder)!r} cannot be written ({error.strerror}): {_WHY[error.errno]}"
        ) from error
