"""Chat messages in one checked form: text and attached parts, tool calls, tool schemas.

OpenAI and Hugging Face forms come in; what is malformed is refused with a sentence. Knows nothing
of templates, tokens or the model, nor of any modality beyond what an `InputEncoder` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_mm.errors import MessageError, PlaceholderMismatch
from lfm2_mm.frontends import InputEncoder

__all__ = [
    "Attached",
    "Message",
    "Messages",
    "Tools",
    "checked_turns",
    "counted",
    "fill_bare",
    "question_messages",
    "split_at",
    "tool_schema",
]

Message = Mapping[str, Any]
# "| Any": messages and tools come from outside, so that they are checked here and not by types
Messages = Sequence[Message] | Any
Tools = Sequence[Mapping[str, Any] | Callable[..., Any]] | Any

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_TEXT_TYPES = ("text", "input_text", "output_text")


@dataclass(eq=False)
class Attached:
    """A content part that an encoder claims."""

    encoder: InputEncoder
    part: Mapping[str, Any]

    @property
    def noun(self) -> str:
        """The shortest type its encoder claims: the one templates know (`image`, `audio`)."""
        return _noun(self.encoder)

    @property
    def is_bare(self) -> bool:
        """Whether the part only marks a place, as `{"type": "image"}` does."""
        return all(value is None for key, value in self.part.items() if key != "type")


def question_messages(
    question: str,
    attachments: Sequence[Mapping[str, Any]] = (),
    *,
    encoders: Sequence[InputEncoder] = (),
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Messages of one question about some attachments.

    The attachments come first, then the text. If the question holds an encoder's placeholder
    (`<image>`) literally, those places take that encoder's attachments in order.

    Raises:
        PlaceholderMismatch: if the question holds another number of placeholders than there are
            attachments of the kind.
    """
    by_type = _by_type(encoders)
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    front: list[Mapping[str, Any]] = []
    nouns = {encoder.placeholder: _noun(encoder) for encoder in encoders if encoder.placeholder}
    places = [p for p in nouns if p in question]
    for part in attachments:
        encoder = by_type.get(part.get("type", ""))
        if encoder is not None and encoder.placeholder in places:
            waiting.setdefault(encoder.placeholder, []).append(part)
        else:
            front.append(part)
    for placeholder in places:
        given = len(waiting.get(placeholder, ()))
        _match("the question holds", question.count(placeholder), given, nouns[placeholder])
    content: list[Mapping[str, Any]] = list(front)
    for piece in split_at(question, places):
        if piece in waiting:
            content.append(waiting[piece].pop(0))
        elif piece:
            content.append({"type": "text", "text": piece})
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": content if attachments else question}]


def checked_turns(messages: Messages, encoders: Sequence[InputEncoder]) -> list[dict[str, Any]]:
    """Checked copies; `content` is a list of text (never two in a row) and `Attached`."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise MessageError(
            f"the messages are a {type(messages).__name__}; give a list of "
            '{"role": …, "content": …} mappings'
        )
    if not messages:
        raise MessageError("the list of messages is empty; give at least one message")
    by_type = _by_type(encoders)
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MessageError(
                f"message {index} is a {type(message).__name__}; give a mapping with 'role' and "
                "'content'"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise MessageError(
                f"message {index} has the role {role!r}; use one of {_listed(_ROLES)}"
            )
        turn = {key: value for key, value in message.items() if value is not None}
        turn["role"] = _ROLES[role]
        if turn.pop("tool_calls", None):
            turn["tool_calls"] = _tool_calls(message["tool_calls"], index)
        turn["content"] = _content(message.get("content"), turn, index, by_type)
        turns.append(turn)
    return turns


def _content(
    content: Any, turn: Mapping[str, Any], index: int, by_type: Mapping[str, InputEncoder]
) -> list[str | Attached]:
    if content is None and turn["role"] == "assistant":
        content = ""
    elif isinstance(content, Mapping) and turn["role"] == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise MessageError(
            f"message {index} has content of type {type(content).__name__}; give text or a list of "
            "content parts"
        )
    parts: list[str | Attached] = []
    for item in content:
        part = _part(item, index, by_type)
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts or [""]


def _part(item: Any, index: int, by_type: Mapping[str, InputEncoder]) -> str | Attached:
    if isinstance(item, str):
        return item
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(kind, str):
        raise MessageError(
            f"message {index} holds a content part without a type ({_short(item)}); give "
            'for instance {"type": "text", "text": …}'
        )
    if kind in _TEXT_TYPES:
        if not isinstance(item.get("text"), str):
            raise MessageError(
                f"message {index} holds a {kind} part whose text is {_short(item.get('text'))}; "
                "give a string under 'text'"
            )
        return str(item["text"])
    if kind not in by_type:
        raise _unknown_type(f"message {index} holds a content part", kind, by_type)
    return Attached(by_type[kind], item)


def _tool_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    """Calls in nested form, with arguments as mappings: newer templates refuse JSON strings."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"message {index} has tool_calls {_short(calls)}; give a list of calls")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageError(
                f"message {index} holds the tool call {_short(call)}; give "
                '{"type": "function", "function": {"name": …, "arguments": …}}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = function["arguments"]
        if not isinstance(arguments, Mapping | None):
            raise MessageError(
                f"message {index} calls {function['name']!r} with arguments {_short(arguments)}; "
                "give a JSON object"
            )
        outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
        inner = {"name": function["name"], "arguments": dict(arguments or {})}
        found.append({"type": "function", **outer, "function": inner})
    return found


