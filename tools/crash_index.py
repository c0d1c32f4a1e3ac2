"""Kill a writer of an index again and again, and look what it left.

    python tools/crash_index.py --runs 200

A child adds, updates, deletes and compacts, and says what it begins and what was acknowledged. It
dies, or is refused a write, in one of these ways:

    kill       SIGKILL at a random moment
    step       SIGKILL just before a random step that changes the disk, in the middle of a file too
    power      the same, and what was not synced is lost: files cut off, renames undone
    full       a write fails as on a full disk; the child must go on afterwards
    limit      the system refuses to let a file grow (RLIMIT_FSIZE); the child must go on afterwards
    read-only  the folder may not be written; searches work, changes are refused

Then the index is opened: it must pass the full check, hold every acknowledged document in its
acknowledged version, and no deleted one. What was under way may be there whole, or not at all.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from lfm2_mm.errors import IndexFault
from lfm2_retrieval.index import files
from lfm2_retrieval.index.index import Index
from lfm2_retrieval.index.writer import Sizes

MODES = ("kill", "step", "power", "full", "limit", "read-only")
DIM, DOCUMENTS, FRESH = 16, 60, 25

Contents = dict[str, int]
"""What an index holds: the version of each document by its id."""


class Failure(Exception):
    """The index broke its promise."""


def small() -> None:
    """Make training, merging and retraining happen within a few operations."""
    Sizes.exact, Sizes.train, Sizes.smallest = 600, 4000, 64
    Sizes.fanout, Sizes.outgrown, Sizes.segment = 3, 2, 2000


def vectors(id: str, version: int) -> NDArray[np.float32]:
    """The rows of a version of a document: the same wherever they are made."""
    seed = int.from_bytes(f"{id}/{version}".encode(), "little") % (1 << 63)
    source = np.random.default_rng(seed)
    rows = source.standard_normal((int(source.integers(3, 30)), DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def operations(seed: int, held: Contents) -> Iterator[tuple[str, Contents]]:
    """Endless random operations: the ids and versions to add, or the ids to delete."""
    chance, held, version = random.Random(seed), dict(held), max(held.values(), default=0)
    while True:
        kind = chance.choices(["add", "delete", "compact"], [6, 3, 1])[0]
        what: Contents = {}
        if kind == "add":
            for _ in range(chance.randint(1, 12)):
                version += 1
                what[f"d{chance.randrange(DOCUMENTS)}"] = version
            held.update(what)
        elif kind == "delete":
            some = chance.sample(sorted(held), min(len(held), chance.randint(1, 8)))
            what = {id: held.pop(id) for id in some}
        yield kind, what


def after(held: Contents, kind: str, what: Contents) -> Contents:
    """What the index holds when an operation is over."""
    if kind == "delete":
        return {id: version for id, version in held.items() if id not in what}
    return {**held, **what} if kind == "add" else dict(held)


def apply(index: Index, kind: str, what: Contents) -> None:
    """Do an operation."""
    if kind == "add":
        index.add_vectors(
            [vectors(id, version) for id, version in what.items()],
            [f"text of {id} in version {version}" for id, version in what.items()],
            list(what),
            [{"version": version} for version in what.values()],
        )
    elif kind == "delete":
        index.delete(list(what))
    else:
        index.compact()


# ---- the child ----


class Killer:
    """Counts the steps that change the disk and strikes at one of them.

    Args:
        at: Which step.
        strike: What happens then.
    """

    def __init__(self, at: int, strike: Callable[[str], None]) -> None:
        self._left, self._strike = at, strike

    def __call__(self, step: str, path: Path) -> None:
        """See `files.trace`."""
        self._left -= 1
        if self._left <= 0:
            self._strike(step)


class Power(Killer):
    """Remembers what a power failure would undo, and undoes it before it strikes.

    A step is told before it is done, so it counts from the next step on.
    """

    def __init__(self, at: int, seed: int) -> None:
        super().__init__(at, lambda _: self._fail())
        self._chance = random.Random(seed)
        self._unsynced: set[Path] = set()
        self._unnamed: dict[Path, bytes | None] = {}
        self._last: tuple[str, Path, bytes | None] | None = None

    def __call__(self, step: str, path: Path) -> None:
        """See `files.trace`."""
        self._note()
        old = None
        if step == "rename" and (target := path.with_name(path.name.removesuffix(".tmp"))).exists():
            old = target.read_bytes()
        self._last = step, path, old
        super().__call__(step, path)

    def _note(self) -> None:
        if self._last is None:
            return
        step, path, old = self._last
        if step == "open":
            self._unsynced.add(path)
            self._unnamed[path] = None
        elif step == "sync":
            self._unsynced.discard(path)
        elif step == "rename":
            target = path.with_name(path.name.removesuffix(".tmp"))
            if path in self._unsynced:
                self._unsynced.add(target)
            self._unnamed.pop(path, None)
            self._unnamed[target] = old
        elif step == "sync-folder":
            self._unnamed = {p: o for p, o in self._unnamed.items() if p.parent != path}

    def _fail(self) -> None:
        for path in self._unsynced:
            if path.is_file():
                os.truncate(path, self._chance.randint(0, path.stat().st_size))
        for path, old in self._unnamed.items():
            if path.is_file() and self._chance.random() < 0.5:
                path.unlink() if old is None else path.write_bytes(old)
        die("")


def die(_: str) -> None:
    """End at once, with nothing tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(step: str) -> None:
    """Fail as a full disk does."""
    if step in ("open", "write", "sync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(folder: Path, seed: int, mode: str, held: Contents, pipe: int) -> NoReturn:
    """Change the index until something happens; say on a pipe what is begun and acknowledged."""

    def say(*values: Any) -> None:
        os.write(pipe, json.dumps(values).encode() + b"\n")

    chance = random.Random(seed)
    index = Index.open(folder)
    if mode == "read-only":
        _try_read_only(folder, index, held)
        os._exit(0)
    at = chance.randint(1, 400)
    if mode == "step":
        files.trace = Killer(at, die)
    elif mode == "power":
        files.trace = Power(at, seed)
    for number, (kind, what) in enumerate(operations(seed, held)):
        say("begin", kind, what)
        if mode in ("full", "limit") and number == at % 7:
            if mode == "full":
                files.trace = Killer(chance.randint(1, 60), refuse)
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = chance.choice([0, 100, 1000])
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            apply(index, kind, what)
            refused = ""
        except IndexFault as error:
            refused = str(error)
        if mode in ("full", "limit"):
            files.trace = lambda step, path: None
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if refused:
            # a refusal while merging comes after the commit: what holds is what a reader sees
            say("refused", refused, contents(folder))
        else:
            say("done")
        if mode in ("full", "limit") and number >= 12:
            os._exit(0)
    os._exit(4)


def _try_read_only(folder: Path, index: Index, held: Contents) -> None:
    """Take the right to write away, for root by becoming nobody."""
    index.close()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        folder.parent.chmod(0o755)
        os.setgid(65534)
        os.setuid(65534)
    index = Index.open(folder)
    for id, version in list(held.items())[:3]:
        if not index.search_vectors(vectors(id, version), 1):
            os._exit(5)
    try:
        index.add_vectors([vectors("x", 1)], ["x"], ["x"])
    except IndexFault:
        return
    os._exit(6)


# ---- the parent ----


def run(folder: Path, seed: int, mode: str, held: Contents) -> tuple[list[Contents], int]:
    """Let one child work and die.

    Returns:
        What the index may hold now (one or two states), and how many operations were acknowledged.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 2
        try:
            work(folder, seed, mode, held, write)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(write)
    if mode == "kill":
        time.sleep(random.Random(seed).uniform(0.02, 0.8))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        said = [json.loads(line) for line in pipe if line.endswith(b"\n")]
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if died != (mode in ("kill", "step", "power")):
        raise Failure(f"the child of mode {mode}, seed {seed} ended with status {status}")
    if mode == "read-only":
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    done, possible = 0, [held]
    for word, *values in said:
        if word == "begin":
            possible = [possible[0], after(possible[0], *values)]
        elif word == "done":
            done, possible = done + 1, possible[1:]
        elif values[1] in possible:
            possible = [values[1]]
        else:
            raise Failure(f"after the refusal {values[0]!r} the index holds {values[1]}")
    return possible, done


def contents(folder: Path) -> Contents:
    """What an index holds."""
    with Index.open(folder, create=False, read_only=True) as index:
        return {row.id: int(row.metadata["version"]) for row in index.documents()}


def check(folder: Path, possible: list[Contents], seed: int) -> Contents:
    """Open the index and compare it with what it may hold.

    Raises:
        Failure: if it holds something else.
    """
    found = contents(folder)
    if found not in possible:
        lost = {id for id in possible[0] if found.get(id) != possible[0][id]}
        extra = found.keys() - possible[0].keys()
        raise Failure(f"lost or changed: {sorted(lost)}; not deleted: {sorted(extra)}")
    with Index.open(folder, create=False) as index:
        index.status(verify=True)
        chance = random.Random(seed)
        for id in chance.sample(sorted(found), min(4, len(found))):
            rows = vectors(id, found[id])
            best = index.search_vectors(rows, 1)[0][0]
            if best != f"{id}#0":
                raise Failure(f"the rows of {id} find {best}")
            if f"version {found[id]}" not in text_of(index, id):
                raise Failure(f"the text of {id} is of another version")
        index.delete([])  # a writer that changes nothing removes leftovers
        named = {path.relative_to(folder) for path in index._state.named(folder)}
        there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        rest = {path.name for path in there - named if not path.name.startswith("manifest-")}
        if not named <= there or rest != {"CURRENT", "lock"}:
            raise Failure(f"files do not fit the manifest: {sorted(map(str, there ^ named))}")
    return found


def text_of(index: Index, id: str) -> str:
    """The stored text of a document's only passage."""
    number, _, places = next(iter(index._snapshot.find(id)))
    return index._snapshot.segments[number].text(int(places[0]))


def main(arguments: list[str] | None = None) -> int:
    """Run and report; the exit status is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES))
    options = parser.parse_args(arguments)
    modes = options.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"no such mode: {', '.join(sorted(unknown))}; choose from {', '.join(MODES)}")
    small()
    counts: Counter[str] = Counter()
    done = 0
    torch.set_num_threads(1)  # the index follows; OpenMP's threads do not live on in a fork
    with tempfile.TemporaryDirectory(prefix="crash-index-") as scratch:
        folder, held = Path(scratch) / "index", Contents()
        for number in range(options.runs):
            seed, mode = options.seed + number, modes[number % len(modes)]
            if number % FRESH == 0:
                shutil.rmtree(folder, ignore_errors=True)
                Index.open(folder).close()
                held = {}
            try:
                possible, acknowledged = run(folder, seed, mode, held)
                held = check(folder, possible, seed)
            except Exception as error:
                print(f"FAILED in mode {mode}, seed {seed}: {type(error).__name__}: {error}")
                return 1
            counts[mode] += 1
            done += acknowledged
    each = ", ".join(f"{count} {mode}" for mode, count in counts.items())
    print(f"{options.runs} runs ({each}), {done} operations acknowledged: none lost, none undone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
