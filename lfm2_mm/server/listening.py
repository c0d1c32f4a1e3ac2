"""How the application meets the network: uvicorn's settings, TLS, and an end of patience.

uvicorn waits for ever for a caller who opens a connection and says nothing, who sends a header
letter by letter, or who reads nothing of the answer; enough of them keep everybody else out. Knows
connections and no application.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from lfm2_mm.errors import SettingError
from lfm2_mm.server.options import ServerOptions

__all__ = ["configured"]

_KEEP_ALIVE = 10  # seconds in which a next request may begin
_DRAIN = 30  # seconds in which what was begun may end
_HEADER_BYTES = 64 * 1024
_CONNECTIONS = 1024
_PING = 20  # seconds between two pings of a socket, and for the answer to one
_SLOWEST = 1024  # bytes a second that a caller must read, once much is waiting for it


def configured(
    app: Callable[..., Any],
    options: ServerOptions,
    *,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
) -> Config:
    """How uvicorn serves an application.

    Args:
        app: The application.
        options: Where it listens, and its limits.
        certificate: PEM file of a certificate and what signed it; with it TLS is spoken.
        key: PEM file of its key.

    Raises:
        SettingError: if only one of these is given, or the two cannot be used.
    """
    if (certificate is None) != (key is None):
        raise SettingError("TLS needs both --tls-cert and --tls-key; give the other one too")
    if certificate is not None and key is not None:
        _check(certificate, key)
    return Config(
        app,
        host=options.host,
        port=options.port,
        http=_impatient(options.limits.header_seconds, options.limits.unread_seconds),
        ws=_read_or_cut(options.limits.unread_seconds),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_DRAIN,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ws_max_size=options.limits.frame_bytes,
        ws_ping_interval=_PING,
        ws_ping_timeout=_PING,
        limit_concurrency=_CONNECTIONS,
    )


def _check(certificate: str | Path, key: str | Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise SettingError(
            f"the certificate {str(certificate)!r} and the key {str(key)!r} cannot be used "
            f"({why}); give PEM files that belong together, the key without a passphrase"
        ) from None


class _Patience:
    """Cuts a connection whose other end does not read.

    Args:
        transport: The connection.
        seconds: In which it must have read something.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting, self._gone = 0, False

    def begin(self) -> None:
        """Much is waiting to be read."""
        self.end()
        self._waiting = self.waiting
        self._timer = self._loop.call_later(self._seconds, self._look)

    def last(self) -> None:
        """Nothing more is said: what is not read in time is lost."""
        if not self._gone and self._transport.is_closing() and self.waiting:
            self.begin()

    def gone(self) -> None:
        """The connection is lost."""
        self._gone = True
        self.end()

    @property
    def waiting(self) -> int:
        """Bytes that are not read."""
        if self._gone:
            return 0
        try:
            return self._transport.get_write_buffer_size()
        except AttributeError:  # a closed TLS transport of asyncio has let go of its protocol
            return 0

    def end(self) -> None:
        """It is read."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._waiting - self.waiting < _SLOWEST * self._seconds:
            self._transport.abort()
        else:
            self.begin()


def _read_or_cut(seconds: float) -> type[asyncio.Protocol]:
    """A protocol of sockets that cuts off clients who stop reading, so that routes end."""

    class ReadOrCut(WebSocketsSansIOProtocol):
        _patience: _Patience

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._patience = _Patience(self.transport, seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.gone()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience.begin()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._patience.end()

        def keepalive_timeout(self) -> None:
            super().keepalive_timeout()
            if self._patience.waiting:  # else it is closing already
                self.transport.abort()

        async def send(self, message: Any) -> None:
            await super().send(message)
            if message["type"] == "websocket.http.response.body":
                self.handshake_complete = True  # refused: that is no failure of the application

        async def run_asgi(self) -> None:
            await super().run_asgi()
            self._patience.last()

    return ReadOrCut


def _impatient(seconds: float, unread: float) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose next header is not complete in so many seconds.

    It cuts those whose other end reads nothing for `unread` seconds.
    """

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _patience: _Patience

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._patience = _Patience(transport, unread)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._patience.gone()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience.begin()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._patience.end()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._patience.last()

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            self._forget()
            super().handle_websocket_upgrade(event)
            self._timer = _NEVER  # the connection is the socket's from now on

        def _watch(self) -> None:
            """Begin to wait for a header, or stop."""
            if self._timer is _NEVER:
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._timer is None and self.timeout_keep_alive_task is None:
                self._timer = self.loop.call_later(seconds, self._give_up)

        def _forget(self) -> None:
            if self._timer is not None and self._timer is not _NEVER:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Impatient


_NEVER: Any = object()
