"""Source code and configuration: blocks at blank lines, definitions at the left margin.

No language is parsed: what starts at the margin after a blank line with a word is taken for a
definition, which holds for nearly every language that people indent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Extract, Kind, Limits
from lfm2_retrieval.documents.readers.decoding import decode
from lfm2_retrieval.documents.readers.scanning import Line, lines

__all__ = ["read"]

_DEFINITION = re.compile(
    r"(?:(?:pub(?:\([a-z]+\))?|export|default|async|static|public|private|protected|abstract|final"
    r"|unsafe|extern|inline|open|sealed|data|local)\s+)*"
    r"(?:def|class|fn|func|fun|function|struct|enum|trait|impl|interface|type|module|mod|namespace"
    r"|object|record|sub|CREATE|create|@\w|\[[\w.-]+\]|(?:[\w:*&<>]+\s+)+[\w:]+\s*\()"
)


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The text of a source file, verbatim, with its blocks."""
    text = decode(data, limits)
    blocks = tuple(_blocks(text))
    if not blocks:
        raise DocumentError("it holds nothing but space: there is nothing to index")
    facts = {"format": "code", "suffix": PurePosixPath(name).suffix.lstrip(".").lower()}
    yield Extract(text, blocks, title=PurePosixPath(name).name, metadata=facts)


def _blocks(text: str) -> Iterator[Block]:
    run: list[Line] = []
    for line in lines(text):
        if line.blank:
            yield from _block(run)
            run = []
        else:
            run.append(line)
    yield from _block(run)


def _block(run: list[Line]) -> Iterator[Block]:
    if run:
        kind: Kind = "definition" if _DEFINITION.match(run[0].text[:200]) else "code"
        end = run[-1].start + len(run[-1].text.rstrip())
        yield Block(run[0].start, end, kind, None, run[0].number)
