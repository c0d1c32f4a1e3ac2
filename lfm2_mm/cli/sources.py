"""What a user names on a command line as an attachment: a file, a URL, or `-` for standard input.

A URL is fetched and standard input read once, whatever happens to the attachment later. Which
modality it is, the model's encoders say; nothing here knows one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_mm.cli import terminal
from lfm2_mm.errors import InputError
from lfm2_mm.fetch import fetch, is_url, shown

if TYPE_CHECKING:
    from lfm2_mm.frontends import InputEncoder
    from lfm2_mm.model import Model

__all__ = ["Attachment", "encoders", "noun"]

_LIMIT = 1 << 30  # bytes of standard input; encoders have stricter limits of their own


class _Named(io.BytesIO):
    """Bytes that say where they came from."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class Attachment:
    """One attachment, which may be read as often as needed.

    Attributes:
        given: What the user wrote.
        kind: Its content type, once a model has looked at it; "" before.
    """

    def __init__(self, given: str, *, base: Path | None = None) -> None:
        self.given = given
        self.kind = ""
        self._base = base
        self._data: bytes | None = None

    def __repr__(self) -> str:
        return f"Attachment({self.given!r})"

    @property
    def path(self) -> Path | None:
        """Where a local file lies; None for a URL or standard input."""
        if self.given == "-" or is_url(self.given):
            return None
        path = Path(self.given)
        return path if self._base is None else self._base / path

    def check(self) -> None:
        """Refuse a file that does not exist, before a model is loaded for it.

        Raises:
            InputError: if there is no such file.
        """
        path = self.path
        if path is not None and not path.expanduser().exists():
            raise InputError(f"there is no file {self.given!r}; check the path")

    def open(self) -> str | io.BytesIO:
        """A path, or a binary file at its beginning.

        Raises:
            FetchError: if a URL cannot be fetched.
            InputError: if nothing comes from standard input.
        """
        path = self.path
        if path is not None:
            return str(path)
        if self._data is None:
            self._data = fetch(self.given) if self.given != "-" else _standard_input()
        name = "standard input" if self.given == "-" else shown(self.given)
        return _Named(self._data, name)

    def part(self, model: Model) -> dict[str, Any]:
        """The content part of a message.

        Raises:
            InputError: if the model reads no attachments.
        """
        self.kind = noun(_encoder(self.given, encoders(model), model.name))
        return {"type": self.kind, self.kind: self.open()}


def encoders(model: Model) -> tuple[InputEncoder, ...]:
    """The model's input encoders, each once."""
    return tuple({id(encoder): encoder for encoder in model.encoders.values()}.values())


def noun(encoder: InputEncoder) -> str:
    """What one attachment of an encoder is called: its shortest content type."""
    return min(encoder.types, key=lambda kind: (len(kind), kind))


def _encoder(given: str, known: Sequence[InputEncoder], model: str) -> InputEncoder:
    """Who reads an attachment: the one that knows the name, else the only one."""
    if not known:
        raise InputError(
            f"{model} reads text only, so {given!r} cannot be attached; use a model that reads it, "
            "such as LiquidAI/LFM2.5-VL-450M, or leave it out"
        )
    claims = [encoder for encoder in known if encoder.accepts(given)]
    if claims or len(known) == 1:
        return (claims or list(known))[0]
    kinds = " or ".join(sorted(noun(encoder) for encoder in known))
    raise InputError(f"{given!r} looks like neither {kinds}; give it a name with the usual ending")


def _standard_input() -> bytes:
    if terminal.is_terminal(sys.stdin):
        raise InputError("nothing is piped in, but '-' reads standard input; pipe a file into it")
    return sys.stdin.buffer.read(_LIMIT)
