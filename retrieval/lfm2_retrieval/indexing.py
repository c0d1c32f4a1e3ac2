"""`lfm2-mm index add|rm|ls|status|compact`: make an index, change it, look at it.

Knows the order of things and what is said; reading, encoding and writing are done by others.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.errors import InputError, Lfm2Error
from lfm2_retrieval.opening import (
    common_options,
    index_argument,
    open_index,
    open_with_model,
    print_json,
    retriever_options,
)

if TYPE_CHECKING:
    from lfm2_retrieval.documents import Changes
    from lfm2_retrieval.index.index import Index
    from lfm2_retrieval.index.model import AddReport

__all__ = ["index"]

_INTERRUPTED = 130
_LISTED = 50
"""So many unreadable files are listed; --json has them all."""

Tick = Callable[["AddReport"], None]


@click.group(short_help="Make and look after an index of documents.")
def index() -> None:
    """Make an index of documents, change it, look at it.

    \b
    lfm2-mm index add notes.idx ~/notes
    lfm2-mm search notes.idx "where did I leave the keys?"
    """  # noqa: D301


@index.command(short_help="Add files and folders, or bring them up to date.")
@index_argument
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@retriever_options
@click.option("--watch", is_flag=True, help="Stay and follow every change until Ctrl-C.")
@click.option(
    "--pool-factor",
    type=click.IntRange(min=1),
    help="Merge similar vectors to about one in so many: smaller, a little less exact.  "
    "[default: as the index was made, 1 for a new one]",
)
def add(index: Path, paths: tuple[Path, ...], **params: Any) -> None:
    """Index files and folders; INDEX is made if there is none.

    Reads txt, md, html, pdf, docx, csv, jsonl, source code and gz of these. What is unchanged is
    left alone, so that the same command again continues after Ctrl-C and brings an index up to
    date. What cannot be read is listed at the end; exit 1 if nothing could be read.
    """
    count = _count_files(paths)
    if not count:
        named = ", ".join(repr(str(path)) for path in paths)
        raise InputError(f"there are no documents in {named}; check the path")
    _check_apart(index, paths)
    opened, _ = open_with_model(index, params, create=True, pool_factor=params["pool_factor"])
    report = _add(opened, paths, count, params)
    if params["watch"]:
        _watch(opened, paths, params)
    elif not (report.added or report.updated or report.unchanged or report.removed):
        raise InputError(
            f"nothing could be read of {terminal.count(count, 'file')}; the list above says why"
        )


def _count_files(paths: Sequence[Path]) -> int:
    """How many files there are, readable or not."""
    from lfm2_retrieval.documents.walk import Root, roots, walk

    return sum(
        1 for root in roots(paths) for _ in (walk(root) if isinstance(root, Root) else (root,))
    )


def _check_apart(index: Path, paths: Sequence[Path]) -> None:
    """Refuse to index the index's own files.

    Raises:
        InputError: if it lies among the documents.
    """
    from lfm2_retrieval.documents.walk import is_hidden

    own = index.resolve()
    for path in paths:
        real = path.resolve()
        if own.is_relative_to(real) and not any(map(is_hidden, own.relative_to(real).parts)):
            raise InputError(
                f"the index {str(index)!r} lies in {str(path)!r}, whose files it is to hold; put "
                "it elsewhere, or give it a hidden name such as .index"
            )


def _add(opened: Index, paths: Sequence[Path], count: int, params: dict[str, Any]) -> AddReport:
    """Add, show how far it is, and say what came of it."""
    try:
        with _bar(count, quiet=params["quiet"]) as tick:
            report = opened.add(list(paths), progress=tick)
    except KeyboardInterrupt:
        stands = opened.status()
        terminal.say(
            f"interrupted: the index holds {terminal.count(stands.documents, 'document')} "
            f"({terminal.count(stands.passages, 'passage')}), and they stay; the same command "
            "again continues"
        )
        raise click.exceptions.Exit(_INTERRUPTED) from None
    if params["as_json"]:
        stands = opened.status()
        found = {k: v for k, v in asdict(report).items() if k not in ("skipped", "current")}
        unreadable = [asdict(one) for one in report.skipped]
        facts = {"index": str(stands.path), "model": stands.model, "documents": stands.documents}
        print_json({**facts, **found, "unreadable": unreadable})
    else:
        click.echo(_summary(report))
        _list_unreadable(report)
    return report


def _summary(report: AddReport) -> str:
    """`12 documents added, 1 updated: 340 passages, 12,345 tokens in 3.2 s`."""
    counts = {
        "added": report.added,
        "updated": report.updated,
        "removed": report.removed,
        "unchanged": report.unchanged,
        "unreadable": len(report.skipped),
    }
    words = ", ".join(f"{n:,} {word}" for word, n in counts.items() if n or word == "added")
    passages = terminal.count(report.passages, "passage")
    tokens = terminal.count(report.tokens, "token")
    return f"documents: {words}; {passages}, {tokens} in {report.seconds:.1f} s"


def _list_unreadable(report: AddReport) -> None:
    if report.skipped:
        terminal.say(f"could not be read ({len(report.skipped):,}):")
    for one in report.skipped[:_LISTED]:
        terminal.say(f"  {one.path}: {' '.join(one.reason.split())}")
    if len(report.skipped) > _LISTED:
        terminal.say(f"  and {len(report.skipped) - _LISTED:,} more; --json lists them all")


@contextmanager
def _bar(total: int, *, quiet: bool) -> Iterator[Tick | None]:
    """A bar of files with rate and time left, only where a person reads stderr."""
    if quiet or not terminal.is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("indexing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate="")
        files, last = 0, ""

        def tick(report: AddReport) -> None:
            nonlocal files, last
            current = (report.current or "").partition("#")[0]  # rows of one table are one file
            files, last = files + (current != last), current
            done = min(total, files + report.unchanged + len(report.skipped))
            rate = report.passages / report.seconds if report.seconds else 0.0
            bar.update(task, completed=done, rate=f"{rate:,.0f} passages/s")

        yield tick


def _watch(opened: Index, paths: Sequence[Path], params: dict[str, Any]) -> None:
    """Follow the changes of the paths until Ctrl-C."""
    from lfm2_retrieval.documents import watch

    removed: set[str] = set()
    changed: set[str] = set()

    def follow(changes: Changes) -> None:
        # what cannot be done now is done with the next change
        removed.update(changes.removed)
        removed.difference_update(changes.changed)
        changed.update(changes.changed)
        try:
            gone = [id for name in sorted(removed) for id in _matching(opened, name)]
            deleted = opened.delete(gone) if gone else 0
            removed.clear()
            report = opened.add(list(paths), only=sorted(changed)) if changed else None
            changed.clear()
        except Lfm2Error as error:  # a lock, a full disk: the next change tries again
            terminal.warn(" ".join(str(error).split()))
            return
        words = f"{terminal.count(deleted, 'document')} removed; " if deleted else ""
        if report is not None:
            words += _summary(report)
            _list_unreadable(report)
        terminal.say(words.rstrip("; "), quiet=params["quiet"])

    terminal.say("watching for changes; Ctrl-C ends", quiet=params["quiet"])
    logging.getLogger("watchfiles").setLevel(logging.ERROR)  # it remarks on Ctrl-C
    watch(list(paths), follow)


def _matching(opened: Index, name: str) -> list[str]:
    """Ids of the documents that a name means: itself, rows of a table, a folder, or a pattern."""
    below = name.rstrip("/") + "/"
    return [
        row.id
        for row in opened.documents()
        if row.id == name
        or row.id.startswith((below, f"{name}#"))
        or (any(sign in name for sign in "*?[") and fnmatchcase(row.id, name))
    ]


@index.command(short_help="Remove documents.")
@index_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@common_options
def rm(index: Path, names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Remove documents: NAME is a path as `index ls` shows it, a folder of them or a pattern."""
    opened = open_index(index)
    ids: dict[str, None] = {}
    unknown = []
    for name in names:
        found = _matching(opened, name)
        ids.update(dict.fromkeys(found))
        if not found:
            unknown.append(name)
    if ids:
        opened.delete(list(ids))
    if as_json:
        print_json({"index": str(index), "removed": list(ids), "unknown": unknown})
    elif not quiet:
        click.echo(f"{terminal.count(len(ids), 'document')} removed")
    if unknown:
        raise InputError(
            f"the index {str(index)!r} holds no document {unknown[0]!r}; lfm2-mm index ls shows "
            "their names"
        )


