"""`lfm2-mm quantize MODEL -o FOLDER`: pack a model's weights once, for every later load.

Knows options and the order of things; how weights are rounded, `lfm2_mm.quantize` knows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lfm2_mm import settings
from lfm2_mm.cli import terminal
from lfm2_mm.errors import InputError

__all__ = ["quantize"]


@click.command(short_help="Pack a model's weights into 4 or 8 bits, for speed on a CPU.")
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where the packed model goes: a new folder, or an older checkpoint.",
)
@click.option(
    "--scheme",
    type=click.Choice(["int4", "int8"]),
    default="int4",
    show_default=True,
    help="int4: 4 bits, the head and encoders 8; int8: all 8.",
)
@click.option(
    "--calibrate",
    metavar="own|none|FILE",
    default="none",
    show_default=True,
    help="Text that shows what counts: the model's own, none, or a file's lines.",
)
@click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
def quantize(model: str, **params: Any) -> None:
    """Write a packed copy of MODEL, which loads at once and runs faster on a CPU.

    MODEL is an embedded name, a folder, a GGUF file or a Hub id. With --calibrate the rounding
    errors of 4 bits are made up for, which takes some minutes and is worth it for text.

    \b
    lfm2-mm quantize LiquidAI/LFM2.5-350M -o lfm2.5-350m-int4
    lfm2-mm chat -m ./lfm2.5-350m-int4
    """  # noqa: D301
    from lfm2_mm.saving import check_target

    out: Path = params["out"]
    check_target(out)
    resolved = settings.resolve(threads=params["threads"])
    began = time.perf_counter()
    with _told(f"packing {model}", quiet=params["quiet"]) as told:
        loaded = _load(model, params["scheme"], params["calibrate"], resolved.threads, told)
        if not hasattr(loaded, "save"):
            raise InputError(f"{model} cannot be written; name a model that lfm2-mm trains or runs")
        loaded.save(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    seconds = time.perf_counter() - began
    if params["as_json"]:
        terminal.print_json(
            {
                "model": model,
                "scheme": params["scheme"],
                "folder": str(out),
                "bytes": size,
                "seconds": round(seconds, 3),
            }
        )
        return
    terminal.say(f"{terminal.size(size)} in {seconds:.0f} s", quiet=params["quiet"])
    click.echo(str(out))


def _load(name: str, scheme: str, calibrate: str, threads: int, told: Callable[[str], None]) -> Any:
    from lfm2_mm.loading import load
    from lfm2_mm.model import Model
    from lfm2_mm.quantize.calibration import own_words, pack_model
    from lfm2_mm.quantize.recipes import recipe

    if calibrate == "none":
        return load(name, device="cpu", threads=threads, quantize=scheme, progress=told)
    lines = None if calibrate == "own" else _lines(Path(calibrate))
    loaded = load(name, device="cpu", threads=threads, quantize="none")
    if not isinstance(loaded, Model):
        raise InputError(
            f"{name} writes no text, so it cannot be calibrated; leave --calibrate out"
        )
    if lines is None:
        texts = own_words(loaded)
    else:
        start = [i for i in [loaded.backbone.config.bos_id] if i is not None]
        limit = loaded.backbone.config.max_positions
        texts = [(start + loaded.tokenizer.encode(line))[:limit] for line in lines]
    pack_model(loaded, recipe(scheme).reporting(told), texts)
    return loaded


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise InputError(
            f"the text {str(path)!r} cannot be read ({why}); name a file of lines, own or none"
        ) from None
    if not found:
        raise InputError(f"the text {str(path)!r} is empty; name a file of lines, own or none")
    return found


@contextmanager
def _told(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows what was packed last, only where a person reads it."""
    if quiet or not terminal.is_terminal(sys.stderr):
        yield lambda name: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(text) as status:
        yield lambda name: status.update(f"{text}: {name}")
