"""`lfm2-mm train RECIPE`: run or resume a recipe of a plugin, and export what was learnt.

The recipe itself, its data and its model belong to the plugin; this verb knows folders and steps.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from lfm2_mm import settings
from lfm2_mm.cli import terminal
from lfm2_mm.cli.options import seed_option
from lfm2_mm.cli.plugins import Recipe, installed
from lfm2_mm.errors import InputError

__all__ = ["train"]


@click.command(short_help="Train a model by a recipe, or go on with it.")
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where checkpoints, logs and the model go.  [default: runs/RECIPE]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Length of the whole recipe.")
@click.option("--until", type=click.IntRange(min=1), help="Stop at this step; go on later.")
@click.option(
    "--resume/--fresh", default=True, help="Go on with the folder's checkpoint, or remove it."
)
@click.option("--workers", type=click.IntRange(min=0), default=1, help="Processes that make data.")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where to run.  [default: auto]")
@click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]")
@seed_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="No progress lines.")
def train(recipe: str, **params: Any) -> None:
    """Train by RECIPE and export the model; Ctrl-C keeps a checkpoint to go on from.

    \b
    lfm2-mm train nano-vl --out runs/nano-vl
    """  # noqa: D301
    make = _find(recipe)
    resolved = settings.resolve(device=params["device"], threads=params["threads"])
    settings.apply_threads(resolved)
    folder = params["out"] or Path("runs") / recipe
    made = make(
        folder,
        steps=params["steps"],
        until=params["until"],
        seed=params["seed"],
        device=_device(resolved.device),
        workers=params["workers"],
        fresh=not params["resume"],
        say=lambda text: terminal.say(text, quiet=params["quiet"]),
    )
    if params["as_json"]:
        terminal.print_json({"recipe": recipe, "folder": str(folder), "model": str(made)})
    else:
        click.echo(str(made))


def _find(name: str) -> Recipe:
    known = {key: recipe for found in installed() for key, recipe in found.recipes.items()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(sorted(known)) or "none: no plugin brings one"
    hint = f"did you mean {near[0]}?" if near else f"these exist: {listed}"
    raise InputError(f"there is no recipe {name!r}; {hint}")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
