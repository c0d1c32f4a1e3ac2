"""What the verbs of search share: options, an index opened with its model, a note about the model.

Knows click and the index's face; imports no torch until an index is opened with a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.options import model_options
from lfm2_mm.errors import InputError
from lfm2_retrieval.reranking import DEFAULT_MODEL

if TYPE_CHECKING:
    from lfm2_retrieval.index.encoders import EncoderLike
    from lfm2_retrieval.index.index import Index

__all__ = [
    "common_options",
    "index_argument",
    "open_index",
    "open_with_model",
    "print_json",
    "retriever_options",
]

F = TypeVar("F", bound=Callable[..., Any])

index_argument = click.argument("index", type=click.Path(file_okay=False, path_type=Path))

_STEERING = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def common_options(function: F) -> F:
    """`--json` and `-q`."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but answers and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    ):
        function = option(function)
    return function


def retriever_options(function: F) -> F:
    """`-m`, where and how it runs, `--json` and `-q`."""
    model = click.option(
        "-m",
        "--model",
        metavar="NAME",
        help="Retriever: embedded name, folder or Hub id[@revision].  "
        f"[default: what the index was made with, else {DEFAULT_MODEL}]",
    )
    return model(model_options(common_options(function)))


def open_index(folder: Path, *, read_only: bool = False) -> Index:
    """An index that exists, without its model.

    Raises:
        IndexFault: if there is none, or it cannot be used.
    """
    from lfm2_retrieval.index.index import Index

    return Index.open(folder, create=False, read_only=read_only)


def open_with_model(
    folder: Path, params: dict[str, Any], *, create: bool = False, pool_factor: int | None = None
) -> tuple[Index, EncoderLike]:
    """An index and its model, loaded.

    Args:
        folder: The index.
        params: Of the verb: `model`, `device`, `dtype`, `threads`, `quiet`.
        create: Whether to make the index if there is none, and to change it.
        pool_factor: See `Index.open`.

    Raises:
        IndexFault: if there is no index, it cannot be used, or another model made it.
        ModelNotFound: if there is no such model.
    """
    from lfm2_retrieval.index.index import Index
    from lfm2_retrieval.index.snapshot import open_snapshot
    from lfm2_retrieval.reranking import load_encoder

    snapshot = open_snapshot(folder)
    if snapshot is None and not create:
        open_index(folder)  # says that there is none
    name = params.get("model") or (snapshot and snapshot.state.model.name)
    if snapshot is not None and name is None:
        raise InputError(
            f"the index {str(folder)!r} holds vectors made elsewhere and names no model; name the "
            "one that made them with -m"
        )
    name = name or DEFAULT_MODEL
    quiet = bool(params.get("quiet"))
    if (note := plugins.note_for(name)) is not None:
        terminal.say(note, quiet=quiet)
    with terminal.working(f"loading {name}", quiet=quiet):
        flags = {f: params.get(f) for f in ("device", "dtype", "threads", "quantize")}
        encoder = load_encoder(name, **flags)
        opened = Index.open(
            folder, encoder, create=create, read_only=not create, pool_factor=pool_factor
        )
        return opened, encoder


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout; what steers a terminal is escaped, and thus kept."""
    text = json.dumps(value, ensure_ascii=False)
    click.echo(_STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
