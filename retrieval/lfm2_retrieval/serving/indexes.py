"""The indexes of a server: opened with a served model, used between the worker's steps.

A server that is told of no index keeps one called `scratch`, gone when it ends, so that documents
can be dropped on its page at once. Knows indexes and the server's registry; no HTTP.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from lfm2_mm.errors import InputError
from lfm2_mm.server.context import Context
from lfm2_mm.server.problems import ApiError
from lfm2_retrieval.index.index import Index
from lfm2_retrieval.index.model import AddReport

__all__ = ["SCRATCH", "Indexes", "add_files", "indexes_of", "upload_name"]

SCRATCH = "scratch"
_EXTRA = "retrieval"
_LONGEST = 512  # characters of a document's name
_T = TypeVar("_T")


class Indexes:
    """Indexes by name.

    Args:
        context: The server's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folders = {name: Path(path) for name, path in context.options.indexes.items()}
        if not self._folders:
            scratch = tempfile.mkdtemp(prefix="lfm2-mm-scratch-")
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
            self._folders[SCRATCH] = Path(scratch)
        self._open: dict[str, Index] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What callers may name."""
        return tuple(self._folders)

    async def use(self, name: str | None, work: Callable[[Index], _T]) -> _T:
        """Run `work` on an index, as it now stands on disk, in the worker.

        Raises:
            ApiError: 404 if there is no such index, 503 while no retriever is loaded.
        """
        if name is None and len(self._folders) == 1:
            name = next(iter(self._folders))
        if name not in self._folders:
            raise ApiError(
                404,
                f"there is no index {str(name)[:100]!r} here; this server has "
                f"{', '.join(self._folders)}",
                code="index_not_found",
                param="index",
            )
        self._context.registry.find(None, "embeddings")

        def job() -> _T:
            assert name is not None
            index = self._open.get(name)
            if index is None:
                index = self._open[name] = self._opened(self._folders[name])
            index.refresh()
            return work(index)

        return await self._context.worker.run(job)

    def _opened(self, folder: Path) -> Index:
        """The index, with the served model that made it; a new one gets the first retriever."""
        models = [
            served.model
            for served in self._context.registry.served.values()
            if hasattr(served.model, "encode_queries")
        ]
        if not folder.exists() or not any(folder.iterdir()):
            return Index.open(folder, models[0])
        made_by = Index.open(folder, create=False, read_only=True).status().fingerprint
        fitting = [model for model in models if model.fingerprint == made_by]
        return Index.open(folder, fitting[0] if fitting else None, create=False)


def indexes_of(context: Context) -> Indexes:
    """The indexes of a server, made when they are first asked for."""
    found = context.extras.get(_EXTRA)
    if found is None:
        found = context.extras[_EXTRA] = Indexes(context)
    indexes: Indexes = found
    return indexes


def upload_name(given: str | None, place: int) -> PurePosixPath:
    """The name under which an uploaded file is kept: relative, and never out of its folder.

    Raises:
        InputError: if a file cannot have this name.
    """
    name = (given or "").replace("\\", "/").strip("/")
    path = PurePosixPath(name)
    parts = path.parts
    bad = (
        not parts
        or len(name) > _LONGEST
        or any(part in ("..", ".") or part.startswith(".") or len(part) > 200 for part in parts)
        or not name.isprintable()
        or "\0" in name
    )
    if bad:
        raise InputError(
            f"file {place} is named {str(given)[:80]!r}, which cannot be kept here; give a plain "
            "relative name"
        )
    return path


def add_files(index: Index, files: Sequence[tuple[PurePosixPath, bytes]]) -> AddReport:
    """Index uploaded files under their own names; nothing of them stays on disk beside it."""
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-upload-") as folder:
        for name, content in files:
            target = Path(folder, *name.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return index.add([folder])
