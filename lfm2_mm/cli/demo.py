"""`lfm2-mm demo`: what the plugins show on files of their own and on what they draw from a seed.

Prints each question with the answer, the truth and whether they agree, and writes everything that
was looked at. What is asked about, the plugins know.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.cli.options import common_options, kv_cache_option, load_model, model_options
from lfm2_mm.cli.plugins import Answered, installed
from lfm2_mm.errors import InputError

__all__ = ["demo"]


@click.command(short_help="See it work on shipped files and on something drawn just now.")
@common_options
@model_options
@kv_cache_option
@click.option("--seed", type=int, default=1, show_default=True, help="Decides what is drawn.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    metavar="DIR",
    help="Where the pictures and demo.json go.",
)
def demo(**params: Any) -> None:
    """Ask the embedded model questions whose answers are known; exit 1 if an answer is wrong."""
    began = time.perf_counter()
    shows = [show for found in installed() for show in found.demos]
    if not shows:
        raise InputError("no plugin brings a demo; install lfm2-mm with its frontends")
    model = load_model(params)
    folder: Path = params["out"]
    folder.mkdir(parents=True, exist_ok=True)
    answered: list[Answered] = []
    for show in shows:
        for item in show(model, params["seed"], folder):
            if not params["as_json"]:
                _print(item, new=not answered or answered[-1].about != item.about)
            answered.append(item)
    wrong = [item for item in answered if not item.right]
    report = {
        "model": model.name,
        "seed": params["seed"],
        "right": len(answered) - len(wrong),
        "questions": len(answered),
        "seconds": round(time.perf_counter() - began, 2),
        "answers": [asdict(item) for item in answered],
    }
    (folder / "demo.json").write_text(
        json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    if params["as_json"]:
        terminal.print_json(report)
    else:
        click.echo(
            f"\n{report['right']} of {len(answered)} right; pictures and demo.json: {folder}"
        )
    if wrong:
        told = "; ".join(f"{w.question!r} got {w.answer!r}, right is {w.truth!r}" for w in wrong)
        terminal.fail(f"{terminal.count(len(wrong), 'wrong answer')}: {told}")
        raise click.exceptions.Exit(1)


def _print(item: Answered, *, new: bool) -> None:
    if new:
        click.echo(f"\n{terminal.clean(item.about)}")
    verdict = "right" if item.right else f"WRONG, it is {item.truth}"
    answer = " ".join(terminal.clean(item.answer).split())
    click.echo(f"  {item.question}\n    {answer}  ({verdict})")
