"""The Responses API through the real OpenAI client, against a server on the embedded model."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from lfm2_mm.events import Done, Timings, Usage
from lfm2_mm.server import Limits, ServerOptions
from lfm2_mm.server.deltas import Delta
from lfm2_mm.server.problems import ApiError
from lfm2_mm.server.response_events import ResponseWriter
from lfm2_mm.server.responses_schema import ResponsesRequest
from lfm2_mm.server.streaming import EventStream
from lfm2_mm.toolcalls import ToolCall
from tests.server.running import running

KEY = "a-key-for-tests"
CIRCLE = files("lfm2_vision").joinpath("examples/simple.png").read_bytes()
URL = f"data:image/png;base64,{base64.b64encode(CIRCLE).decode()}"
PAINT: dict[str, Any] = {
    "type": "function",
    "name": "paint",
    "description": "Paint something.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
ASKED: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": URL, "detail": "auto"},
            {"type": "input_text", "text": "What colour is the circle?"},
        ],
    }
]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    limits = Limits(max_tokens=256, image_bytes=1 << 20, body_bytes=4 << 20)
    with (
        running(ServerOptions(models=("nano-vl",), api_key=KEY, limits=limits)) as base,
        openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0) as made,
    ):
        yield made


def ask(client: openai.OpenAI, **changes: Any) -> Any:
    return client.responses.create(**{"model": "nano-vl", "input": ASKED, **changes})


@pytest.fixture(scope="module")
def said(client: openai.OpenAI) -> str:
    """What the same model says to the same question in a chat."""
    content: Any = [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "text", "text": "What colour is the circle?"},
    ]
    answer = client.chat.completions.create(
        model="nano-vl", messages=[{"role": "user", "content": content}]
    )
    return answer.choices[0].message.content or ""


def test_answers_as_a_chat_does(client: openai.OpenAI, said: str) -> None:
    answer = ask(client, metadata={"a": "b"}, store=False)
    assert said and answer.output_text == said
    assert (answer.status, answer.object, answer.error) == ("completed", "response", None)
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens > 60 and usage.output_tokens_details.reasoning_tokens == 0
    assert answer.metadata == {"a": "b"} and answer.model == "nano-vl"
    again = ask(client)
    assert again.usage.input_tokens_details.cached_tokens > 60 and again.id != answer.id


def test_plain_text_instructions_and_lengths(client: openai.OpenAI) -> None:
    plain = ask(client, input="Hello there", max_output_tokens=2, temperature=1.0, top_p=0.9)
    told = ask(client, input="Hello there", max_output_tokens=2, instructions="Be brief.")
    assert told.usage.input_tokens > plain.usage.input_tokens
    assert (plain.temperature, plain.top_p, plain.max_output_tokens) == (1.0, 0.9, 2)
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 60}
    form = {"type": "json_schema", "name": "a", "schema": schema}
    cut = ask(client, text={"format": form}, max_output_tokens=5)
    assert cut.status == "incomplete" and cut.output[0].status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage.output_tokens == 5


ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_streams_the_same(client: openai.OpenAI, said: str) -> None:
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = events[-1].response
    assert text == said == last.output_text
    assert last.usage.output_tokens > 0 and last.id == events[0].response.id
    assert events[0].response.status == "in_progress" and events[0].response.output == []


def test_the_clients_own_helpers_understand_it(client: openai.OpenAI, said: str) -> None:
    class Seen(BaseModel):
        colour: Literal["red", "blue"]

    parsed = client.responses.parse(model="nano-vl", input=ASKED, text_format=Seen)
    assert parsed.output_parsed is not None and parsed.output_parsed.colour in ("red", "blue")
    with client.responses.stream(model="nano-vl", input=ASKED) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == said


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_demanded_made_and_answered(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    answer = ask(client, tools=[PAINT], tool_choice=choice, stream=stream, max_output_tokens=200)
    if stream:
        events = list(answer)
        (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
        answer = events[-1].response
        assert done.arguments == answer.output[0].arguments
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "paint", "completed")
    assert json.loads(call.arguments)["colour"] in ("red", "blue")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "painted"}
    on = [*ASKED, call, result]
    again = ask(client, input=on, tools=[PAINT], tool_choice="none", max_output_tokens=4)
    assert again.usage.input_tokens > answer.usage.input_tokens // 2
    assert again.status in ("completed", "incomplete")


def test_a_conversation_goes_on_with_what_was_put_out(client: openai.OpenAI) -> None:
    first = ask(client)
    more = {"role": "user", "content": "And how many shapes are there?"}
    second = ask(client, input=[*ASKED, *first.output, more])
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens > 60


def test_many_callers_of_asyncio(client: openai.OpenAI, said: str) -> None:
    async def both() -> list[Any]:
        options: dict[str, Any] = {"base_url": client.base_url, "api_key": KEY, "max_retries": 0}
        async with openai.AsyncOpenAI(**options) as one:
            asked: dict[str, Any] = {"model": "nano-vl", "input": ASKED}
            return await asyncio.gather(*(one.responses.create(**asked) for _ in range(4)))

    assert [answer.output_text for answer in asyncio.run(both())] == [said] * 4


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "there is no model 'gpt-5' here; this server"),
        ({"store": True}, openai.BadRequestError, "this server keeps no responses; send the whole"),
        ({"previous_response_id": "x"}, openai.BadRequestError, "previous_response_id names what"),
        ({"conversation": "x"}, openai.BadRequestError, "conversation names what was kept"),
        ({"background": True}, openai.BadRequestError, "and wait or stream"),
        ({"prompt": {"id": "x"}}, openai.BadRequestError, "prompt names a template of OpenAI's"),
        ({"truncation": "auto"}, openai.BadRequestError, "truncation is 'auto', and nothing is"),
        ({"top_logprobs": 3}, openai.BadRequestError, "scores are shown by /v1/chat/completions"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: input should be less than"),
        ({"max_output_tokens": 257}, openai.BadRequestError, "257 tokens are asked for, and the"),
        ({"input": []}, openai.BadRequestError, "input holds 0 items; give between 1 and 1024"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0] is 'web_search'"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice is given without tools"),
        (
            {"tools": [PAINT], "tool_choice": {"type": "function", "name": "rm"}},
            openai.BadRequestError,
            "tool_choice names 'rm', which is none of the tools",
        ),
        (
            {"text": {"format": {"type": "yaml"}}},
            openai.BadRequestError,
            "text.format.type is 'yaml'; it is one of text, json_object, json_schema",
        ),
        (
            {"text": {"format": {"type": "json_schema"}}},
            openai.BadRequestError,
            "text.format has no schema; give one",
        ),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            openai.BadRequestError,
            "input[0] refers to an item, but this server keeps no responses",
        ),
        (
            {"input": [{"type": "computer_call"}]},
            openai.BadRequestError,
            "input[0] has the type 'computer_call'; it is message,",
        ),
        (
            {"input": [{"type": "function_call", "name": "x"}]},
            openai.BadRequestError,
            "input[0] is no call; give call_id, name and arguments",
        ),
        (
            {"input": [{"type": "function_call_output"}]},
            openai.BadRequestError,
            "input[0] is no output of a call; give call_id and output",
        ),
        (
            {"input": [{"role": "wizard", "content": "x"}]},
            openai.BadRequestError,
            "has the role 'wizard'",
        ),
        (
            {"input": [{"role": "system", "content": "x"}]},
            openai.BadRequestError,
            "input says nothing that could be answered",
        ),
        (
            {
                "instructions": "Be brief.",
                "input": [{"role": "user", "content": [{"type": "input_file"}]}],
            },
            openai.BadRequestError,
            "input[0].content[0] has the type 'input_file'; this server reads",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            openai.BadRequestError,
            "input[0].content[0] has no URL",
        ),
        ({"metadata": {"a\nb": None}}, openai.BadRequestError, r"metadata.'a\nb': input should be"),
        ({"metadata": {"k" * 500: None}}, openai.BadRequestError, f"metadata.{'k' * 80}: input"),
        ({"input": "word " * 5000}, openai.BadRequestError, "but the model's context holds"),
        (
            {"input": "word " * 5000, "stream": True},
            openai.BadRequestError,
            "but the model's context holds",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    client: openai.OpenAI, changes: dict[str, Any], error: type[openai.APIStatusError], text: str
) -> None:
    with pytest.raises(error) as caught:
        ask(client, **changes)
    assert text in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} == set(caught.value.body)


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function", "name": "f", "description": "\\ud800"}]},
        {"text": {"format": {"type": "text", "x": "\\ud800"}}},
        {"instructions": "\\ud800"},
        {"metadata": {"a": "\\udfff"}},
        {"input": [{"role": "user", "content": "\\ud800"}]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_characters_are_no_failure(
    client: openai.OpenAI, changes: dict[str, Any], stream: bool
) -> None:
    body = {"input": "Hi", "max_output_tokens": 1, "stream": stream, **changes}
    written = json.dumps(body).replace("\\\\ud", "\\ud")
    answer = httpx2.post(
        f"{client.base_url}responses",
        content=written,
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    assert answer.status_code in (200, 400), answer.text
    assert "internal" not in answer.text
    if stream and answer.status_code == 200:
        assert "response.incomplete" in answer.text or "response.completed" in answer.text


def test_the_key_is_asked_for_and_the_document_tells_of_it(client: openai.OpenAI) -> None:
    with (
        openai.OpenAI(base_url=client.base_url, api_key="wrong-key", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
    ):
        ask(stranger)
    document: Any = client.get("../openapi.json", cast_to=object)
    assert "post" in document["paths"]["/v1/responses"]


# --- the writer --------------------------------------------------------------------------------


def test_thinking_text_and_calls_are_items_of_their_own() -> None:
    writer = ResponseWriter(ResponsesRequest.model_validate({"input": "x"}), "m")
    events = list(writer.begin())
    call = ToolCall(name="f", arguments={"a": "ä"}, id="call_1")
    for delta in (Delta(reasoning="Hm"), Delta(reasoning="m."), Delta("Yes", "")):
        events += writer.push(delta)
    events += writer.push(Delta(".", tool_calls=(call,)))
    events += writer.end(Done("stop", Usage(5, completion_tokens=4), Timings()), 2)
    assert [item["type"] for item in writer.response["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    thought, message, called = writer.response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert thought["summary"] == [] and message["content"][0]["text"] == "Yes."
    assert (called["arguments"], called["call_id"]) == ('{"a": "ä"}', "call_1")
    assert {item["status"] for item in writer.response["output"]} == {"completed"}
    places = [e["output_index"] for e in events if e["type"] == "response.output_item.done"]
    assert places == [0, 1, 2]
    assert writer.response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


def test_what_fails_midway_is_told() -> None:
    writer = ResponseWriter(ResponsesRequest.model_validate({"input": "x"}), "m")
    events = [*writer.begin(), *writer.push(Delta("Ye"))]
    events += writer.fail(ApiError(503, "it failed; try again"))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {
        "code": "server_error",
        "message": "it failed; try again",
    }
    assert events[-2]["item"]["status"] == "incomplete"


def test_nothing_said_is_an_empty_message() -> None:
    writer = ResponseWriter(ResponsesRequest.model_validate({"input": "x"}), "m")
    assert list(writer.end(Done("stop", Usage(5), Timings()), 0))
    assert writer.response["output"][0]["content"][0]["text"] == ""


# --- streams that nobody reads -----------------------------------------------------------------


@pytest.mark.parametrize("gone", [False, True])
def test_a_stream_ends_however_it_ends(gone: bool) -> None:
    ended: list[str] = []

    async def content() -> Any:
        yield b"data: {}\n\n"

    async def receive() -> dict[str, Any]:
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    def end() -> None:
        ended.append("ended")

    stream: Callable[..., Any] = EventStream(content(), end)
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(stream(scope, receive, send))
    assert ended == ["ended"]