def tool_schema(tool: Any, index: int) -> dict[str, Any]:
    """The JSON schema of a tool given as such or as a documented function."""
    if isinstance(tool, Mapping):
        return dict(tool)
    try:
        from transformers.utils.chat_template_utils import get_json_schema

        return dict(get_json_schema(tool))
    except Exception as error:  # whatever inspection of a stranger's function raises
        raise MessageError(
            f"tool {index} is a {type(tool).__name__} that gives no JSON schema "
            f"({' '.join(str(error).split())[:200]}); give a mapping in OpenAI form or a "
            "documented function with type hints"
        ) from error


def fill_bare(
    attached: Iterable[Attached],
    attachments: Sequence[Mapping[str, Any]],
    encoders: Sequence[InputEncoder],
) -> None:
    """Give the bare parts their attachments, in order."""
    by_type = _by_type(encoders)
    given: dict[int, list[Mapping[str, Any]]] = {id(encoder): [] for encoder in encoders}
    bare: dict[int, list[Attached]] = {id(encoder): [] for encoder in encoders}
    for source in attachments:
        kind = source.get("type", "")
        if kind not in by_type:
            raise _unknown_type("an attachment", kind, by_type)
        given[id(by_type[kind])].append(source)
    for part in attached:
        if part.is_bare:
            bare[id(part.encoder)].append(part)
    for encoder in encoders:
        places, sources = bare[id(encoder)], given[id(encoder)]
        _match("the messages hold", len(places), len(sources), _noun(encoder))
        for place, source in zip(places, sources, strict=True):
            place.part = source


# --- words -------------------------------------------------------------------------------------


def _by_type(encoders: Iterable[InputEncoder]) -> dict[str, InputEncoder]:
    return {kind: encoder for encoder in encoders for kind in encoder.types}


def _noun(encoder: InputEncoder) -> str:
    return min(encoder.types, key=lambda kind: (len(kind), kind))


def split_at(text: str, separators: Sequence[str]) -> list[str]:
    """`text` cut at the separators, which stay as pieces of their own."""
    if not separators:
        return [text]
    longest_first = sorted(separators, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def _match(where: str, places: int, given: int, noun: str) -> None:
    if places != given:
        raise PlaceholderMismatch(
            f"{where} {counted(places, f'{noun} placeholder')} but {counted(given, noun)} "
            f"{'was' if given == 1 else 'were'} given; give one {noun} for each placeholder"
        )


def _unknown_type(what: str, kind: str, by_type: Mapping[str, InputEncoder]) -> MessageError:
    return MessageError(
        f"{what} of type {kind!r}, which this model does not read; it accepts "
        f"{_listed(('text', *sorted(by_type)))}"
    )


def counted(n: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
