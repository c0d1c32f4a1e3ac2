"""What a search benchmark searches: passages of real text, encoded, or drawn clusters of vectors.

Writes the three files that `searchers.Corpus` reads, a block at a time. Knows no searcher.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import InputError

__all__ = ["MANUALS", "Stored", "Vectors", "draw", "encode", "passages"]

MANUALS = Path("/usr/share/man")
"""Manual pages of this machine; Debian has them in some 30 languages (`manpages-de`, …)."""
_WORDS = 75
_BLOCK = 512
_TEXT = {".txt", ".md", ".rst", ".html", ".py", ".gz", ""}
# what a manual page's markup looks like: requests at line starts, escapes within lines
_REQUEST = re.compile(r"^[.'](?:\\\"|[A-Za-z]{1,3}\b)?[ \t]*", re.MULTILINE)
_ESCAPE = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|s[+-]?\d+|\*?\[[^\]\n]*\]|\*?\(..|[&|^%:e~0 -])")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """What was written.

    Attributes:
        passages: Passages.
        tokens: Their token vectors.
        queries: The queries' texts; empty for drawn vectors.
        encoded: Passages that this run encoded; the others had been kept.
        seconds: What that took.
    """

    passages: int
    tokens: int
    queries: tuple[str, ...] = ()
    encoded: int = 0
    seconds: float = 0.0


def passages(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    """Different passages of about 75 words from a folder's text files, files in shuffled order.

    Files of Debian's manual pages (`*.1.gz`) are freed of their markup.

    Raises:
        InputError: if the folder holds no text.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in _TEXT or _is_page(path))
    random.Random(seed).shuffle(files)
    found: dict[str, None] = {}
    for path in files:
        for passage in _cut(path):
            found[passage] = None
            if len(found) == count:
                return list(found)
    if not found:
        raise InputError(f"{str(folder)!r} holds no text to search in; name a folder with --corpus")
    return list(found)


def _is_page(path: Path) -> bool:
    return re.fullmatch(r"\.[1-9]\w*", path.suffix) is not None