@index.command(short_help="List the documents.")
@index_argument
@common_options
def ls(index: Path, as_json: bool, quiet: bool) -> None:
    """List the documents: language, passages, name, title."""
    rows = list(open_index(index, read_only=True).documents())
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        title = f"  {row.title}" if row.title else ""
        line = f"{row.language or '-':<4}{row.passages:>6}  {row.path or row.id}{title}"
        click.echo(" ".join(terminal.clean(line).split("\n")))
    terminal.dim(terminal.count(len(rows), "document"), quiet=quiet)


@index.command(short_help="Say how an index stands, or check every file of it.")
@index_argument
@click.option("--verify", is_flag=True, help="Read every file and compare its checksum.")
@common_options
def status(index: Path, verify: bool, as_json: bool, quiet: bool) -> None:
    """Say what an index holds and what it takes; with --verify, exit 1 if a file is damaged."""
    opened = open_index(index, read_only=True)
    with terminal.working("reading every file" if verify else "looking", quiet=quiet):
        found = opened.status(verify=verify)
    if as_json:
        facts = {**asdict(found), "path": str(found.path)}
        print_json({**facts, "bytes_per_token": round(found.bytes_per_token, 2)})
        return
    kind = "exact: every passage is scored"
    if not found.exact:
        kind = f"{found.bits} bit, {terminal.count(found.centroids, 'centroid')}"
    model = found.model or "none: the vectors were handed in"
    if found.model:
        model += f" ({found.dim} dimensions, fingerprint {found.fingerprint})"
    rows = {
        "model": model,
        "documents": f"{found.documents:,}",
        "passages": f"{found.passages:,}"
        + (f" ({found.deleted:,} deleted ones still take room)" if found.deleted else ""),
        "tokens": f"{found.tokens:,}",
        "size": f"{terminal.size(found.bytes)}, {found.bytes_per_token:.0f} bytes per token",
        "search": kind,
        "segments": f"{found.segments}",
        "checked": "every file has its checksum" if verify else "sizes only; --verify reads all",
    }
    for name, text in rows.items():
        click.echo(terminal.clean(f"{name:<11}{text}"))


@index.command(short_help="Drop what is deleted and merge the parts.")
@index_argument
@common_options
def compact(index: Path, as_json: bool, quiet: bool) -> None:
    """Drop what is deleted, merge segments, train the codebook anew if it is outgrown."""
    opened = open_index(index)
    before = opened.status().bytes
    with terminal.working("compacting", quiet=quiet):
        opened.compact()
    after = opened.status().bytes
    if as_json:
        print_json({"index": str(index), "bytes_before": before, "bytes": after})
    elif not quiet:
        click.echo(f"{terminal.size(before)} became {terminal.size(after)}")
