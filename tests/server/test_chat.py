"""Chat completions through the real OpenAI client, against a server on the embedded model."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx2
import openai
import pytest

from lfm2_mm.server import Limits, ServerOptions
from tests.server.running import running

KEY = "a-key-for-tests"
CIRCLE = files("lfm2_vision").joinpath("examples/simple.png").read_bytes()
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint something.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asking(text: str = "What colour is the circle?", url: str | None = None) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": url or data_url(CIRCLE)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    limits = Limits(max_tokens=256, image_bytes=1 << 20, body_bytes=4 << 20, header_seconds=1.5)
    with running(ServerOptions(models=("nano-vl",), api_key=KEY, limits=limits)) as url:
        yield url


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **changes: Any) -> Any:
    body: dict[str, Any] = {"model": "nano-vl", "messages": asking(), **changes}
    return client.chat.completions.create(**body)


def test_answers_a_question_about_a_picture(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "red"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2


def test_the_second_question_finds_the_picture_in_the_cache(client: openai.OpenAI) -> None:
    ask(client)
    again = ask(client, messages=asking("How many shapes are there?"))
    assert again.usage.prompt_tokens_details.cached_tokens > 60


def test_streams_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "red"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_json_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = ask(
        client,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        max_completion_tokens=256,
    )
    # which colour is left open: nano-vl was never taught JSON
    assert json.loads(answer.choices[0].message.content) in ({"colour": "red"}, {"colour": "blue"})


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_can_be_demanded(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    answer = ask(
        client, tools=[PAINT], tool_choice=choice, stream=stream, max_completion_tokens=256
    )
    if stream:
        chunks = list(answer)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        calls = answer.choices[0].message.tool_calls
        reason = answer.choices[0].finish_reason
    assert reason == "tool_calls"
    assert [call.function.name for call in calls] == ["paint"]
    assert json.loads(calls[0].function.arguments)["colour"] in ("red", "blue")


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    from lfm2_mm.loading import load

    answer = ask(client, logprobs=True, top_logprobs=3)
    (entry,) = answer.choices[0].logprobs.content
    model = load("nano-vl")
    image = {"type": "image", "image": CIRCLE}
    text = {"type": "text", "text": "What colour is the circle?"}
    scores = model.logits([{"role": "user", "content": [image, text]}])[-1].log_softmax(-1)
    assert entry.token == "red" and bytes(entry.bytes) == b"red"
    best, ids = scores.topk(3)
    assert entry.logprob == pytest.approx(float(best[0]), abs=1e-4)
    assert [one.logprob for one in entry.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)
    assert [one.token for one in entry.top_logprobs] == [model.tokenizer.decode([i]) for i in ids]
    chunks = list(ask(client, logprobs=True, stream=True))
    found = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [(one.token, one.top_logprobs) for one in found] == [("red", [])]


def test_what_the_engine_refuses_has_a_status_before_a_stream(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError, match="but the model's context holds"):
        ask(client, messages=long, stream=True)


def test_several_choices(client: openai.OpenAI) -> None:
    answer = ask(client, n=3, temperature=1.0, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = ask(client, n=3, temperature=1.0, seed=4)
    texts = [[choice.message.content for choice in a.choices] for a in (answer, again)]
    assert texts[0] == texts[1]


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    assert ask(client, stop=["e"]).choices[0].message.content == "r"


def test_many_at_once_are_answered_as_alone(client: openai.OpenAI) -> None:
    found: list[str] = []

    def one() -> None:
        found.append(ask(client).choices[0].message.content)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["red"] * 12


def test_a_caller_who_goes_away_frees_the_model(base: str, client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 60}
    stream = ask(
        client,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    next(iter(stream))
    stream.close()
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(200):
        text = httpx2.get(f"{base}/metrics", headers=headers).text
        if "lfm2_batch_size 0.0" in text:
            return
        time.sleep(0.02)
    raise AssertionError("the request still runs")


PRIVATE = [
    "http://127.0.0.1/x.png",
    "http://localhost:80/x.png",
    "http://2130706433/x.png",
    "http://[::1]/x.png",
    "http://[::ffff:127.0.0.1]/x.png",
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/x.png",
    "http://[fd00::1]/x.png",
    "http://[64:ff9b::7f00:1]/x.png",
]


@pytest.mark.parametrize("url", PRIVATE)
def test_private_addresses_are_not_fetched(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="is not public"):
        ask(client, messages=asking(url=url))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "there is no model 'gpt-5' here; this server"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: input should be less than"),
        ({"messages": []}, openai.BadRequestError, "messages: list should have at least 1 item"),
        ({"n": 9}, openai.BadRequestError, "n is 9; at most 8 answers are given"),
        ({"max_tokens": 257}, openai.BadRequestError, "257 tokens are asked for, and the limit"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty is 1.0, which this"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice is given without tools"),
        (
            {"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "rm"}}},
            openai.BadRequestError,
            "tool_choice names 'rm', which is none of the tools",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            openai.BadRequestError,
            "has the type 'video'; this server reads text, image_url and input_audio",
        ),
        ({"messages": asking(url="/etc/passwd")}, openai.BadRequestError, "files of this machine"),
        ({"messages": asking(url="file:///etc/passwd")}, openai.BadRequestError, "files of this"),
        (
            {"messages": asking(url=data_url(b"no picture"))},
            openai.UnprocessableEntityError,
            "is not an image that can be read here",
        ),
        (
            {"messages": asking(url=data_url(bytes(2 << 20)))},
            openai.UnprocessableEntityError,
            "over the limit of 1,048,576 bytes",
        ),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            openai.BadRequestError,
            "message 0 has the role 'wizard'",
        ),
        (
            {"response_format": {"type": "yaml"}},
            openai.BadRequestError,
            "yaml",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 5000}]},
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


def test_the_key_is_asked_for(base: str) -> None:
    for key in ("wrong-key", KEY + "x"):
        with (
            openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"),
        ):
            stranger.models.list()
    assert httpx2.get(f"{base}/health").status_code == 200
    assert httpx2.get(f"{base}/metrics").status_code == 401


def test_models_are_listed(client: openai.OpenAI) -> None:
    rows = client.models.list().data
    assert [row.id for row in rows] == ["nano-vl"]
    assert client.models.retrieve("nano-vl").to_dict()["abilities"] == ["chat", "image"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"host": "evil.example"}, "the Host header is 'evil.example', which is not a name of"),
        ({"host": "localhost:80:80"}, "the Host header is"),
        ({"origin": "http://evil.example"}, "pages of 'http://evil.example' may not call"),
        ({"origin": "null"}, "pages of 'null' may not call"),
    ],
)
def test_other_hosts_and_origins_are_refused(base: str, headers: dict[str, str], text: str) -> None:
    for path in ("/health", "/v1/models", "/v1/chat/completions", "/nothing"):
        answer = httpx2.get(base + path, headers={"authorization": f"Bearer {KEY}", **headers})
        assert answer.status_code == 403
        assert text in answer.json()["error"]["message"]


def test_its_own_pages_may_call(base: str) -> None:
    assert httpx2.get(f"{base}/health", headers={"origin": base}).status_code == 200


def test_a_body_over_the_limit_is_refused(base: str) -> None:
    answer = httpx2.post(
        f"{base}/v1/chat/completions",
        content=b" " * (5 << 20),
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert "the body is larger than 4,194,304 bytes" in answer.json()["error"]["message"]


def test_a_slow_body_is_not_waited_for(base: str) -> None:
    host, port = base.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head.encode())
        answer = slow.makefile("rb").read()  # up to the end: the connection is closed
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"the body was not complete after 1.5 seconds" in answer
    assert 1 < time.monotonic() - began < 15


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff", b"", b"null"])
def test_a_body_that_is_no_request(base: str, body: bytes) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx2.post(f"{base}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
