"""A server in this process, on a free port of this machine, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from lfm2_mm.server import ServerOptions, create_app


@contextmanager
def running(
    options: ServerOptions, load: Callable[[str], Any] | None = None, *, ready: bool = True
) -> Iterator[str]:
    """The server's base URL; waits until every model is loaded."""
    config = uvicorn.Config(
        create_app(options, load=load), host="127.0.0.1", port=0, log_config=None, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        if ready:
            _wait_until_ready(base)
        yield base
    finally:
        server.should_exit = True
        thread.join(20)


def _wait_until_ready(base: str) -> None:
    import httpx2

    for _ in range(600):
        if httpx2.get(f"{base}/health").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError(httpx2.get(f"{base}/health").text)
