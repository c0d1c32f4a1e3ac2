"""Functions and items of realtime conversations, through the real OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.sync.client import connect

from lfm2_mm.events import Done, Event, TextDelta, Timings, Usage
from lfm2_mm.server import ServerOptions
from tests.audio import speaking
from tests.audio.voice_fakes import Talk, spoken
from tests.server.running import running
from tests.server.test_realtime import Voice, address, calling, event, in_order, write

pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

PAINT: Any = {
    "type": "function",
    "name": "paint",
    "description": "Paint something.",
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}


def answer(number: int, talk: Talk) -> Iterator[Event]:
    """Calls a function when it hears of paint, and speaks otherwise."""
    if "paint" not in str(talk.turns[-1].content) or "returned" in str(talk.turns[-1].content):
        yield from spoken(4)(number, talk)
        return
    for text in ("Gladly. <|tool_", 'call_start|>[paint(colour="blue")', "]<|tool_call_end|>"):
        yield TextDelta(text)
    yield Done("stop", Usage(10, completion_tokens=3), Timings())


VOICE = Voice(answer)


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    models = {"voice": VOICE, "tiny": speaking.model()}
    with running(ServerOptions(models=tuple(models)), load=models.__getitem__) as url:
        yield url


CALL = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


def test_a_call_that_is_demanded_is_made_and_its_result_is_answered(base: str) -> None:
    with calling(base, "tiny") as caller:
        caller.line.session.update(
            session={
                "type": "realtime",
                "tools": [PAINT],
                "tool_choice": "required",
                "max_output_tokens": 200,
            }
        )
        session = caller.until("session.updated")["session"]
        assert session["tools"] == [PAINT] and session["tool_choice"] == "required"
        write(caller, "Paint it")
        caller.line.response.create()
        done = caller.until("response.done")["response"]
        assert in_order(caller.events, CALL)
        (call,) = done["output"]
        assert (call["type"], call["name"], call["status"]) == (
            "function_call",
            "paint",
            "completed",
        )
        assert json.loads(call["arguments"])["colour"] in ("red", "blue")
        (told,) = caller.of("response.function_call_arguments.done")
        assert (told["arguments"], told["call_id"], told["item_id"]) == (
            call["arguments"],
            call["call_id"],
            call["id"],
        )
        assert not caller.of("response.output_audio.delta")
        caller.line.session.update(
            session={"type": "realtime", "tool_choice": "auto", "max_output_tokens": 30}
        )
        caller.until("session.updated")
        caller.line.conversation.item.create(
            item={"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
        )
        added = caller.until("conversation.item.done")
        assert added["previous_item_id"] == call["id"]
        assert added["item"]["type"] == "function_call_output"
        caller.line.response.create()
        again = caller.until("response.done")["response"]
        assert again["status"] in ("completed", "incomplete")
        assert again["usage"]["input_tokens"] > done["usage"]["input_tokens"]


def test_a_call_in_what_the_model_says_is_not_spoken(base: str) -> None:
    with calling(base) as caller:
        caller.line.session.update(session={"type": "realtime", "tools": [PAINT]})
        caller.until("session.updated")
        write(caller, "Please paint it")
        caller.line.response.create()
        message, call = caller.until("response.done")["response"]["output"]
        assert message["content"][0]["transcript"] == "Gladly."
        assert (call["name"], json.loads(call["arguments"])) == ("paint", {"colour": "blue"})
        (told,) = caller.of("response.output_audio_transcript.done")
        assert told["transcript"] == "Gladly."
        assert [row["output_index"] for row in caller.of("response.output_item.done")] == [0, 1]
        caller.line.conversation.item.create(
            item={"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
        )
        caller.line.response.create()
        caller.until("response.done")
        assert VOICE.asked[-1].roles() == "uau"
        assert VOICE.asked[-1].turns[-1].content == "paint returned: wet"


def test_functions_may_be_offered_for_one_answer(base: str) -> None:
    with calling(base, "tiny") as caller:
        write(caller, "Paint it")
        choice: Any = {"type": "function", "name": "paint"}
        caller.line.response.create(response={"tools": [PAINT], "tool_choice": choice})
        (call,) = caller.until("response.done")["response"]["output"]
        assert call["name"] == "paint"
        caller.line.session.update(session={"type": "realtime", "max_output_tokens": 20})
        assert caller.until("session.updated")["session"]["tools"] == []
        write(caller, "And what now?")
        caller.line.response.create()
        assert not caller.of("error")
        caller.until("response.done")
        assert len(caller.of("response.function_call_arguments.done")) == 1


def test_calls_of_before_can_be_put_in(base: str) -> None:
    with calling(base) as caller:
        write(caller, "Hello")
        caller.line.conversation.item.create(
            item={
                "type": "function_call",
                "id": "c",
                "call_id": "call_7",
                "name": "paint",
                "arguments": '{"colour": "red"}',
            }
        )
        caller.line.conversation.item.create(
            item={"type": "function_call_output", "call_id": "call_7", "output": "dry"}
        )
        caller.line.response.create()
        caller.until("response.done")
        assert VOICE.asked[-1].roles() == "uau"
        caller.line.conversation.item.retrieve(item_id="c")
        item = caller.until("conversation.item.retrieved")["item"]
        assert (item["name"], item["arguments"]) == ("paint", '{"colour": "red"}')


def test_items_are_looked_at_and_taken_out(base: str) -> None:
    with calling(base) as caller:
        write(caller, "One")
        write(caller, "Two, two")
        caller.line.conversation.item.retrieve(item_id="mine_3")
        item = caller.until("conversation.item.retrieved")["item"]
        assert item["content"] == [{"type": "input_text", "text": "One"}]
        caller.line.conversation.item.delete(item_id="mine_3")
        assert caller.until("conversation.item.deleted")["item_id"] == "mine_3"
        caller.line.response.create()
        said = caller.until("response.done")["response"]["output"][0]["id"]
        assert [turn.content for turn in VOICE.asked[-1].turns] == ["Two, two"]
        caller.until("lfm2_mm.turn.latency")
        caller.line.conversation.item.delete(item_id=said)
        caller.until("conversation.item.deleted")
        write(caller, "Three?")
        caller.line.response.create()
        caller.until("response.done")
        assert [turn.content for turn in VOICE.asked[-1].turns] == ["Two, two", "Three?"]


def test_an_answer_that_is_taken_out_stops(base: str) -> None:
    with calling(base) as caller:
        write(caller, "Hello")
        caller.line.response.create()
        item = caller.until("response.output_item.added")["item"]["id"]
        caller.until("output_audio_buffer.started")
        caller.line.conversation.item.delete(item_id=item)
        caller.until("conversation.item.deleted")
        caller.line.conversation.item.retrieve(item_id=item)
        assert caller.until("error")["error"]["code"] == "item_retrieve_invalid_item_id"


OUTPUT = {"type": "function_call_output", "call_id": "x", "output": "y"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("conversation.item.delete", {"item_id": "x"}, "there is no item 'x' in this conversation"),
    ("conversation.item.retrieve", {}, "there is no item 'None' in this conversation"),
    ("conversation.item.create", {"item": OUTPUT}, "no function was called under that id"),
    ("conversation.item.create", {"item": {"type": "function_call"}}, "item is no call; give"),
    ("session.update", {"session": {"tools": 7}}, "tools is no list of functions"),
    ("session.update", {"session": {"tools": [{"type": "mcp"}]}}, "tools[0] is no function"),
    ("session.update", {"session": {"tools": [{"type": "function"}]}}, "tools[0] has no name"),
    ("session.update", {"session": {"tool_choice": "required"}}, "is given without tools"),
    (
        "session.update",
        {"session": {"tools": [PAINT], "tool_choice": {"type": "function", "name": "z"}}},
        "tool_choice names 'z', which is none of the tools (paint)",
    ),
    ("session.update", {"session": {"tools": [PAINT] * 200}}, "there are more than 128 tools"),
    (
        "session.update",
        {"session": {"tools": [PAINT], "tool_choice": "required"}},
        "this model cannot be made to call",
    ),
    ("response.create", {"response": {"tools": "x"}}, "tools is no list of functions"),
]


def test_what_cannot_be_called_is_refused(base: str) -> None:
    with connect(address(base)) as line:
        line.recv()
        for kind, fields, text in BAD:
            line.send(event(kind, **fields))
            told = json.loads(line.recv(timeout=20))
            while told["type"].startswith("lfm2_mm."):
                told = json.loads(line.recv(timeout=20))
            assert told["type"] == "error" and text in told["error"]["message"], (kind, told)
