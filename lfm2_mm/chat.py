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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lfm2_mm.errors import MessageError, PlaceholderMismatch
from lfm2_mm.frontends import InputEncoder, Prepared
from lfm2_mm.messages import (
    Attached,
    Messages,
    Tools,
    checked_turns,
    counted,
    fill_bare,
    split_at,
    tool_schema,
)
from lfm2_mm.tokenizer import OUTPUT_MARKERS, Tokenizer
from lfm2_mm.toolcalls import THINK_START

__all__ = [
    "Prompt",
    "Slot",
    "build_prompt",
    "content_identities",
]

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
    turns = checked_turns(messages, encoders)
    attached = [part for turn in turns for part in turn["content"] if isinstance(part, Attached)]
    fill_bare(attached, attachments, encoders)
    prepared = {part: part.encoder.prepare(part.part) for part in attached}

    plain = tokenizer.chat_template is None
    if plain and (tools or any("tool_calls" in turn for turn in turns)):
        raise MessageError(
            "this checkpoint has no chat template, so tools and tool calls cannot be rendered; "
            "use a checkpoint with a template or leave the tools out"
        )
    if tools and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise MessageError(f"the tools are a {type(tools).__name__}; give a list of JSON schemas")
    schemas = [tool_schema(tool, index) for index, tool in enumerate(tools or ())]
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
            if isinstance(part, Attached) and part.encoder.placeholder and not plain:
                content.append({"type": part.noun})
                continue
            text = mark if isinstance(part, Attached) else self._apply(part, strings)
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
    attached: Sequence[Attached],
    prepared: Mapping[Attached, Prepared],
    *,
    cut: str,
    mark: str,
    plain: bool,
) -> Prompt:
    """Tokenize between cuts and put the blocks of the attachments where they belong."""
    places: dict[str, list[Attached]] = {}
    for part in attached:
        places.setdefault((not plain and part.encoder.placeholder) or mark, []).append(part)
    pieces = split_at(rendered, [cut, mark, *places.keys() - {mark}])
    for place, parts in places.items():
        if (count := pieces.count(place)) != len(parts):
            raise PlaceholderMismatch(
                f"the chat template rendered {counted(count, 'placeholder')} for "
                f"{counted(len(parts), f'{parts[0].noun} part')}; put such parts into user "
                "messages only, or use a checkpoint whose template knows them"
            )
    ids: list[int] = []
    slots: list[Slot] = []
    run = ""
    blocks: list[tuple[Attached, int]] = []  # of the run: the part and where its text begins

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
        identity[slot.positions] = content_identities(slot.prepared.key, len(slot.positions))
    text = rendered.replace(cut, "").replace(mark, "")
    return Prompt(ids=tensor, slots=tuple(slots), identity=identity, text=text)


def _slot(part: Attached, prepared: Prepared, block: Sequence[int], start: int) -> Slot:
    """The slot of a part whose block of ids begins at `start`."""
    positions = [start + i for i, id_ in enumerate(block) if id_ == part.encoder.token_id]
    if len(positions) != prepared.n_positions:
        raise PlaceholderMismatch(
            f"the prompt has {counted(len(positions), 'position')} of token "
            f"{part.encoder.token_id} for {counted(prepared.n_positions, 'feature')} of one "
            f"{part.noun}; the checkpoint's tokenizer and its config do not belong together"
        )
    return Slot(
        encoder=part.encoder,
        prepared=prepared,
        positions=torch.tensor(positions, dtype=torch.int64),
        end=start + len(block),
    )


def content_identities(key: str, n: int) -> Int[Tensor, " n"]:
    """What `Prompt.identity` holds at the `n` positions of a part: negative numbers of its key."""
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    stream = hashlib.shake_256(key.encode()).digest(8 * n)
    numbers = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    return -1 - (numbers & ((1 << 62) - 1))
