"""Functions that a client offers in a conversation: what a model is told of them, and its calls.

A model that knows tools calls them in the text of its answer, which is then not shown; where the
client demands a call, the answer is written under a constraint instead of spoken. Knows answers and
the JSON form of tools; no socket.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lfm2_audio.serving.schema import refused
from lfm2_audio.voice import events as say
from lfm2_audio.voice.announcer import Announcer
from lfm2_audio.voice.answer import Answer, Made
from lfm2_mm.constrain import Constraint
from lfm2_mm.events import TextDelta
from lfm2_mm.request import Handle, Request
from lfm2_mm.server.chat_schema import ChatRequest, tools_of
from lfm2_mm.server.deltas import Splitter
from lfm2_mm.server.problems import ApiError
from lfm2_mm.toolcalls import CALL_END, CALL_START

__all__ = [
    "Call",
    "CallingAnnouncer",
    "CallingAnswer",
    "Tools",
    "call_item",
    "call_text",
    "no_item",
    "said_call",
]

_MOST, _LONGEST = 128, 64 * 1024  # functions, and characters of them all
_ITEMS = 1000  # that can be looked at again


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What may be called.

    Attributes:
        functions: As the client gave them: objects with `type`, `name`, `parameters`.
        choice: `auto`, `none`, `required`, or the name of the function that must be called.
        schema: Of the call that must be made; None leaves that to the model.
    """

    functions: tuple[dict[str, Any], ...] = ()
    choice: Any = "auto"
    schema: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, functions: Any, choice: Any) -> Tools:
        """Read `tools` and `tool_choice`.

        Raises:
            ApiError: 400 naming what cannot be understood.
        """
        if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
            raise refused("tools", "tools is no list of functions; give one")
        if len(functions) > _MOST or len(json.dumps(functions)) > _LONGEST:
            raise refused(
                "tools", f"there are more than {_MOST} tools or {_LONGEST:,} characters; give fewer"
            )
        if choice is not None and not isinstance(choice, str | dict):
            raise refused("tool_choice", "tool_choice is no text and no object; give one")
        form = [
            {"type": one.get("type"), "function": {k: v for k, v in one.items() if k != "type"}}
            for one in functions
        ]
        wanted = choice
        if isinstance(choice, dict):
            name = choice.get("name")
            wanted = {"type": "function", "function": {"name": name}}
        asked = {"messages": [{}], "tools": form, "tool_choice": wanted}
        body = ChatRequest.model_validate(asked)
        _, schema = tools_of(body)
        return cls(functions=tuple(functions), choice=choice or "auto", schema=schema)

    @property
    def words(self) -> str:
        """What a model is told of them, as LFM2's template does it."""
        if not self.functions or self.choice == "none":
            return ""
        shown = [{k: v for k, v in one.items() if k != "type"} for one in self.functions]
        return f"List of tools: {json.dumps(shown, ensure_ascii=False)}"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call."""

    name: str
    arguments: Mapping[str, Any]
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def written(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as LFM2 writes it, without what stands around it."""
    given = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return f"[{name}({', '.join(given)})]"


