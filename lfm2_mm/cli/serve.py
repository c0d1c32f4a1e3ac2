"""`lfm2-mm serve`: the HTTP server, until it is told to stop.

Reads options and starts uvicorn; everything else is the server's own.
"""

from __future__ import annotations

import os
from typing import Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.errors import MissingExtra, SettingError

__all__ = ["serve"]


@click.command()
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="A model to serve; may be repeated.  [default: every embedded model]",
)
@click.option(
    "--index",
    "indexes",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A search index to serve under a name; may be repeated.",
)
@click.option("--host", default=None, help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Port.  [default: 8000]")
@click.option(
    "--api-key",
    envvar="LFM2_MM_API_KEY",
    metavar="KEY",
    help="What callers must send; needed on any address but this machine's own. Better given as "
    "LFM2_MM_API_KEY: command lines can be seen by others.",
)
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Host name to accept.")
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="URL", help="Origin whose pages may call."
)
@click.option(
    "--fetch-host",
    "fetch_hosts",
    multiple=True,
    metavar="NAME",
    help="Fetch pictures from these hosts only.  [default: every public host]",
)
@click.option("--no-fetch", is_flag=True, help="Fetch no pictures from URLs.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Certificate (PEM).")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Its key (PEM).")
@click.option(
    "--max-running",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Answers generated at once.",
)
@click.option(
    "--cache-mb",
    type=click.IntRange(0),
    default=768,
    show_default=True,
    help="Memory in MiB that each model may keep of prompts and pictures it has computed.",
)
@click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Log in JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Log problems only.")
def serve(**params: Any) -> None:
    """Serve models and indexes over HTTP, as OpenAI's clients expect it.

    \b
    lfm2-mm serve                                    on http://127.0.0.1:8000
    lfm2-mm serve -m LiquidAI/LFM2.5-VL-450M --index notes=notes.idx
    """  # noqa: D301
    try:
        import uvicorn

        from lfm2_mm.server.app import create_app
        from lfm2_mm.server.listening import configured
    except ImportError as error:
        raise MissingExtra(
            f"the server needs {error.name}, which is not installed; run pip install "
            "'lfm2-mm[server]'"
        ) from None
    from lfm2_mm.locate import embedded_models
    from lfm2_mm.server.logs import configure
    from lfm2_mm.server.options import Limits, ServerOptions

    if params["threads"]:
        os.environ["LFM2_MM_THREADS"] = str(params["threads"])
    embedded = tuple(found.name for found in embedded_models())
    options = ServerOptions(
        models=params["models"] or embedded,
        indexes=_indexes(params["indexes"]),
        host=params["host"] or os.environ.get("LFM2_MM_HOST", "127.0.0.1"),
        port=_port(params["port"]),
        api_key=params["api_key"] or None,
        hosts=params["hosts"],
        origins=params["origins"],
        fetch_hosts=params["fetch_hosts"],
        fetch=not params["no_fetch"],
        limits=Limits(running=params["max_running"], cache_bytes=params["cache_mb"] * 2**20),
    )
    config = configured(
        create_app(options), options, certificate=params["tls_cert"], key=params["tls_key"]
    )
    configure(as_json=params["as_json"], quiet=params["quiet"])
    scheme = "https" if params["tls_cert"] else "http"
    terminal.say(
        f"serving {', '.join(options.models)} on {scheme}://{options.host}:{options.port}; "
        "Ctrl-C stops",
        quiet=params["quiet"],
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except KeyboardInterrupt:
        return
    except SystemExit:  # uvicorn's way of saying that it could not start
        pass
    if not server.started:
        raise SettingError(
            f"nothing could be served on {options.host}:{options.port}, as the lines above say; "
            "give another --port or --host"
        )


def _port(given: int | None) -> int:
    if given is not None:
        return given
    text = os.environ.get("LFM2_MM_PORT", "8000")
    if not text.isdecimal() or int(text) > 65535:
        raise SettingError(f"LFM2_MM_PORT is {text!r}; give a port from 0 to 65535")
    return int(text)


def _indexes(given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or not name.replace("-", "").replace("_", "").isalnum():
            raise SettingError(
                f"--index is {entry!r}; write NAME=FOLDER, the name of letters, digits, - and _"
            )
        if name in found:
            raise SettingError(f"two indexes are named {name!r}; give each its own name")
        found[name] = folder
    return found
