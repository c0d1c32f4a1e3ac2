"""The verbs `bench retrieval` and `bench serving`: options in, report out.

Imports nothing heavy until one runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from lfm2_mm.cli import terminal

__all__ = ["retrieval_command", "serving_command"]

_SIDES = ("numpy", "sentence-transformers", "lancedb", "qdrant")
Bar = Callable[..., AbstractContextManager[Callable[[int, int], None] | None]]


def retrieval_command(bar: Bar) -> click.Command:
    """The verb.

    Args:
        bar: Makes a progress bar of a text and `quiet=`.
    """

    @click.command("retrieval")
    @click.option(
        "--passages", type=click.IntRange(min=20), default=10_000, show_default=True, metavar="N"
    )
    @click.option(
        "--corpus",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of texts.  [default: the installed manual pages]",
    )
    @click.option("--drawn", is_flag=True, help="Draw short clustered passages instead of texts.")
    @click.option("-m", "--model", default="nano-colbert", show_default=True, help="Retriever.")
    @click.option("--queries", type=click.IntRange(min=1), default=20, show_default=True)
    @click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
    @click.option(
        "--side",
        "sides",
        multiple=True,
        type=click.Choice(_SIDES),
        help="A side beside ours and blockwise exact; may be repeated.  [default: all]",
    )
    @click.option("--alone", is_flag=True, help="Only ours and blockwise exact.")
    @click.option(
        "--peer-python",
        metavar="PATH",
        help="Interpreter that may have LanceDB and Qdrant: python -m venv PEERS, then "
        "PEERS/bin/pip install lancedb qdrant-client.  [default: this one]",
    )
    @click.option(
        "--keep",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the vectors of texts: a run that was stopped is carried on, and "
        "the next one need not encode.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    def retrieval(**params: Any) -> None:
        """Latency and recall of search, beside exact scoring and other engines.

        Every side stores the same vectors and answers the same queries in turns. Wants a quiet
        machine, some minutes and, at 100,000 passages of text, 6 GB of disk and half an hour for
        encoding them, which --keep does once.
        """
        _run(params, bar)

    return retrieval


def _run(params: dict[str, Any], bar: Bar) -> None:
    import sys

    from lfm2_evals.bench.passages import MANUALS
    from lfm2_evals.bench.retrieval import Plan, measure

    sides = () if params["alone"] else params["sides"] or _SIDES
    plan = Plan(
        passages=params["passages"],
        corpus=None if params["drawn"] else params["corpus"] or MANUALS,
        model=params["model"],
        queries=params["queries"],
        rounds=params["rounds"],
        threads=params["threads"],
        sides=tuple(sides),
        peer_python=params["peer_python"] or sys.executable,
        keep=params["keep"],
    )
    with bar("passages and queries", quiet=params["quiet"]) as progress:
        result = measure(plan, progress=progress)
    _show(result, "bench-retrieval", params)


def serving_command(bar: Bar) -> click.Command:
    """The verb.

    Args:
        bar: Makes a progress bar of a text and `quiet=`.
    """

    @click.command("serving")
    @click.option(
        "--part",
        "parts",
        multiple=True,
        type=click.Choice(["clients", "picture"]),
        help="What is measured; may be repeated.  [default: both]",
    )
    @click.option("--clients", type=click.IntRange(min=2), default=32, show_default=True)
    @click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True)
    @click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
    @click.option(
        "--shapes",
        type=click.Choice(["350m", "1.2b", "tiny"]),
        default="350m",
        show_default=True,
        help="Whose shapes the text model's random weights have.",
    )
    @click.option(
        "--form",
        type=click.Choice(["int4", "int8", "bf16"]),
        default="int4",
        show_default=True,
        help="How they are packed.",
    )
    @click.option(
        "--vision",
        type=click.Choice(["450m", "450m-2.5", "tiny"]),
        default="450m",
        show_default=True,
        help="Whose shapes the random weights have that see the picture.",
    )
    @click.option(
        "--peer-server",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="llama.cpp's llama-server.  [default: it is left out]",
    )
    @click.option(
        "--models",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the random models for the next run.  [default: a temporary one]",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    def serving(**params: Any) -> None:
        """Tokens a second of many clients beside one, and of a second question about a picture.

        Starts real servers on free ports of this machine. Wants a quiet machine, some minutes and
        2 GB of disk.
        """
        _serve(params, bar)

    return serving


def _serve(params: dict[str, Any], bar: Bar) -> None:
    from lfm2_evals.bench.serving import PARTS, Plan, measure

    names = ("clients", "tokens", "rounds", "threads", "shapes", "form", "vision")
    plan = Plan(
        parts=tuple(dict.fromkeys(params["parts"])) or PARTS,
        peer_server=params["peer_server"],
        models=params["models"],
        **{name: params[name] for name in names},
    )
    with bar("rounds", quiet=params["quiet"]) as progress:
        result = measure(
            plan,
            progress=progress,
            told=lambda what: terminal.say(f"writing {what}", quiet=params["quiet"]),
        )
    _show(result, "bench-serving", params)


def _show(result: Any, name: str, params: dict[str, Any]) -> None:
    from lfm2_evals.report import write_files

    text = result.markdown()
    if params["as_json"]:
        terminal.print_json(result.to_dict())
    else:
        click.echo(text, nl=False)
    if params["out"] is not None:
        content = json.dumps(result.to_dict(), indent=1) + "\n"
        for path in write_files(params["out"], {f"{name}.md": text, f"{name}.json": content}):
            terminal.say(f"wrote {path}", quiet=params["quiet"])