def _cut(path: Path) -> Iterator[str]:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
        return
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return
    if _is_page(path) or _is_page(path.with_suffix("")):
        text = _ESCAPE.sub("", _REQUEST.sub("", text).replace("\\-", "-"))
    words = text.split()
    # without spaces a word is a sentence: cut by characters there
    size = min(_WORDS, max(8, round(_WORDS * 6 * len(words) / max(1, sum(map(len, words))))))
    for begin in range(0, len(words) - size // 3, size):
        yield " ".join(words[begin : begin + size])[:1200]


def encode(
    texts: Sequence[str],
    encoder: Any,
    folder: Path,
    *,
    queries: int,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Stored:
    """Encode passages with a model, and as queries some words of random passages.

    Args:
        texts: The passages.
        encoder: Makes the vectors.
        folder: Where the three files go.
        queries: How many.
        seed: Names the queries.
        cache: Folder that keeps vectors: what another run began is carried on, and what it finished
            is used again. None keeps nothing.
        progress: Told the passages encoded so far and all.
    """
    key = hashlib.sha256(f"{encoder.fingerprint}\n{texts[0]}".encode()).hexdigest()[:16]
    kept = Vectors(folder if cache is None else cache / f"vectors-{key}", encoder.dim)
    began = time.perf_counter()
    done = kept.agrees(texts)
    for begin in range(done, len(texts), _BLOCK):
        some = texts[begin : begin + _BLOCK]
        kept.add(some, [rows.numpy() for rows in encoder.encode_documents(some)])
        if progress is not None:
            progress(begin + len(some), len(texts))
    seconds = time.perf_counter() - began
    if cache is not None:
        (folder / "vectors.f2").symlink_to(kept.path.resolve())
    lengths = kept.lengths[: len(texts)]
    chance = random.Random(seed)
    asked = []
    for text in chance.choices(texts, k=queries):
        words = text.split()
        size = min(len(words), chance.randint(5, 10))
        begin = chance.randint(0, len(words) - size)
        asked.append(" ".join(words[begin : begin + size])[:100])
    rows = [one.numpy() for one in encoder.encode_queries(asked)]
    longest = max(map(len, rows))
    # rows of zeros add nothing to any score
    padded = [np.pad(one, ((0, longest - len(one)), (0, 0))) for one in rows]
    _write(folder, lengths, np.stack(padded))
    return Stored(
        len(lengths), int(lengths.sum()), tuple(asked), encoded=len(texts) - done, seconds=seconds
    )


class Vectors:
    """Vectors of passages in a folder that grows by blocks.

    `vectors.f2` has the rows, `passages.u8` a digest and a length a passage. What a stopped run
    left half-written is cut off.

    Args:
        folder: Where; made if absent.
        dim: Length of a vector.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._notes, self._row = folder / "vectors.f2", folder / "passages.u8", 2 * dim
        for path in (self.path, self._notes):
            path.touch()
        whole = self._notes.stat().st_size // 16
        notes = np.fromfile(self._notes, "<u8", 2 * whole).reshape(-1, 2)
        self._known: NDArray[Any] = notes
        ends = np.cumsum(notes[:, 1].astype(np.int64)) * self._row
        self._keep(notes[: int(np.searchsorted(ends, self.path.stat().st_size, "right"))])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each passage."""
        return self._known[:, 1].astype(np.int64)

    def agrees(self, texts: Sequence[str]) -> int:
        """How many of these passages are there, from the first on; others behind them go."""
        count = min(len(texts), len(self._known))
        same = self._known[:count, 0] == _digests(texts[:count])
        if not same.all():
            count = int(np.argmin(same))
            self._keep(self._known[:count])
        return count

    def add(self, texts: Sequence[str], rows: Sequence[NDArray[Any]]) -> None:
        """Append passages."""
        notes = np.stack([_digests(texts), np.array([len(one) for one in rows], "<u8")], axis=1)
        for path, data in ((self.path, np.concatenate(rows).astype("<f2")), (self._notes, notes)):
            with open(path, "ab") as file:
                file.write(data.tobytes())
        self._known = np.concatenate([self._known, notes])

    def _keep(self, notes: NDArray[Any]) -> None:
        self._known = notes
        os.truncate(self._notes, 16 * len(notes))
        os.truncate(self.path, int(notes[:, 1].sum()) * self._row)


def _digests(texts: Sequence[str]) -> NDArray[Any]:
    """64 bits of each text."""
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(hashes), "<u8")


def draw(
    count: int, folder: Path, *, queries: int, dim: int = 128, tokens: int = 16, seed: int = 0
) -> Stored:
    """Short passages of drawn clusters.

    A passage has 8 to 24 tokens. Each is one of 20,000 senses with noise (cosine about 0.9); half
    of them are senses of the passage's topic, which has 64, the others any, the frequent ones often
    (Zipf's law). A query is 16 tokens of a passage with more noise.
    """
    source = np.random.default_rng(seed)
    senses = _unit(source.standard_normal((20_000, dim), dtype=np.float32))
    topics = source.integers(0, len(senses), (max(16, count // 100), 64))
    lengths = source.integers(tokens // 2, tokens + tokens // 2 + 1, count)
    about = source.integers(0, len(topics), count)
    chosen = set(source.choice(count, min(queries, count), replace=False).tolist())
    asked = []

    def shaken(rows: Any) -> Any:
        return _unit(rows + source.standard_normal(rows.shape, dtype=np.float32) * (0.5 / dim**0.5))

    with open(folder / "vectors.f2", "wb") as file:
        for begin in range(0, count, _BLOCK):
            numbers = np.arange(begin, min(begin + _BLOCK, count))
            size = lengths[numbers]
            topic = np.repeat(about[numbers], size)
            any_sense = (len(senses) ** source.random(len(topic))).astype(int) - 1
            own_sense = topics[topic, source.integers(0, topics.shape[1], len(topic))]
            rows = shaken(senses[np.where(source.random(len(topic)) < 0.5, own_sense, any_sense)])
            file.write(rows.astype("<f2").tobytes())
            ends = np.cumsum(size)
            for number in chosen.intersection(numbers.tolist()):
                end = ends[number - begin]
                mine = rows[end - lengths[number] : end]
                asked.append(shaken(mine[source.integers(0, len(mine), 16)]))
    _write(folder, lengths, np.stack(asked))
    return Stored(count, int(lengths.sum()))


def _write(folder: Path, lengths: Any, queries: Any) -> None:
    np.save(folder / "lengths.npy", np.asarray(lengths, np.int64))
    np.save(folder / "queries.npy", np.ascontiguousarray(queries, np.float32))


def _unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
