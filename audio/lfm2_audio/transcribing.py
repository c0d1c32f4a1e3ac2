"""`lfm2-mm transcribe FILE…`: what is said in recordings, as text, subtitles or JSON.

Knows the order of things and what is printed; reading, cutting and hearing are done by others.
Imported for `--help`, so nothing here imports torch before the verb runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_audio.opening import load_audio_model, speech_options
from lfm2_mm.cli import terminal
from lfm2_mm.errors import InputError, Lfm2Error

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel
    from lfm2_audio.segments import Segment

__all__ = ["FORMATS", "transcribe"]

FORMATS = ("txt", "srt", "vtt", "json")
_TIMED = ("srt", "vtt", "json")
_STDIN = "-"

Tick = Callable[[float], None]


@click.command(short_help="Write down what is said in sound files.")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@speech_options
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="What is written.  [default: as the name after -o ends, else txt]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Write there instead of stdout: a file, or for several recordings a folder.",
)
@click.option("--language", metavar="NAME", help="What is spoken, where the model can be told.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0.1),
    metavar="S",
    help="Refuse longer recordings.  [default: 7200]",
)
def transcribe(files: tuple[str, ...], **params: Any) -> None:
    """Write down what is said in sound files; `-` is standard input.

    Reads WAV, FLAC, Ogg, MP3 and what else libsndfile knows, at any rate and with any channels.
    Long recordings are cut at silences. A file that fails is named, the others go on, and the exit
    code is 1.

    \b
    lfm2-mm transcribe talk.mp3
    lfm2-mm transcribe *.wav --format srt -o subtitles
    """  # noqa: D301
    targets = _targets(files, params)
    model = load_audio_model(params)
    failed = 0
    for name, target in zip(files, targets, strict=True):
        try:
            _one(model, name, target, len(files) > 1, params)
        except Lfm2Error as error:
            failed += 1
            text = " ".join(str(error).split())
            terminal.fail(text if len(files) == 1 or name in text else f"{name}: {text}")
            if params["as_json"]:
                terminal.print_json({"file": name, "error": text})
    if failed:
        raise click.exceptions.Exit(1)


def _targets(files: Sequence[str], params: dict[str, Any]) -> list[Path | None]:
    """Where each transcript goes, None for stdout; also settles the format.

    Raises:
        InputError: if two would go to one place, or a place cannot be.
    """
    output: Path | None = params["output"]
    form = params["form"]
    if output is None:
        params["form"] = form or "txt"
        if len(files) > 1 and params["form"] in ("srt", "vtt") and not params["as_json"]:
            raise click.UsageError(f"several files of {form} need a folder; name one with -o")
        return [None] * len(files)
    ending = output.suffix.removeprefix(".").lower()
    if len(files) == 1 and not output.is_dir():
        params["form"] = form or (ending if ending in FORMATS else "txt")
        if not output.absolute().parent.is_dir():
            raise InputError(
                f"there is no folder for {str(output)!r}; make it, or correct the path"
            )
        return [output]
    params["form"] = form = form or "txt"
    if output.exists() and not output.is_dir():
        raise InputError(
            f"{str(output)!r} is a file, but several transcripts need a folder; name one with -o"
        )
    paths = [Path("stdin" if name == _STDIN else name) for name in files]
    stems = Counter(path.stem for path in paths)
    names = [f"{p.stem if stems[p.stem] == 1 else p.name}.{form}" for p in paths]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"two recordings would be written to {twice!r} in {str(output)!r}; transcribe them one "
            "by one"
        )
    output.mkdir(parents=True, exist_ok=True)
    return [output / name for name in names]


def _one(
    model: AudioModel, name: str, target: Path | None, several: bool, params: dict[str, Any]
) -> None:
    """Transcribe one recording; what was heard before Ctrl-C is kept."""
    from lfm2_audio.segments import RATE, Cutting, hear, joined
    from lfm2_audio.subtitles import FORMATS as WRITERS
    from lfm2_audio.waveform import MAX_SECONDS, read_audio

    form: str = params["form"]
    timed = form in _TIMED or params["as_json"]
    options = {} if params["language"] is None else {"language": params["language"]}
    began = time.perf_counter()
    audio = read_audio(name, rate=RATE, max_seconds=params["max_seconds"] or MAX_SECONDS)
    heard: list[Segment] = []

    def put(done: bool) -> None:
        if not done and not heard:
            return
        taken = time.perf_counter() - began
        written = WRITERS[form](heard, audio.duration)
        if target is not None:
            target.write_text(written, encoding="utf-8")
        rows = json.loads(WRITERS["json"](heard, audio.duration))
        if params["as_json"]:
            facts = {"file": name, "model": model.name, **rows, "seconds": round(taken, 3)}
            facts |= {} if target is None else {"output": str(target)}
            terminal.print_json(facts | ({} if done else {"interrupted": True}))
        elif target is None and several:
            line = {"file": name, **rows} if form == "json" else None
            text = (
                f"{name}: {joined(heard)}" if line is None else json.dumps(line, ensure_ascii=False)
            )
            click.echo(_shown(text))
        elif target is None:
            click.echo(_shown(written), nl=False)
        speed = audio.duration / taken if taken else 0.0
        where = "" if target is None else f", in {target}"
        terminal.dim(
            f"{name}: {audio.duration:.1f} s heard in {taken:.1f} s ({speed:.1f} times real time)"
            f"{where}",
            quiet=params["quiet"],
        )

    try:
        with _bar(name, audio.duration, quiet=params["quiet"]) as tick:
            for segment in hear(
                audio,
                lambda piece: model.transcribe(piece, **options).text,
                cutting=Cutting.for_subtitles() if timed else None,
                progress=tick,
            ):
                heard.append(segment)
    except KeyboardInterrupt:
        put(done=False)
        raise
    put(done=True)


def _shown(text: str) -> str:
    """The text as it goes to stdout: on a terminal without what would steer it."""
    return terminal.clean(text) if terminal.is_terminal(sys.stdout) else text


@contextmanager
def _bar(name: str, seconds: float, *, quiet: bool) -> Iterator[Tick | None]:
    """A bar of seconds with the time left, only where a person reads stderr."""
    if quiet or not terminal.is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(terminal.clean(name), total=seconds)
        yield lambda done: bar.update(task, completed=done)
