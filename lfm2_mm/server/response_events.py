"""An answer as the Responses API shows it: a `response` object that grows, and the events of that.

Both forms of an answer, whole and streamed, come out of the same writer. Knows deltas; no HTTP and
no model.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from lfm2_mm.events import Done
from lfm2_mm.server.deltas import Delta
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.responses_schema import ResponsesRequest
from lfm2_mm.toolcalls import ToolCall

__all__ = ["ResponseWriter"]

Event = dict[str, Any]


class ResponseWriter:
    """Writes one response.

    Args:
        body: What was asked.
        model: Who answers.

    Attributes:
        response: The object as it stands.
        reasoning: What was thought so far.
    """

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self._count = 0
        self._open: dict[str, Any] | None = None  # the item that is being written
        self.reasoning = ""
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.format},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def begin(self) -> Iterator[Event]:
        """It is being answered."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def push(self, delta: Delta) -> Iterator[Event]:
        """What is new."""
        if delta.reasoning:
            self.reasoning += delta.reasoning
            yield from self._write("reasoning", delta.reasoning)
        if delta.content:
            yield from self._write("message", delta.content)
        for call in delta.tool_calls:
            yield from self._close("completed")
            yield from self._call(call)

    def end(self, done: Done, reasoning_tokens: int, **own: Any) -> Iterator[Event]:
        """No more comes.

        Args:
            done: How it ended.
            reasoning_tokens: How many of its tokens were thought.
            **own: Fields beside OpenAI's.
        """
        whole = done.finish_reason not in ("length", "cancelled")
        status = "completed" if whole else "incomplete"
        if self._open is None and not self.response["output"]:
            yield from self._write("message", "")
        yield from self._close(status)
        usage = done.usage
        details = None if whole else {"reason": "max_output_tokens"}
        self.response |= {"status": status, "incomplete_details": details, **own}
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        yield self._event(f"response.{status}", response=dict(self.response))

    def fail(self, problem: ApiError) -> Iterator[Event]:
        """It cannot be answered to its end."""
        yield from self._close("incomplete")
        error = {"code": "server_error", "message": str(problem)}
        self.response |= {"status": "failed", "error": error}
        yield self._event("response.failed", response=dict(self.response))

    # -- items -------------------------------------------------------------------------------

    def _write(self, kind: str, text: str) -> Iterator[Event]:
        """More of a message or of what is thought."""
        if self._open is not None and self._open["type"] != kind:
            yield from self._close("completed")
        if self._open is None:
            message = kind == "message"
            made: dict[str, Any] = {
                "id": f"{'msg' if message else 'rs'}_{uuid.uuid4().hex}",
                "type": kind,
                "status": "in_progress",
                "content": [],
            }
            made["role" if message else "summary"] = "assistant" if message else []
            yield from self._add(made)
            made["content"] = [_part(kind, "")]
            yield self._event("response.content_part.added", **self._at, part=_part(kind, ""))
            self._open = made
        if text:
            self._open["content"][0]["text"] += text
            name = "output_text" if kind == "message" else "reasoning_text"
            scores: Event = {"logprobs": []} if kind == "message" else {}
            yield self._event(f"response.{name}.delta", **self._at, delta=text, **scores)

    def _close(self, status: str) -> Iterator[Event]:
        """What is open is written."""
        item, self._open = self._open, None
        if item is None:
            return
        part = item["content"][0]
        name = part["type"]
        scores: Event = {"logprobs": []} if name == "output_text" else {}
        yield self._event(f"response.{name}.done", **self._at, text=part["text"], **scores)
        yield self._event("response.content_part.done", **self._at, part=dict(part))
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._last, item=dict(item))

    def _call(self, call: ToolCall) -> Iterator[Event]:
        function = call.to_openai()["function"]
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": function["name"],
            "arguments": "",
        }
        yield from self._add(item)
        at = {"item_id": item["id"], "output_index": self._last}
        written = function["arguments"]
        yield self._event("response.function_call_arguments.delta", **at, delta=written)
        name = {"arguments": written, "name": function["name"]}
        yield self._event("response.function_call_arguments.done", **at, **name)
        item |= {"arguments": written, "status": "completed"}
        yield self._event("response.output_item.done", output_index=self._last, item=dict(item))

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self.response["output"] = [*self.response["output"], item]
        yield self._event("response.output_item.added", output_index=self._last, item=dict(item))

    @property
    def _last(self) -> int:
        return len(self.response["output"]) - 1

    @property
    def _at(self) -> dict[str, Any]:
        """Where the newest part of the newest item is."""
        item_id = self.response["output"][-1]["id"]
        return {"item_id": item_id, "output_index": self._last, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._count = self._count, self._count + 1
        return {"type": kind, "sequence_number": number, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