def call_item(item_id: str, call: Call, status: str = "completed") -> dict[str, Any]:
    """A call as a Realtime conversation item; while it is made its arguments are not there."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "function_call",
        "status": status,
        "name": call.name,
        "call_id": call.call_id,
        "arguments": "" if status == "in_progress" else call.written,
    }


class _Demanded:
    """Asks a model for a call that fits a schema, in writing."""

    def __init__(self, model: Any, schema: dict[str, Any]) -> None:
        self._model, self._schema, self.codec = model, schema, model.codec

    def reply_stream(self, conversation: Any, *, max_tokens: int = 1024, **_: Any) -> Handle:
        """Text only."""
        request = Request(
            prompt=conversation.to_prompt(self._model),
            constraint=Constraint.json_schema(self._schema),
            max_tokens=max_tokens,
        )
        handle: Handle = self._model.engine.submit(request)
        return handle


class CallingAnswer(Answer):
    """An answer that may be, or hold, calls: these are not shown as text.

    Attributes:
        calls: Those it turned out to hold, once it is finished.
    """

    def __init__(
        self,
        model: Any,
        conversation: Any,
        *,
        options: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        given = dict(options or {})
        tools = given.pop("tools", Tools())
        self._asked = model
        self._demanded = tools.schema is not None
        if tools.schema is not None:
            model = _Demanded(model, tools.schema)
        super().__init__(model, conversation, options=given, **rest)
        self.calls: tuple[Call, ...] = ()
        self._offered = bool(tools.words)
        self._splitter, self._shown = Splitter(), ""

    @property
    def text(self) -> str:
        """The text so far, as it is shown."""
        return self._shown

    def _step(self, pending: int) -> list[Made]:
        out: list[Made] = []
        for one in super()._step(pending):
            if one.kind == "text":
                out += self._show(self._visible(one.text))
                continue
            if one.kind == "done":
                out += self._show(self._end())
            out.append(one)
        return out

    def _visible(self, text: str) -> str:
        if self._demanded:
            return ""
        return self._splitter.push(text).content if self._offered else text

    def _show(self, text: str) -> list[Made]:
        self._shown += text
        return [Made("text", text=text)] if text else []

    def _end(self) -> str:
        if self._demanded:
            self._take_demanded()
            return ""
        if not self._offered:
            return ""
        last = self._splitter.end()
        found = (Call(name=call.name, arguments=call.arguments) for call in last.tool_calls)
        self.calls = tuple(found)
        return last.content

    def _take_demanded(self) -> None:
        """The call that had to be made, unless it was cut short; said as the model says it."""
        raw = "".join(one.text for one in self.segments if isinstance(one, TextDelta))
        self.segments = []
        try:
            found = json.loads(raw)
        except ValueError:
            return
        call = Call(name=found["name"], arguments=found["arguments"])
        self.calls = (call,)
        self.segments = [said_call(self._asked, call)]


def said_call(model: Any, call: Call) -> TextDelta:
    """A call as something that the model said."""
    tokenizer, text = getattr(model, "tokenizer", None), call_text(call.name, call.arguments)
    whole = f"{CALL_START}{text}{CALL_END}"
    if tokenizer is None:
        return TextDelta(whole)
    ids = [*tokenizer.encode(CALL_START), *tokenizer.encode_plain(text)]
    return TextDelta(whole, ids=(*ids, *tokenizer.encode(CALL_END)))


@dataclass(frozen=True, kw_only=True)
class _Arguments(say.VoiceEvent):
    """Arguments of a call, all at once."""

    type: ClassVar[str] = "response.function_call_arguments.delta"
    response_id: str
    item_id: str
    output_index: int
    call_id: str
    delta: str


@dataclass(frozen=True, kw_only=True)
class _ArgumentsDone(say.VoiceEvent):
    type: ClassVar[str] = "response.function_call_arguments.done"
    response_id: str
    item_id: str
    output_index: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class _Responded(say.ResponseDone):
    """An answer with calls is over."""

    calls: tuple[dict[str, Any], ...] = ()

    def _body(self) -> dict[str, Any]:
        body = super()._body()
        body["response"]["output"] += self.calls
        return body


class CallingAnnouncer(Announcer):
    """Says which functions are called, too, and remembers the items of a conversation.

    Attributes:
        items: The newest items by their ids, as they were last said.
    """

    def __init__(self, emit: Callable[[say.VoiceEvent], None]) -> None:
        super().__init__(emit)
        self.items: dict[str, dict[str, Any]] = {}
        self._calling: CallingAnswer | None = None

    def tell(self, event: Callable[..., say.VoiceEvent], /, **fields: Any) -> None:
        """One event; calls come before the end of their answer."""
        if event in (say.ItemAdded, say.ItemDone):
            item = fields["item"]
            self.items[item["id"]] = item
            while len(self.items) > _ITEMS:
                del self.items[next(iter(self.items))]
        calling, self._calling = self._calling, None
        if event is say.ResponseDone and calling is not None:
            first = fields["item"] is not None
            rows = [
                self._called(calling, call, int(first) + place)
                for place, call in enumerate(calling.calls)
            ]
            super().tell(_Responded, calls=tuple(rows), **fields)
            return
        self._calling = calling
        super().tell(event, **fields)

    def over(self, answer: Answer, status: say.Status, **fields: Any) -> None:
        """No more comes of an answer."""
        if isinstance(answer, CallingAnswer) and answer.calls and status == "completed":
            self._calling = answer
        super().over(answer, status, **fields)
        self._calling = None

    def _called(self, answer: CallingAnswer, call: Call, place: int) -> dict[str, Any]:
        """Say that a function is called; returns the item."""
        item_id = answer.item_id if not place else f"{answer.item_id}_{place}"
        ids = {"response_id": answer.response_id, "output_index": place}
        begun, done = call_item(item_id, call, "in_progress"), call_item(item_id, call)
        before, self.last_item = self.last_item, item_id
        self.tell(say.OutputItemAdded, item=begun, **ids)
        self.tell(say.ItemAdded, item=begun, previous_item_id=before)
        own = {**ids, "item_id": item_id, "call_id": call.call_id}
        self.tell(_Arguments, delta=call.written, **own)
        self.tell(_ArgumentsDone, arguments=call.written, name=call.name, **own)
        self.tell(say.OutputItemDone, item=done, **ids)
        self.tell(say.ItemDone, item=done, previous_item_id=before)
        return done

    def placed(self, item_id: str, after: str) -> None:
        """An item that was said last stands behind another one, or at the `root`."""
        item = self.items.pop(item_id)
        order = list(self.items.items())
        place = 0 if after == "root" else list(self.items).index(after) + 1
        self.items = dict([*order[:place], (item_id, item), *order[place:]])

    def number(self, kind: str) -> int:
        """The next number of a kind that no item of the client's has."""
        shape = {"item": "item_{:06d}", "resp": "item_a{:06d}"}.get(kind)
        while True:
            number = super().number(kind)
            if shape is None or shape.format(number) not in self.items:
                return number


def no_item(code: str, item_id: str, param: str = "item_id") -> ApiError:
    """There is no such item; `code` as OpenAI's servers name it."""
    text = f"there is no item {item_id[:64]!r} in this conversation; name one that was added"
    return ApiError(400, text, code=code, param=param)
