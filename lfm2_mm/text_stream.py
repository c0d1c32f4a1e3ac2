"""Token ids become text as they arrive: whole characters only, stop strings held back.

Knows nothing of sampling or of any tokenizer: it is handed a function that decodes ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lfm2_mm.errors import InputError

__all__ = ["TextStream"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8  # ids enough to see whether a text ends in the middle of a character


class TextStream:
    """Decodes one sequence incrementally.

    The pieces that `push` returns, then that of `flush`, join to `decode(all ids)`, up to the first
    stop string. Only a short window of ids is decoded at each step: the ids behind the last piece
    (so that a tokenizer which treats a leading space specially sees what came before) and those
    not yet shown. A text that ends in U+FFFD may be an unfinished character and waits.

    Example:
        >>> stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stop=["END"])
        >>> [stream.push(byte) for byte in "aé E!".encode()]
        ['a', '', 'é', ' ', '', 'E!']

    Attributes:
        stopped: Whether a stop string was met. Its text, and all after it, is never returned.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: str | Sequence[str] = (),
        skip: Collection[int] = (),
    ) -> None:
        """Start an empty stream.

        Args:
            decode: Text of a list of ids; unfinished characters must come out as U+FFFD.
            stop: Strings that end the text; the one that is complete first counts.
            skip: Ids that are dropped unseen.

        Raises:
            InputError: if a stop string is empty.
        """
        self.stopped = False
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stops:
            raise InputError(
                "a stop string is empty, which would stop every answer at once; leave it out"
            )
        self._decode = decode
        self._skip = frozenset(skip)
        self._ids: list[int] = []  # the window
        self._shown = 0  # how many ids of the window are shown
        self._shown_text = ""  # their text
        self._pending = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain, often empty."""
        if self.stopped or token_id in self._skip:
            return ""
        self._ids.append(token_id)
        waiting = len(self._ids) - self._shown
        if waiting > _TAIL and self._decode(self._ids[-_TAIL:]).endswith(_UNFINISHED):
            return ""
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._shown_text) :]
        if new:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._shown_text = self._decode(self._ids)
        elif waiting == 1 and self._decode([token_id, token_id]) == "":
            self._ids.pop()  # a token without text, such as a special one: forget it
        return self._release(new, final=False)

    def flush(self) -> str:
        """Return what was held back; call it once, when no more ids come."""
        if self.stopped:
            return ""
        new = self._decode(self._ids)[len(self._shown_text) :] if self._ids else ""
        self._ids, self._shown, self._shown_text = [], 0, ""
        return self._release(new, final=True)

    def _release(self, new: str, *, final: bool) -> str:
        """Add `new` to the pending text and give out what no stop string can claim any more."""
        text = self._pending + new
        found = [
            (at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0
        ]  # (end, start)
        if found:
            self.stopped = True
            self._pending = ""
            return text[: min(found)[1]]
        held = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
