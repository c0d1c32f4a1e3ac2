"""A server in this process, on a free port of this machine, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from lfm2_mm.server import ServerOptions, create_app
from lfm2_mm.server.listening import configured


@contextmanager
def running(
    options: ServerOptions,
    load: Callable[[str], Any] | None = None,
    *,
    ready: bool = True,
    **tls: Any,
) -> Iterator[str]:
    """The server's base URL; waits until every model is loaded."""
    app = create_app(options, load=load)
    server = uvicorn.Server(configured(app, replace(options, port=0), **tls))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        base = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        if ready:
            _wait_until_ready(base, verify=not tls)
        yield base
    finally:
        server.should_exit = True
        thread.join(20)


def _wait_until_ready(base: str, *, verify: bool) -> None:
    import httpx2

    with httpx2.Client(base_url=base, verify=verify) as client:
        for _ in range(600):
            if client.get("/health").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(client.get("/health").text)
