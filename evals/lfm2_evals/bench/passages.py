"""What a search benchmark searches: passages of real text, encoded, or drawn clusters of vectors.

Writes the three files that `searchers.Corpus` reads, a block at a time. Knows no searcher.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_mm.errors import InputError

__all__ = ["MANUALS", "Stored", "draw", "encode", "passages"]

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
    """

    passages: int
    tokens: int
    queries: tuple[str, ...] = ()


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
    progress: Progress | None = None,
) -> Stored:
    """Encode passages with a model, and as queries some words of random passages."""
    lengths: list[int] = []
    with open(folder / "vectors.f2", "wb") as file:
        for begin in range(0, len(texts), _BLOCK):
            for rows in encoder.encode_documents(texts[begin : begin + _BLOCK]):
                file.write(rows.numpy().astype("<f2").tobytes())
                lengths.append(len(rows))
            if progress is not None:
                progress(len(lengths), len(texts))
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
    return Stored(len(lengths), sum(lengths), tuple(asked))


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
