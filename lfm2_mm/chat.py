"""Chat messages become a `Prompt`: token ids, and the positions that encoders fill.

The checkpoint's own template is rendered once, with every control string that stands in somebody's
text cut apart, so that only the template writes control tokens. Knows nothing of any modality
beyond what an `InputEncoder` says of itself, and nothing of the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lfm2_mm.errors import MessageError, PlaceholderMismatch
from lfm2_mm.frontends import InputEncoder, Prepared
from lfm2_mm.tokenizer import OUTPUT_MARKERS, Tokenizer
from lfm2_mm.toolcalls import THINK_START

__all__ = [
    "Message",
    "Messages",
    "Prompt",
    "Slot",
    "Tools",
    "build_prompt",
    "question_messages",
]

Message = Mapping[str, Any]
# "| Any": messages and tools come from outside, so that they are checked here and not by types
Messages = Sequence[Message] | Any
Tools = Sequence[Mapping[str, Any] | Callable[..., Any]] | Any

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_TEXT_TYPES = ("text", "input_text", "output_text")
_RESERVED = frozenset(
    "chat_template conversation max_length messages padding return_assistant_tokens_mask "
    "return_dict return_tensors sanitize_control_tokens tokenize tokenizer_kwargs "
    "truncation".split()
)
_PRIVATE = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))  # supplementary private use
_MAX_DEPTH = 64  # of nested values in tools and tool calls

_CHATML_MARKERS = frozenset({"<|im_start|>", "<|im_end|>"})
_CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """Where the features of one content part go.

    Attributes:
        encoder: Who encodes the part.
        prepared: The part, ready to be encoded.
        positions: int64 indices into the prompt, ascending; one for each row of features.
        end: Index just behind the part's whole block, its closing token included.
    """

    encoder: InputEncoder
    prepared: Prepared
    positions: Int[Tensor, " m"]
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What a model is given.

    Attributes:
        ids: int64 token ids; at slot positions the encoder's `token_id`.
        slots: The attachments in the order of their positions.
        identity: int64; the ids, but at slot positions a negative number of 62 bits made of the
            part's key and the offset in it. Two prompts share the state of a prefix if and only if
            they share the identity of that prefix.
        text: The rendered template, placeholders not expanded; for people, never tokenized again.
    """

    ids: Int[Tensor, " n"]
    identity: Int[Tensor, " n"]
    slots: tuple[Slot, ...] = ()
    text: str = ""

    @classmethod
    def from_ids(cls, ids: Sequence[int] | Int[Tensor, " n"]) -> Prompt:
        """A prompt of raw token ids, without attachments."""
        tensor = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
        return cls(ids=tensor, identity=tensor)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_attachment_positions(self) -> int:
        """How many positions are filled by encoders."""
        return sum(len(slot.positions) for slot in self.slots)

    @property
    def thinking_open(self) -> bool:
        """Whether the template already opened the think block of the answer."""
        return self.text.rstrip().endswith(THINK_START)


@dataclass(eq=False)
class _Attached:
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


def build_prompt(
    messages: Messages,
    *,
    tokenizer: Tokenizer,
    encoders: Sequence[InputEncoder] = (),
    tools: Tools = None,
    attachments: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> Prompt:
    """Render, tokenize and place the attachments of a conversation.

    Text without control strings gets exactly the ids that `transformers` gives it; control strings
    in text from anybody but the template are tokenized as ordinary text.

    Args:
        messages: In OpenAI or Hugging Face form; `content` is a string or a list of parts.
        tokenizer: The checkpoint's; without a template plain ChatML is rendered.
        encoders: Those whose content types the messages may hold.
        tools: JSON schemas in OpenAI form, or documented functions.
        attachments: Content parts that take the place of bare parts (`{"type": "image"}`) in
            order, for each encoder by itself.
        add_generation_prompt: Whether the prompt ends where the assistant begins.
        **template_kwargs: What the template may read beside.

    Raises:
        MessageError: if messages, tools or options are malformed or the template refuses them.
        PlaceholderMismatch: if placeholders and attachments, or positions, differ in number.
        InputError: if an encoder cannot read a part.
    """
    if reserved := sorted(_RESERVED & template_kwargs.keys()):
        raise MessageError(
            f"the template option {reserved[0]!r} cannot be set from outside; leave it out"
        )
    turns = _turns(messages, encoders)
    attached = [part for turn in turns for part in turn["content"] if isinstance(part, _Attached)]
    _fill(attached, attachments, encoders)
    prepared = {part: part.encoder.prepare(part.part) for part in attached}

    plain = tokenizer.chat_template is None
    if plain and (tools or any("tool_calls" in turn for turn in turns)):
        raise MessageError(
            "this checkpoint has no chat template, so tools and tool calls cannot be rendered; "
            "use a checkpoint with a template or leave the tools out"
        )
    if tools and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise MessageError(f"the tools are a {type(tools).__name__}; give a list of JSON schemas")
    schemas = [_schema(tool, index) for index, tool in enumerate(tools or ())]
    trusted = [json.dumps(tokenizer.chat_template), *(item.text for item in prepared.values())]
    cut, mark = _private_characters(
        "\n".join([*_strings((turns, schemas, template_kwargs)), *trusted])
    )

    guard = _Guard(_control_strings(tokenizer, encoders, plain), cut)
    rendered = _render(
        [guard.turn(turn, mark, plain) for turn in turns],
        tokenizer,
        tools=guard.value(schemas) or None,
        chat_template=_CHATML if plain else None,
        add_generation_prompt=add_generation_prompt,
        **guard.value(template_kwargs),
    )
    for char in (cut, mark):  # a template may have escaped them, as JSON or as Python does
        for form in (json.dumps(char)[1:-1], repr(char)[1:-1]):
            rendered = rendered.replace(form, char)
    return _assemble(rendered, tokenizer, attached, prepared, cut=cut, mark=mark, plain=plain)


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
    for piece in _split(question, places):
        if piece in waiting:
            content.append(waiting[piece].pop(0))
        elif piece:
            content.append({"type": "text", "text": piece})
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": content if attachments else question}]


# --- messages in one form ---------------------------------------------------------------------


def _turns(messages: Messages, encoders: Sequence[InputEncoder]) -> list[dict[str, Any]]:
    """Checked copies; `content` is a list of text (never two in a row) and `_Attached`."""
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
) -> list[str | _Attached]:
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
    parts: list[str | _Attached] = []
    for item in content:
        part = _part(item, index, by_type)
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts or [""]


