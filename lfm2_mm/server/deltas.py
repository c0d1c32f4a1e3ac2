"""Raw pieces of an answer become what a client streams: reasoning, content, and calls at the end.

Follows the rules of `lfm2_mm.toolcalls.parse_output` while the text is still coming: what is shown
is what it would call text. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lfm2_mm.toolcalls import CALL_START, THINK_END, THINK_START, ToolCall, parse_output

__all__ = ["Delta", "Splitter"]


@dataclass(frozen=True)
class Delta:
    """What is new.

    Attributes:
        content: Text of the answer.
        reasoning: Text of the think block.
        tool_calls: All calls; only in the last delta.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


class Splitter:
    """Takes raw text as it comes.

    Args:
        thinking_open: Whether the prompt already ended in `<think>`.
    """

    def __init__(self, *, thinking_open: bool = False) -> None:
        self._waiting = ""
        self._state, self._thinking_open = "start", thinking_open

    def push(self, piece: str) -> Delta:
        """What can be shown now."""
        self._waiting += piece
        reasoning = content = ""
        if self._state == "start":
            body = self._waiting.lstrip()
            if body.startswith(THINK_START):
                self._state, self._waiting = "think", body[len(THINK_START) :]
            elif not THINK_START.startswith(body):
                self._state = "think" if self._thinking_open else "text"
        if self._state == "think":
            reasoning, found, rest = self._waiting.partition(THINK_END)
            if found:
                self._state, self._waiting = "after", rest
            else:
                reasoning, self._waiting = _split_before(self._waiting, THINK_END)
        if self._state == "after":  # blank lines behind the think block belong to nobody
            self._waiting = self._waiting.lstrip()
            if self._waiting:
                self._state = "text"
        if self._state == "text":
            head, found, _ = self._waiting.partition(CALL_START)
            if found:
                self._state = "calls"
                shown = head.rstrip()
            else:
                head, _ = _split_before(self._waiting, CALL_START)
                shown = head.rstrip()  # blanks before a call are not shown
            content, self._waiting = shown, self._waiting[len(shown) :]
        return Delta(content, reasoning)

    def end(self) -> Delta:
        """What was held back."""
        waiting, self._waiting = self._waiting, ""
        if self._state == "think" or (self._state == "start" and self._thinking_open):
            return Delta(reasoning=waiting)
        if self._state != "calls":
            return Delta(content=waiting)
        parsed = parse_output(waiting)
        if not parsed.tool_calls:
            return Delta(content=waiting)
        return Delta(content=parsed.text, tool_calls=parsed.tool_calls)


def _split_before(text: str, marker: str) -> tuple[str, str]:
    """`text` without and with what may be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return text[: len(text) - length], text[len(text) - length :]
    return text, ""
