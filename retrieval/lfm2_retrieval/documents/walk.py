"""Folders become files, in sorted order, and files become bytes, if they may be opened at all.

Links that leave the folder are refused, pipes and devices never opened, hidden names and caches of
tools passed over. This module knows no format.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Limits, Unreadable

__all__ = ["Found", "Root", "is_hidden", "read_bytes", "roots", "walk"]

_CACHES = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True, slots=True)
class Root:
    """What the caller named: a folder, whose files are named relative to it, or a file.

    Attributes:
        path: As given.
        real: Without links.
        name: How the documents are named: empty for a folder.
    """

    path: Path
    real: Path
    name: str


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was found.

    Attributes:
        name: The document's path.
        real: The file, without links.
        within: The folder that it must lie in.
    """

    name: str
    real: Path
    within: Path


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over inside a folder."""
    return name.startswith(".") or name in _CACHES or name.endswith("~")


def roots(paths: Sequence[str | Path]) -> Iterator[Root | Unreadable]:
    """What some paths name; what does not exist comes back as unreadable."""
    for given in paths:
        path = Path(given)
        try:
            real = path.resolve(strict=True)
        except FileNotFoundError:
            yield Unreadable(_shown(str(path)), "there is no such file or folder: check the name")
            continue
        except (OSError, RuntimeError, ValueError) as error:
            yield Unreadable(_shown(str(path)), f"it cannot be opened: {_reason(error)}")
            continue
        if real.is_dir():
            yield Root(path, real, "")
            continue
        plain = not path.is_absolute() and ".." not in path.parts
        yield Root(path, real, path.as_posix() if plain else path.name)


def walk(root: Root) -> Iterator[Found | Unreadable]:
    """The files of a root, in the order of their names, part by part."""
    if root.name:
        yield _judge(root.name, root.real, root.real.parent)
        return
    pending: list[tuple[str, Path]] = [("", root.real)]
    while pending:
        name, path = pending.pop()
        if name and (not _is_folder(path) or path.is_symlink()):
            if not path.is_symlink():
                yield _judge(name, path, root.real)
            else:
                yield from _link(name, path, root.real)
            continue
        try:
            entries = sorted(entry for entry in os.listdir(path) if not is_hidden(entry))
        except OSError as error:
            yield Unreadable(_shown(name or "."), f"it cannot be listed: {_reason(error)}")
            continue
        prefix = f"{name}/" if name else ""
        pending += [(prefix + entry, path / entry) for entry in reversed(entries)]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _link(name: str, path: Path, within: Path) -> Iterator[Found | Unreadable]:
    """A link in a folder: a file inside is read; a folder inside is read where it really stands."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        yield Unreadable(_shown(name), f"the link leads nowhere: {_reason(error)}")
        return
    if not real.is_relative_to(within):
        yield Unreadable(
            _shown(name), "the link leaves the folder: name its target as a path of its own"
        )
    elif not real.is_dir():
        yield _judge(name, real, within)


def _judge(name: str, real: Path, within: Path) -> Found | Unreadable:
    if not name.isprintable() or _shown(name) != name:
        return Unreadable(
            _shown(name), "its name holds characters that cannot be stored: rename it"
        )
    try:
        mode = os.lstat(real).st_mode
    except OSError as error:
        return Unreadable(name, f"it cannot be opened: {_reason(error)}")
    if not stat.S_ISREG(mode):
        return Unreadable(name, "it is no regular file but a pipe, socket or device: leave it out")
    return Found(name, real, within)


def _shown(name: str) -> str:
    """A name that can be printed and stored."""
    known = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in known)


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{words[:1].lower()}{words[1:]}"


def read_bytes(found: Found, limits: Limits) -> bytes:
    """The bytes of a file.

    The file that was opened is looked at once more: it may have been swapped since it was found.

    Raises:
        DocumentError: if it cannot be opened, is too large, or is not what was found.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        handle = os.open(found.real, flags)
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or not _lies_within(handle, found.within):
                raise DocumentError("it was swapped while the folder was read: run again")
            if status.st_size > limits.bytes:
                raise _too_large(status.st_size, limits)
            data = stream.read(limits.bytes + 1)
    except OSError as error:
        raise DocumentError(f"it cannot be opened: {_reason(error)}") from error
    if len(data) > limits.bytes:
        raise _too_large(len(data), limits)
    return data


def _too_large(size: int, limits: Limits) -> DocumentError:
    return DocumentError(
        f"it has {size / 2**20:.1f} MiB, more than the {limits.bytes / 2**20:.4g} MiB that are "
        "allowed: split it"
    )


def _lies_within(handle: int, folder: Path) -> bool:
    """Whether an open file lies in a folder; True where the system does not say where it lies."""
    try:
        place = os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return True
    return PurePath(place.removesuffix(" (deleted)")).is_relative_to(folder)
