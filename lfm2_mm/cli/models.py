"""`lfm2-mm models`: what is embedded, what is cached, what exists; its size and memory need.

Reads configs and file headers only; no weight is loaded. Knows no modality: what a checkpoint is,
the frontends and the list of official ids say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm import settings
from lfm2_mm.cli import terminal
from lfm2_mm.cli.options import common_options
from lfm2_mm.config import DENSE, SPARSE, BackboneConfig
from lfm2_mm.errors import Lfm2Error, ModelNotFound
from lfm2_mm.frontends import FRONTEND_GROUP, frontends
from lfm2_mm.locate import KNOWN_MODELS, cached_models, embedded_models, suggest

if TYPE_CHECKING:
    import torch

    from lfm2_mm.checkpoint import Checkpoint

__all__ = ["CONTEXT", "Row", "find_models", "memory_need", "models"]

CONTEXT = 4096
"""Tokens of context for which memory is stated."""

_FRONTENDS = {"embedding": "retrieval"}  # where the entry point is not named like the task


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        name: What `-m` takes.
        state: `embedded`, `cached`, `to download`, `no frontend` (nothing installed runs it) or
            `damaged`.
        kind: What it is for.
        parameters: How many.
        disk: Bytes on disk; None before a download.
        memory: Bytes of the weights and of the caches for `CONTEXT` tokens, in `dtype` (keys and
            values in bytes where the settings say so); for a model that is not here, of the
            weights alone.
        dtype: Number format that would be used.
        revision: Commit, of a cached model.
        problem: Why it cannot be used; "" where it can.
    """

    name: str
    state: str
    kind: str
    parameters: int | None = None
    disk: int | None = None
    memory: int | None = None
    dtype: str | None = None
    revision: str | None = None
    problem: str = ""


@click.command(short_help="List models: embedded, cached, and official ones to download.")
@common_options
def models(**params: Any) -> None:
    """List the models that -m can name: embedded, cached, and official ones to download."""
    rows = find_models()
    wanted = params["model"]
    if wanted is not None:
        rows = [row for row in rows if row.name == wanted.partition("@")[0]]
        if not rows:
            near = suggest(wanted)
            hint = f"did you mean {near}?" if near else "lfm2-mm models lists what there is"
            raise ModelNotFound(f'no model "{wanted}" is embedded, cached or known: {hint}')
    if params["as_json"]:
        terminal.print_json([asdict(row) for row in rows])
        return
    _print(rows)
    if not params["quiet"]:
        terminal.dim(
            f"memory: weights and caches for {CONTEXT:,} tokens; weights alone to download"
        )


def find_models() -> list[Row]:
    """All models, those on this machine first."""
    rows = [_local(m.name, "embedded", m.folder, m.size) for m in embedded_models()]
    cached = cached_models()
    rows += [_local(m.id, "cached", m.folder, m.size, m.revision) for m in cached]
    here = {model.id for model in cached}
    runnable = {"text"} | {point.name for point in entry_points(group=FRONTEND_GROUP)}
    for known in KNOWN_MODELS:
        if known.id not in here:
            needed = _FRONTENDS.get(known.task, known.task)
            rows.append(
                Row(
                    name=known.id,
                    state="to download" if needed in runnable else "no frontend",
                    kind=known.task,
                    parameters=known.parameters,
                    memory=known.parameters * 2,
                    dtype="bfloat16",
                )
            )
    return rows


def memory_need(
    config: Mapping[str, Any], parameters: int, dtype: torch.dtype, kv_cache_dtype: str = "auto"
) -> int:
    """Bytes of the weights, and of keys, values and convolution states for `CONTEXT` tokens."""
    shapes = BackboneConfig.from_dict(config)
    rows = 2 * len(shapes.attention_layers) * shapes.n_kv_heads * CONTEXT
    row = shapes.head_dim + 4 if kv_cache_dtype == "int8" else shapes.head_dim * dtype.itemsize
    columns = len(shapes.conv_layers) * (shapes.conv_taps - 1) * shapes.hidden_size
    return (parameters + columns) * dtype.itemsize + rows * row


def _local(name: str, state: str, folder: Path, disk: int, revision: str | None = None) -> Row:
    """A model whose files are here."""
    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.loading import _device, _dtype

    known = next((model.task for model in KNOWN_MODELS if model.id == name), None)
    try:
        checkpoint = Checkpoint.open(folder, name)
        kind = known or _kind(checkpoint)
        parameters = sum(prod(checkpoint.shape(tensor)) for tensor in checkpoint.names)
        wanted = settings.resolve()
        dtype = _dtype(wanted.dtype, checkpoint, _device(wanted.device))
        need = memory_need(checkpoint.config, parameters, dtype, wanted.kv_cache_dtype)
    except Lfm2Error as error:
        why = " ".join(str(error).split())
        return Row(
            name=name, state="damaged", kind=known or "?", disk=disk, revision=revision, problem=why
        )
    return Row(
        name=name,
        state=state if kind else "no frontend",
        kind=kind or "?",
        parameters=parameters,
        disk=disk,
        memory=need,
        dtype=str(dtype).removeprefix("torch."),
        revision=revision,
    )


def _kind(checkpoint: Checkpoint) -> str:
    """Who would load it; "" for nobody."""
    try:
        claims = [frontend.name for frontend in frontends() if frontend.claims(checkpoint)]
    except Exception:  # a stranger's frontend; doctor tells which
        claims = []
    return (
        claims or (["text"] if checkpoint.config.get("model_type") in (DENSE, SPARSE) else [""])
    )[0]


def _print(rows: list[Row]) -> None:
    head = ("MODEL", "STATE", "KIND", "PARAMETERS", "DISK", "MEMORY", "DTYPE")
    cells = [
        (
            row.name + (f"@{row.revision[:8]}" if row.revision else ""),
            row.state,
            row.kind,
            terminal.amount(row.parameters) if row.parameters else "-",
            terminal.size(row.disk) if row.disk else "-",
            terminal.size(row.memory) if row.memory else "-",
            row.dtype or "-",
        )
        for row in rows
    ]
    if terminal.is_terminal(sys.stdout):
        _print_table(head, cells, rows)
    else:
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        for line in (head, *cells):
            text = "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True))
            click.echo(terminal.clean(text.rstrip()))
    for row in rows:
        if row.problem:
            terminal.warn(f"{row.name}: {row.problem}")


def _print_table(head: tuple[str, ...], cells: Sequence[tuple[str, ...]], rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in head:
        right = title in ("PARAMETERS", "DISK", "MEMORY")
        table.add_column(title.lower(), justify="right" if right else "left", no_wrap=True)
    for line, row in zip(cells, rows, strict=True):
        style = {"embedded": "bold", "cached": "bold", "damaged": "red"}.get(row.state, "dim")
        table.add_row(*(escape(terminal.clean(cell)) for cell in line), style=style)
    Console().print(table)