def _part(item: Any, index: int, by_type: Mapping[str, InputEncoder]) -> str | _Attached:
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
    return _Attached(by_type[kind], item)


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


def _schema(tool: Any, index: int) -> dict[str, Any]:
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


def _fill(
    attached: Iterable[_Attached],
    attachments: Sequence[Mapping[str, Any]],
    encoders: Sequence[InputEncoder],
) -> None:
    """Give the bare parts their attachments, in order."""
    by_type = _by_type(encoders)
    given: dict[int, list[Mapping[str, Any]]] = {id(encoder): [] for encoder in encoders}
    bare: dict[int, list[_Attached]] = {id(encoder): [] for encoder in encoders}
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


# --- nobody but the template writes control strings -------------------------------------------


class _Guard:
    """Cuts control strings apart, so that a tokenizer no longer sees them."""

    def __init__(self, control: frozenset[str], cut: str) -> None:
        self.cut = cut
        self.all = self._by_first(control)
        self.structural = self._by_first(control - OUTPUT_MARKERS)

    @staticmethod
    def _by_first(strings: Iterable[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for string in strings:
            found[string[0]] = (*found.get(string[0], ()), string)
        return found

    def _apply(self, text: str, strings: Mapping[str, tuple[str, ...]]) -> str:
        """`text` with a cut behind the first character of each occurrence, overlaps included."""
        if not strings:
            return text
        pieces, last = [], 0
        for match in re.finditer(f"[{re.escape(''.join(strings))}]", text):
            at = match.start()
            if text.startswith(strings[text[at]], at):
                pieces.append(text[last : at + 1])
                last = at + 1
        return self.cut.join((*pieces, text[last:]))

    def value(self, value: Any) -> Any:
        """A copy of a nested value, all its strings cut, the keys of mappings too."""
        if isinstance(value, str):
            return self._apply(value, self.all)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def turn(self, turn: Mapping[str, Any], mark: str, plain: bool) -> dict[str, Any]:
        """A message as the template wants it; a part it knows nothing of becomes `mark`."""
        strings = self.structural if turn["role"] == "assistant" else self.all
        content: list[dict[str, str]] = []
        for part in turn["content"]:
            if isinstance(part, _Attached) and part.encoder.placeholder and not plain:
                content.append({"type": part.noun})
                continue
            text = mark if isinstance(part, _Attached) else self._apply(part, strings)
            if content and content[-1]["type"] == "text":
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text})
        rest = self.value({k: v for k, v in turn.items() if k not in ("role", "content")})
        flat = len(content) == 1 and content[0]["type"] == "text"
        return {"role": turn["role"], "content": content[0]["text"] if flat else content, **rest}


