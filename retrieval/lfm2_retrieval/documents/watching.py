"""Keeps an eye on files and folders: calls back with what changed, on watchfiles.

It reads nothing: the caller reads the changed paths anew. It passes over what `walk` passes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_mm.errors import DocumentError, MissingExtra
from lfm2_retrieval.documents.model import Unreadable
from lfm2_retrieval.documents.walk import Root, is_hidden, roots

if TYPE_CHECKING:
    from threading import Event

__all__ = ["Changes", "watch"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened since the last call.

    Attributes:
        changed: Documents that are new or were written to, named as `read_documents` names them.
        removed: Files that are gone; a folder that was moved away may be named itself.
    """

    changed: tuple[str, ...]
    removed: tuple[str, ...]


def watch(
    paths: Sequence[str | Path],
    on_change: Callable[[Changes], None],
    *,
    stop: Event | None = None,
    wait_ms: int = 400,
) -> None:
    """Call back after every change in some files and folders, until stopped; Ctrl-C also stops.

    Args:
        paths: Files and folders, as for `read_documents`.
        on_change: Called in this thread; changes made meanwhile are reported in the next call.
        stop: Ends the watch when set.
        wait_ms: Changes that follow each other within this time are reported together.

    Raises:
        DocumentError: if a path does not exist.
        MissingExtra: if watchfiles is not installed.
    """
    try:
        from watchfiles import Change
        from watchfiles import watch as changes_of
    except ImportError as error:
        raise MissingExtra(
            "watching folders needs the package 'watchfiles', which is not installed: "
            "run pip install 'lfm2-mm[retrieval]'"
        ) from error
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    watched = []
    for root in roots(named):
        if isinstance(root, Unreadable):
            raise DocumentError(f"{root.path} cannot be watched: {root.reason}")
        watched.append(root)
    # A file is watched through its folder: editors replace files, and a watch follows the old one.
    places = sorted({str(root.real.parent if root.name else root.real) for root in watched})
    stream = changes_of(
        *places,
        watch_filter=lambda _, path: _name(path, watched) is not None,
        debounce=max(wait_ms, 50),
        step=min(max(wait_ms // 4, 10), 100),
        rust_timeout=500,
        stop_event=stop,
        raise_interrupt=False,
        recursive=any(not root.name for root in watched),
    )
    for batch in stream:
        last: dict[str, bool] = {}
        for change, path in batch:
            name = _name(path, watched)
            if name is not None:
                last[name] = change == Change.deleted and not Path(path).exists()
        changed = tuple(sorted(name for name, gone in last.items() if not gone))
        removed = tuple(sorted(name for name, gone in last.items() if gone))
        on_change(Changes(changed, removed))


def _name(path: str, watched: Sequence[Root]) -> str | None:
    """How a path is named as a document; None if it is not among those watched."""
    place = Path(path)
    for root in watched:
        if root.name:
            if place == root.real:
                return root.name
        elif place.is_relative_to(root.real) and place != root.real:
            inner = place.relative_to(root.real)
            if not any(is_hidden(part) for part in inner.parts):
                return inner.as_posix()
    return None
