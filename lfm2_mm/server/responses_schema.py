"""The body of `/v1/responses`, and what of it is understood how: the same as of a chat, renamed.

Nothing is kept here between two requests; fields that ask for that are refused by name. Knows no
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lfm2_mm.constrain import Constraint
from lfm2_mm.server.answering import Asked
from lfm2_mm.server.chat_schema import Sampled, called_of, tokens_within
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError

__all__ = ["ResponsesRequest"]

_STATELESS = "this server keeps no responses; send the whole conversation as input"
_FORMATS = ("text", "json_object", "json_schema")


class ResponsesRequest(Sampled):
    """What is to be answered; `seed` is an extension here, too."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    truncation: str | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def format(self) -> dict[str, Any]:
        """What the answer has to look like."""
        found = (self.text or {}).get("format")
        return found if isinstance(found, dict) else {"type": "text"}

    def asked(self, limits: Limits) -> Asked:
        """What is wanted of a model.

        Raises:
            ApiError: 400 naming what cannot be understood or is not done here.
        """
        self._check()
        tools, call = called_of(self._tools(), self._choice())
        messages, names = self._messages()
        return Asked(
            messages=messages,
            names=names,
            tools=tools,
            call=call,
            constraint=self._constraint(),
            sampling=self.sampling,
            max_tokens=tokens_within(self.max_output_tokens, limits, "max_output_tokens"),
        )

    def _check(self) -> None:
        if self.store:
            raise _refused("store", f"store is true, but {_STATELESS} and leave store out")
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise _refused(name, f"{name} names what was kept, but {_STATELESS}")
        if self.background:
            raise _refused("background", f"background is true, but {_STATELESS} and wait or stream")
        if self.prompt is not None:
            raise _refused("prompt", "prompt names a template of OpenAI's; use instructions")
        if self.truncation not in (None, "disabled"):
            raise _refused(
                "truncation",
                f"truncation is {self.truncation[:40]!r}, and nothing is left out here; shorten "
                "the input",
            )
        if self.top_logprobs:
            raise _refused(
                "top_logprobs", "scores are shown by /v1/chat/completions only; ask there"
            )

    def _tools(self) -> list[dict[str, Any]]:
        """In the form of a chat."""
        found = []
        for index, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                raise _refused(
                    "tools",
                    f"tools[{index}] is {str(tool.get('type'))[:40]!r}, and functions are the only "
                    'tools here; give {"type": "function", "name": …}',
                )
            inner = {k: v for k, v in tool.items() if k not in ("type", "strict") and v is not None}
            found.append({"type": "function", "function": inner})
        return found

    def _choice(self) -> str | dict[str, Any] | None:
        if not isinstance(self.tool_choice, dict):
            return self.tool_choice
        return {"type": "function", "function": {"name": self.tool_choice.get("name")}}

    def _constraint(self) -> Constraint | None:
        form = self.format
        kind = form.get("type")
        if kind not in _FORMATS:
            raise _refused(
                "text.format",
                f"text.format.type is {str(kind)[:40]!r}; it is one of {', '.join(_FORMATS)}",
            )
        if kind == "text":
            return None
        if kind == "json_object":
            return Constraint.json()
        if not isinstance(form.get("schema"), Mapping):
            raise _refused("text.format.schema", "text.format has no schema; give one")
        return Constraint.json_schema(form["schema"])

    # -- the conversation --------------------------------------------------------------------

    def _messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The input as messages of a chat, and what each is called."""
        messages: list[dict[str, Any]] = []
        names: list[str] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
            names.append("instructions")
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not 1 <= len(items) <= 1024:
            raise _refused("input", f"input holds {len(items)} items; give between 1 and 1024")
        for index, item in enumerate(items):
            name = f"input[{index}]" if isinstance(self.input, list) else "input"
            kind = item.get("type") or "message"
            if kind == "reasoning":  # of earlier answers; the models are not shown it again
                continue
            if kind == "function_call" and messages and messages[-1]["role"] == "assistant":
                calls = [*messages[-1].get("tool_calls", ()), _call(item, name)]
                messages[-1] = {**messages[-1], "tool_calls": calls}
                continue
            messages.append(_message(kind, item, name))
            names.append(name)
        if not messages or messages[-1]["role"] == "system":
            raise _refused("input", "input says nothing that could be answered; add a message")
        return messages, names


def _message(kind: Any, item: Mapping[str, Any], name: str) -> dict[str, Any]:
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(item, name)]}
    if kind == "function_call_output":
        content, call_id = item.get("output"), item.get("call_id")
        if not isinstance(content, str | list) or not isinstance(call_id, str):
            raise _refused(name, f"{name} is no output of a call; give call_id and output")
        return {"role": "tool", "tool_call_id": call_id, "content": content}
    if kind == "item_reference":
        raise _refused(name, f"{name} refers to an item, but {_STATELESS}")
    raise _refused(
        name,
        f"{name} has the type {str(kind)[:40]!r}; it is message, function_call, "
        "function_call_output or reasoning",
    )


def _call(item: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = {key: item.get(key) for key in ("name", "arguments")}
    if not all(isinstance(one, str) for one in (*function.values(), item.get("call_id"))):
        raise _refused(name, f"{name} is no call; give call_id, name and arguments, each a string")
    return {"id": item["call_id"], "type": "function", "function": function}


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported_value", param=param)
