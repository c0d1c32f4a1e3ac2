"""Callers who mean no good: malformed requests out of the server's own OpenAPI document.

Values are drawn by hypothesis from the schemas, then spoiled; what comes back is judged. Used by
the short form (test_abuse.py) and the long one (tools/abuse_server.py). Knows HTTP and the form of
errors; nothing of what a route does.
"""

from __future__ import annotations

import json
import math
import socket
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Json = Any
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
TYPES = (
    "application/json",
    "multipart/form-data; boundary=b",
    "text/plain",
    "application/json;",
    "",
)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
NUMBERS = st.sampled_from([0, -1, 1, 8, 2**31, 2**63, 2**64, -(2**70), 1e308, math.nan, math.inf])
JUNK: SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def many(count: int) -> settings:
    """So many cases, the same ones each time, and the smallest of those that fail."""
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


# --- requests ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One request."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def wire(self, host: str) -> bytes:
        """As it is sent."""
        given = {"Host": host, "Connection": "close", "Content-Length": str(len(self.body))}
        lines = [f"{self.method} {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**given, **self.headers}.items()]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


@dataclass(frozen=True)
class Reply:
    """What came back; status 0 if the server hung up."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


def fitting(schema: dict[str, Any], parts: dict[str, Any]) -> SearchStrategy[Json]:
    """Values that a JSON schema of the document allows."""
    if "$ref" in schema:
        return st.deferred(lambda: fitting(parts[schema["$ref"].rpartition("/")[2]], parts))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return st.one_of([fitting(one, parts) for one in schema[several]])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([fitting({**schema, "type": one}, parts) for one in kind])
    if kind == "object":
        return _objects(schema, parts)
    if kind == "array":
        least = schema.get("minItems", 0)
        items = fitting(schema.get("items", {}), parts)
        return st.lists(items, min_size=least, max_size=least + 2)
    if kind in ("integer", "number"):
        low = schema.get("minimum", 0)
        high = min(schema.get("maximum", low + 8), low + 8)
        return st.integers(low, high) if kind == "integer" else st.floats(low, high)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=12)
    plain: dict[Any, SearchStrategy[Any]] = {"boolean": st.booleans(), "null": st.none()}
    return plain.get(kind, JUNK)


def _objects(schema: dict[str, Any], parts: dict[str, Any]) -> SearchStrategy[Json]:
    own = {name: fitting(one, parts) for name, one in schema.get("properties", {}).items()}
    if not own:
        return st.dictionaries(st.text(max_size=5), JUNK, max_size=3)
    needed = {name: own[name] for name in schema.get("required", ())}
    return st.fixed_dictionaries(needed, optional={n: s for n, s in own.items() if n not in needed})


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "tool", "developer"]) | TEXTS,
            "content": TEXTS
            | JUNK
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["text", "image_url", "input_audio", "refusal"])},
                    optional={
                        "text": TEXTS | JUNK,
                        "image_url": st.fixed_dictionaries({"url": TEXTS | JUNK}) | JUNK,
                        "input_audio": st.fixed_dictionaries({"data": TEXTS | JUNK}) | JUNK,
                    },
                ),
                max_size=2,
            ),
        },
        optional={"tool_calls": JUNK, "tool_call_id": JUNK, "name": JUNK, "audio": JUNK},
    ),
    min_size=1,
    max_size=3,
)


ITEMS = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"])},
    optional={
        name: TEXTS | JUNK
        for name in ("id", "role", "content", "name", "call_id", "arguments", "output")
    },
)


@st.composite
def spoiled(draw: Any, value: Json) -> Json:
    """A value with something wrong in it."""
    if not isinstance(value, dict) or not value:
        return draw(JUNK)
    value = dict(value)
    name = draw(st.sampled_from(sorted(value)))
    how = draw(st.sampled_from(["drop", "replace", "deeper", "more"]))
    if how == "drop":
        del value[name]
    elif how == "deeper":
        value[name] = draw(spoiled(value[name]))
    else:
        value[name if how == "replace" else draw(TEXTS)] = draw(JUNK)
    return value


@st.composite
def _attacks(draw: Any, document: dict[str, Any], names: tuple[str, ...]) -> Attack:
    parts = document.get("components", {}).get("schemas", {})
    template = draw(st.sampled_from(sorted(document["paths"])))
    operations = document["paths"][template]
    method = draw(st.sampled_from(sorted(operations)))
    content = operations[method].get("requestBody", {}).get("content", {})
    path = template
    while "{" in path:
        before, _, rest = path.partition("{")
        junk = st.text(min_size=1, max_size=12)
        value = draw(st.sampled_from(names) | junk if names else junk)
        path = before + quote(value, safe="") + rest.partition("}")[2]
    headers: dict[str, str] = {}
    body = b""
    if content:
        kind = draw(st.sampled_from(sorted(content)))
        value = draw(fitting(content[kind]["schema"], parts))
        if isinstance(value, dict) and "messages" in value:
            value["messages"] = draw(MESSAGES)
        if template == "/v1/responses" and isinstance(value, dict):
            value["input"] = draw(TEXTS | MESSAGES | st.lists(ITEMS, max_size=3))
            value["max_output_tokens"] = draw(st.sampled_from([1, 4, 2**40]))
        if draw(st.integers(0, 3)):
            value = draw(spoiled(value))
        body = _encoded(_short(value), kind)
        headers["Content-Type"] = f"{kind}; boundary=b" if kind.startswith("multi") else kind
        if draw(st.integers(0, 5)) == 0:
            cut = draw(st.integers(0, len(body)))
            body = body[:cut] + draw(st.binary(max_size=8)) + body[cut + 2 :]
        if draw(st.integers(0, 7)) == 0:
            headers["Content-Type"] = draw(st.sampled_from(TYPES))
    if draw(st.integers(0, 9)) == 0:
        method = draw(st.sampled_from(METHODS))
    if draw(st.integers(0, 9)) == 0:
        path += "?" + quote(draw(st.text(max_size=10)), safe="=&%")
    if draw(st.integers(0, 9)) == 0:
        names_ = ("X-Request-Id", "Range", "Accept", "Content-Encoding", "Expect", "Cookie")
        headers[draw(st.sampled_from(names_))] = draw(st.sampled_from(["gzip", "\xff", "a" * 999]))
    return Attack(method.upper(), path, headers, body)


def attacks(document: dict[str, Any], names: tuple[str, ...] = ()) -> st.SearchStrategy[Attack]:
    """Requests to the routes of an OpenAPI document, most of them wrong in some way.

    Args:
        document: The OpenAPI document.
        names: What parameters of paths may be, beside junk.
    """
    paths = {
        path: {
            method: {"requestBody": one.get("requestBody", {})} for method, one in routes.items()
        }
        for path, routes in document["paths"].items()
    }
    asked = {"paths": paths, "components": document.get("components", {})}  # answers are long
    return _attacks(asked, names)


def _short(value: Json) -> Json:
    """The same, but answers stay short: many are asked for."""
    if isinstance(value, dict) and "messages" in value:
        value = dict(value)
        for name in ("max_tokens", "max_completion_tokens"):
            asked = value.get(name)
            if name == "max_tokens" and asked is None or isinstance(asked, int) and asked > 4:
                value[name] = 4 if asked is None or asked <= 8192 else asked
    if isinstance(value, dict) and isinstance(value.get("input"), str):
        value = {**value, "input": value["input"][:8]}
    return value


def _encoded(value: Json, kind: str) -> bytes:
    if not kind.startswith("multipart"):
        return json.dumps(value).encode()
    out = b""
    for name, one in value.items() if isinstance(value, dict) else ():
        for item in one if isinstance(one, list) else [one]:
            text = (item if isinstance(item, str) else json.dumps(item)).encode(errors="replace")
            label = quote(str(name), safe="", errors="replace")
            extra = '; filename="../x.txt"' if name in ("file", "files") else ""
            out += f'--b\r\nContent-Disposition: form-data; name="{label}"{extra}\r\n\r\n'.encode()
            out += text + b"\r\n"
    return out + b"--b--\r\n"


@st.composite
def broken_http(draw: Any) -> bytes:
    """What is no HTTP, or almost."""
    whole = bytearray(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
        b"application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    extra = st.sampled_from(
        [
            b"\x00",
            b"\r\n",
            b"\n",
            b" ",
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Length: -1\n",
        ]
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(whole)))
        whole[at : at + draw(st.integers(0, 9))] = draw(extra | st.binary(max_size=5))
    return bytes(whole)


def send(base: str, attack: Attack | bytes, *, seconds: float = 60.0, ends: bool = False) -> Reply:
    """Send one request and read all of its answer.

    Args:
        base: The server.
        attack: The request, or any bytes.
        seconds: Time for the answer.
        ends: Whether the sending side is closed behind it, so that nobody waits for more.

    Raises:
        TimeoutError: if there is no end of it.
    """
    where = urlsplit(base)
    began = time.monotonic()
    data = attack if isinstance(attack, bytes) else attack.wire(where.netloc)
    received = b""
    with socket.create_connection((where.hostname or "", where.port or 80), seconds) as line:
        try:
            line.sendall(data)
            if ends:
                line.shutdown(socket.SHUT_WR)
            while piece := line.recv(1 << 16):
                received += piece
                if time.monotonic() - began > seconds:
                    raise TimeoutError
        except (BrokenPipeError, ConnectionResetError):  # it need not read what it refuses
            pass
    spent = time.monotonic() - began
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split()
    if len(words) < 2 or not words[1].isdecimal():
        return Reply(0, {}, received, spent)
    pairs = (line.partition(":")[::2] for line in lines[1:])
    return Reply(int(words[1]), {n.lower(): v.strip() for n, v in pairs}, body, spent)


def judged(reply: Reply, *, whole: bool = True) -> str:
    """What is wrong with an answer; empty if nothing is.

    Args:
        reply: The answer.
        whole: Whether what was sent was HTTP, so that there must be an answer of ours.
    """
    if not reply.status:
        return "no answer" if whole else ""
    if b'"internal"' in reply.body or reply.status >= 500 and reply.status != 503:
        return f"status {reply.status}: {reply.body[:300]!r}"
    if reply.status >= 400 and whole and reply.body:
        if "x-request-id" not in reply.headers:
            return f"no request id ({reply.status}: {reply.body[:200]!r})"
        try:
            error = json.loads(reply.body)["error"]
            told = bool(error["type"]) and isinstance(error["message"], str)
            if not told or "\n" in error["message"]:
                return f"no sentence: {reply.body[:200]!r}"
        except (ValueError, KeyError, TypeError):
            return f"not the form of an error: {reply.body[:200]!r}"
    return ""
