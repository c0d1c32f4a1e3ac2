"""The verb `bench audio`: options in, report out. Imports nothing heavy until it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from lfm2_mm.cli import terminal

__all__ = ["audio_command"]

Bar = Callable[..., AbstractContextManager[Callable[[int, int], None] | None]]


def audio_command(bar: Bar) -> click.Command:
    """The verb.

    Args:
        bar: Makes a progress bar of a text and `quiet=`.
    """

    @click.command("audio")
    @click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
    @click.option(
        "--shapes",
        type=click.Choice(["1.5b", "tiny"]),
        default="1.5b",
        show_default=True,
        help="Whose shapes the random weights have.",
    )
    @click.option(
        "--quantize",
        type=click.Choice(["none", "int4", "int8"]),
        default="int4",
        show_default=True,
        help="How the weights are packed.",
    )
    @click.option("--dtype", default="auto", show_default=True, help="Format of other weights.")
    @click.option("--frames", type=click.IntRange(min=2), default=48, show_default=True)
    @click.option(
        "--keep",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the random weights for the next run.  [default: none is kept]",
    )
    @click.option(
        "--peer-python",
        metavar="PATH",
        help="Interpreter to run the official package liquid-audio with, in bf16, in turns with "
        "ours; it has torch, transformers, accelerate, einops, safetensors, sentencepiece and "
        "librosa.  [default: ours alone]",
    )
    @click.option(
        "--peer-wheel",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Folder with the unpacked wheel of liquid-audio: pip download --no-deps "
        "--python-version 3.12 --only-binary=:all: liquid-audio==1.3.0, then python -m zipfile "
        "-e WHEEL FOLDER.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    def audio(**params: Any) -> None:
        """Speed of speech: real-time factor, time to first audio, transcription, memory.

        Random weights at the shapes of LFM2.5-Audio-1.5B; prints what the memory of this machine
        allows at best. Wants a quiet machine and, at 4 bits, 4 GB of memory and some minutes.
        Beside liquid-audio it wants 3 GB of disk and 8 GB of memory in all.
        """
        _run(params, bar)

    return audio


def _run(params: dict[str, Any], bar: Bar) -> None:
    from lfm2_evals.bench.audio import Plan, measure
    from lfm2_evals.report import write_files

    names = ["rounds", "threads", "shapes", "quantize", "dtype", "frames", "keep"]
    names += ["peer_python", "peer_wheel"]
    with bar("answers and recordings", quiet=params["quiet"]) as progress:
        result = measure(Plan(**{name: params[name] for name in names}), progress=progress)
    text = result.markdown()
    if params["as_json"]:
        terminal.print_json(result.to_dict())
    else:
        click.echo(text, nl=False)
    if params["out"] is not None:
        content = json.dumps(result.to_dict(), indent=1) + "\n"
        written = {"bench-audio.md": text, "bench-audio.json": content}
        for path in write_files(params["out"], written):
            terminal.say(f"wrote {path}", quiet=params["quiet"])
