"""The body of `/v1/chat/completions`, and what of it is understood how.

Fields that OpenAI's interface has and a model here cannot honour are refused by name rather than
ignored, unless they ask for nothing. Knows no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError

__all__ = [
    "AudioOut",
    "ChatRequest",
    "Number",
    "Sampled",
    "StreamOptions",
    "called_of",
    "stops_of",
    "tokens_within",
    "tools_of",
    "wanted_tokens",
]

Number = Annotated[float, Field(allow_inf_nan=False)]


_MESSAGE: dict[str, Any] = {  # for the document; messages are checked where they are read
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"type": ["string", "array", "object", "null"]},
    },
}


class StreamOptions(BaseModel):
    """What a stream tells beside its pieces."""

    include_usage: bool = False


class AudioOut(BaseModel):
    """How spoken answers are wanted."""

    voice: str | dict[str, Any] | None = None
    format: Literal["wav", "pcm16", "flac", "mp3", "opus"] = "wav"


class Sampled(BaseModel):
    """How tokens are drawn. `top_k`, `min_p`, `repetition_penalty` are extensions."""

    model_config = ConfigDict(extra="ignore", strict=True)  # a true is no 1, and "5" no number

    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @property
    def sampling(self) -> dict[str, Any]:
        """What of it was said."""
        found = {name: getattr(self, name) for name in Sampled.model_fields}
        return {name: value for name, value in found.items() if value is not None}


class ChatRequest(Sampled):
    """A conversation to be continued."""

    messages: list[dict[str, Any]] = Field(
        min_length=1, max_length=1024, json_schema_extra={"items": _MESSAGE}
    )
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOut | None = None

    def check(self, limits: Limits) -> None:
        """Refuse what cannot be honoured.

        Raises:
            ApiError: 400, naming the field.
        """
        if self.n > limits.choices:
            raise _refused("n", f"n is {self.n}; at most {limits.choices} answers are given")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise _refused(
                    name,
                    f"{name} is {getattr(self, name)}, which this server does not do; leave it "
                    "out or use repetition_penalty",
                )
        if self.logit_bias:
            raise _refused("logit_bias", "logit_bias is not done by this server; leave it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise _refused("top_logprobs", "top_logprobs needs logprobs to be true; set it too")


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported_value", param=param)


def wanted_tokens(body: ChatRequest, limits: Limits) -> int:
    """Length of an answer, at most.

    Raises:
        ApiError: 400 if more is asked for than the server gives.
    """
    asked = body.max_completion_tokens or body.max_tokens
    return tokens_within(asked, limits, "max_completion_tokens")


def tokens_within(asked: int | None, limits: Limits, param: str) -> int:
    """The same of any request, whose field for it is `param`.

    Raises:
        ApiError: 400 if more is asked for than the server gives.
    """
    if asked is not None and asked > limits.max_tokens:
        raise _refused(
            param,
            f"{asked} tokens are asked for, and the limit here is {limits.max_tokens}; ask for "
            "less",
        )
    return asked or min(1024, limits.max_tokens)


def stops_of(body: ChatRequest) -> tuple[str, ...]:
    """Strings that end an answer.

    Raises:
        ApiError: 400 if one is empty, too long, or there are too many.
    """
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > 16 or any(not stop or len(stop) > 256 for stop in stops):
        raise _refused(
            "stop", "stop takes up to 16 strings of 1 to 256 characters; shorten the list"
        )
    return stops


def tools_of(body: ChatRequest) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The tools a prompt is to show, and the schema of the call that must be made, if one must.

    Raises:
        ApiError: 400 if a tool or the choice cannot be understood.
    """
    return called_of(body.tools or [], body.tool_choice)


def called_of(
    tools: list[dict[str, Any]], choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The same of `tools` and `tool_choice` in the form of chat completions."""
    names: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise _refused(
                "tools", f'tools[{index}] is no function; give {{"type": "function", …}}'
            )
        name = function.get("name")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(name, str) or not name or not isinstance(parameters, dict):
            raise _refused(
                "tools", f"tools[{index}] has no name or parameters that are no schema; give both"
            )
        names[name] = parameters
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return [], None
    if not tools:
        raise _refused("tool_choice", "tool_choice is given without tools; give the tools too")
    if choice != "required":
        inner = choice.get("function") if isinstance(choice, dict) else None
        wanted = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(wanted, str) or wanted not in names:
            raise _refused(
                "tool_choice",
                f"tool_choice names {str(wanted)[:60]!r}, which is none of the tools "
                f"({', '.join(names)}); use one of them, or none, auto or required",
            )
        names = {wanted: names[wanted]}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in names.items()
    ]
    return tools, calls[0] if len(calls) == 1 else {"anyOf": calls}
