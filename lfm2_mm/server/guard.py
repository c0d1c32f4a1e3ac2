"""What every request and socket must pass before a route sees it: Host, Origin, key and size.

Plain ASGI, so that nothing reaches the application unchecked. Gives each request an id, logs one
line about it without anything a user wrote, and turns what escapes the application into an answer.
Knows no route but the few that need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from lfm2_mm.server.options import ServerOptions, is_loopback
from lfm2_mm.server.problems import ApiError, body_of, from_exception

__all__ = ["Guard", "log"]

log = logging.getLogger("lfm2_mm.server")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PUBLIC = ("/health", "/", "/favicon.ico")
_PUBLIC_FOLDERS = ("/static/",)
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"media-src 'self' blob:; connect-src 'self'; worker-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """Wraps an application.

    Args:
        app: The application.
        options: Who may call.
    """

    def __init__(self, app: App, options: ServerOptions) -> None:
        self.app, self.options = app, options
        self._hosts = {host.lower() for host in options.hosts}
        if not is_loopback(options.host) and options.host not in ("0.0.0.0", "::"):
            self._hosts.add(options.host.strip("[]").lower())
        self._origins = {origin.rstrip("/").lower() for origin in options.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then hand on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, answer = time.perf_counter(), _Answer(send, request_id)
        try:
            self._check(scope, headers)
            self._check_length(headers)
            body = _Body(receive, self.options) if scope["type"] == "http" else None
            await self.app(scope, body or receive, answer)
        except asyncio.CancelledError:
            raise
        except Exception as problem:
            told = from_exception(problem)
            if told.code == "internal":
                log.exception("request %s failed", request_id)
            await answer.refuse(scope, told)
        finally:
            log.info(
                "%s %s %s %s %.3fs",
                request_id,
                scope.get("method", "WEBSOCKET"),
                _route(scope),
                answer.status or "-",
                time.perf_counter() - began,
            )

    def _check(self, scope: Scope, headers: MutableMapping[str, str]) -> None:
        host = headers.get("host", "")
        if not self._host_known(host):
            raise ApiError(
                403,
                f"the Host header is {host[:100]!r}, which is not a name of this server; call it "
                "by its own address, or start it with --allow-host",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._same_origin(origin, host, scope):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not call this server; start it with "
                "--allow-origin to let them",
                code="unknown_origin",
            )
        if self.options.api_key is None or self._needs_no_key(scope):
            return
        if not self._has_key(headers, scope):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )

    def _check_length(self, headers: MutableMapping[str, str]) -> None:
        """Refuse at once what says that it will be too large."""
        said, most = headers.get("content-length", ""), self.options.limits.body_bytes
        if said.isdecimal() and (len(said) > 18 or int(said) > most):
            raise _too_large(most)

    def _host_known(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").lower(), parts.port
        except ValueError:
            return False
        if not name or parts.path or parts.query or parts.username is not None:
            return False
        return is_loopback(name) or name in self._hosts

    def _same_origin(self, origin: str, host: str, scope: Scope) -> bool:
        origin = origin.rstrip("/").lower()
        if origin in self._origins:
            return True
        secure = scope.get("scheme") in ("https", "wss")
        return origin == f"{'https' if secure else 'http'}://{host.lower()}"

    @staticmethod
    def _needs_no_key(scope: Scope) -> bool:
        path = scope.get("path", "")
        if scope.get("method") == "OPTIONS":  # browsers ask before they send a key
            return True
        reads = scope["type"] == "http" and scope.get("method") in ("GET", "HEAD")
        return reads and (path in _PUBLIC or path.startswith(_PUBLIC_FOLDERS))

    def _has_key(self, headers: MutableMapping[str, str], scope: Scope) -> bool:
        kind, _, sent = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            sent = ""
        if not sent and scope["type"] == "websocket":  # browsers cannot set headers on sockets
            wanted = headers.get("sec-websocket-protocol", "").split(",")
            prefix = "openai-insecure-api-key."
            keys = (p.strip()[len(prefix) :] for p in wanted if p.strip().startswith(prefix))
            sent = next(keys, "")
        assert self.options.api_key is not None
        return hmac.compare_digest(sent.strip().encode(), self.options.api_key.encode())


class _Body:
    """Receives a body, no more than the limit and not for ever."""

    def __init__(self, receive: Receive, options: ServerOptions) -> None:
        self._receive, self._limits = receive, options.limits
        self._seen = 0
        self._until: float | None = time.monotonic() + options.limits.header_seconds

    async def __call__(self) -> Message:
        if self._until is None:  # the body is complete: what comes now is the caller going away
            return await self._receive()
        left = self._until - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except TimeoutError:
            raise ApiError(
                408,
                f"the body was not complete after {self._limits.header_seconds:g} seconds; send "
                "it faster",
                code="slow_body",
            ) from None
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limits.body_bytes:
                raise _too_large(self._limits.body_bytes)
            if not message.get("more_body", False):
                self._until = None
        return message


class _Answer:
    """Sends, adds our headers, and remembers how far the answer got."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id = send, request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            headers += [(name, value) for name, value in _SECURITY if name not in present]
            headers.append((b"x-request-id", self._id.encode()))
            message = {**message, "headers": headers}
        elif message["type"] == "websocket.accept":
            self.status = 101
        await self._send(message)

    async def refuse(self, scope: Scope, problem: ApiError) -> None:
        """Tell the caller, if there is still a way to."""
        body = json.dumps(body_of(problem), ensure_ascii=False).encode()
        if self.status is not None:  # midway through an answer: it can only be broken off
            if scope["type"] == "websocket":
                await self._send({"type": "websocket.close", "code": 1011})
            return
        headers: Iterable[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((k.encode(), v.encode()) for k, v in problem.headers.items()),
        ]
        if scope["type"] == "http":
            if problem.status in (408, 413):  # what is left of the body is not read
                headers = [*headers, (b"connection", b"close")]
            await self(
                {"type": "http.response.start", "status": problem.status, "headers": headers}
            )
            await self._send({"type": "http.response.body", "body": body})
        elif "websocket.http.response" in scope.get("extensions", {}):
            self.status = problem.status
            start = "websocket.http.response.start"
            await self._send({"type": start, "status": problem.status, "headers": list(headers)})
            await self._send({"type": "websocket.http.response.body", "body": body})
        else:
            self.status = 403
            await self._send({"type": "websocket.close", "code": 1008})


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {most:,} bytes; send less", code="body_too_large"
    )


def _headers(scope: Scope) -> MutableMapping[str, str]:
    """Headers by lower-case name; of one that comes twice, both, so that no check sees but one."""
    found: dict[str, str] = {}
    for name, value in scope.get("headers", ()):
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]},{text}" if key in found else text
    return found


def _route(scope: Scope) -> str:
    """The route's pattern, not what was asked: paths may hold what a user wrote."""
    route = scope.get("route")
    return str(getattr(route, "path", None) or "(no route)")