def _control_strings(
    tokenizer: Tokenizer, encoders: Sequence[InputEncoder], plain: bool
) -> frozenset[str]:
    """Special tokens, placeholders, and the other added tokens that the template itself writes.

    One character cannot be cut, so that an added token of one character stays as it is.
    """
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    strings = (
        tokenizer.special_strings
        | {encoder.placeholder for encoder in encoders}
        | {string for string in tokenizer.added_strings if string in template and string.strip()}
        | (_CHATML_MARKERS if plain else frozenset())
    )
    return frozenset(string for string in strings if len(string) > 1)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings in a nested value, keys included, checked for what a tokenizer cannot take."""
    if depth > _MAX_DEPTH:
        raise MessageError(
            f"messages or tools are nested more than {_MAX_DEPTH} levels deep; make them flatter"
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MessageError(
                f"a text holds the lone surrogate {value[error.start]!r} at index {error.start}; "
                "send whole characters"
            ) from error
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, depth + 1)


def _private_characters(text: str) -> tuple[str, str]:
    """Two characters of private use that occur in `text` neither plain nor escaped."""
    taken = set(text)
    lowered = text.lower() if "\\u" in text.lower() else ""
    free = []
    for code in (code for block in _PRIVATE for code in block):
        char = chr(code)
        escapes = (json.dumps(char)[1:-1], repr(char)[1:-1].lower())
        if char not in taken and not any(form in lowered for form in escapes):
            free.append(char)
            if len(free) == 2:
                return free[0], free[1]
    raise MessageError("the messages use up all characters of private use; leave some out")


# --- rendered text becomes ids ----------------------------------------------------------------


def _render(turns: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.hf.apply_chat_template(turns, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise MessageError(
            f"the checkpoint's chat template refuses these messages "
            f"({' '.join(str(error).split())[:200]}); change their order, roles or fields"
        ) from error
    return str(rendered)


def _assemble(
    rendered: str,
    tokenizer: Tokenizer,
    attached: Sequence[_Attached],
    prepared: Mapping[_Attached, Prepared],
    *,
    cut: str,
    mark: str,
    plain: bool,
) -> Prompt:
    """Tokenize between cuts and put the blocks of the attachments where they belong."""
    places: dict[str, list[_Attached]] = {}
    for part in attached:
        places.setdefault((not plain and part.encoder.placeholder) or mark, []).append(part)
    pieces = _split(rendered, [cut, mark, *places.keys() - {mark}])
    for place, parts in places.items():
        if (count := pieces.count(place)) != len(parts):
            raise PlaceholderMismatch(
                f"the chat template rendered {_count(count, 'placeholder')} for "
                f"{_count(len(parts), f'{parts[0].noun} part')}; put such parts into user messages "
                "only, or use a checkpoint whose template knows them"
            )
    ids: list[int] = []
    slots: list[Slot] = []
    run = ""
    blocks: list[tuple[_Attached, int]] = []  # of the run: the part and where its text begins

    def close() -> None:
        nonlocal run
        start = len(ids)
        run_ids, starts = tokenizer.encode_with_starts(run)
        ids.extend(run_ids)
        for part, at in blocks:
            first = bisect_left(starts, at)
            last = bisect_left(starts, at + len(prepared[part].text))
            slots.append(_slot(part, prepared[part], run_ids[first:last], start + first))
        run = ""
        blocks.clear()

    for piece in pieces:
        if piece == cut:
            close()
        elif piece not in places:
            run += piece
        elif prepared[part := places[piece].pop(0)].text:
            blocks.append((part, len(run)))
            run += prepared[part].text
        else:
            close()
            filled = [part.encoder.token_id] * prepared[part].n_positions
            slots.append(_slot(part, prepared[part], filled, len(ids)))
            ids.extend(filled)
    close()

    tensor = torch.tensor(ids, dtype=torch.int64)
    identity = tensor.clone()
    for slot in slots:
        identity[slot.positions] = _identities(slot.prepared.key, len(slot.positions))
    text = rendered.replace(cut, "").replace(mark, "")
    return Prompt(ids=tensor, slots=tuple(slots), identity=identity, text=text)


def _slot(part: _Attached, prepared: Prepared, block: Sequence[int], start: int) -> Slot:
    """The slot of a part whose block of ids begins at `start`."""
    positions = [start + i for i, id_ in enumerate(block) if id_ == part.encoder.token_id]
    if len(positions) != prepared.n_positions:
        raise PlaceholderMismatch(
            f"the prompt has {_count(len(positions), 'position')} of token {part.encoder.token_id} "
            f"for {_count(prepared.n_positions, 'feature')} of one {part.noun}; the checkpoint's "
            "tokenizer and its config do not belong together"
        )
    return Slot(
        encoder=part.encoder,
        prepared=prepared,
        positions=torch.tensor(positions, dtype=torch.int64),
        end=start + len(block),
    )


def _identities(key: str, n: int) -> Int[Tensor, " n"]:
    """Negative numbers that depend on the key and the offset only."""
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    stream = hashlib.shake_256(key.encode()).digest(8 * n)
    numbers = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    return -1 - (numbers & ((1 << 62) - 1))


# --- words ------------------------------------------------------------------------------------


def _by_type(encoders: Iterable[InputEncoder]) -> dict[str, InputEncoder]:
    return {kind: encoder for encoder in encoders for kind in encoder.types}


def _noun(encoder: InputEncoder) -> str:
    return min(encoder.types, key=lambda kind: (len(kind), kind))


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """`text` cut at the separators, which stay as pieces of their own."""
    if not separators:
        return [text]
    longest_first = sorted(separators, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def _match(where: str, places: int, given: int, noun: str) -> None:
    if places != given:
        raise PlaceholderMismatch(
            f"{where} {_count(places, f'{noun} placeholder')} but {_count(given, noun)} "
            f"{'was' if given == 1 else 'were'} given; give one {noun} for each placeholder"
        )


def _unknown_type(what: str, kind: str, by_type: Mapping[str, InputEncoder]) -> MessageError:
    return MessageError(
        f"{what} of type {kind!r}, which this model does not read; it accepts "
        f"{_listed(('text', *sorted(by_type)))}"
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
