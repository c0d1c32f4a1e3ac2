"""`lfm2-mm speak TEXT`: a text is said, into a file or to the loudspeaker, as it is made.

Knows the order of things and what is printed; the model speaks. Imported for `--help`, so nothing
here imports torch before the verb runs.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_audio.opening import load_audio_model, speech_options
from lfm2_mm.cli import terminal
from lfm2_mm.errors import DeviceError, InputError

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel
    from lfm2_audio.waveform import Audio

__all__ = ["speak", "text_pieces"]

_STD = "-"
_PIECE = 240  # characters said in one go: about a quarter of a minute
_PAUSE = 0.2  # seconds between two pieces
_LIMIT = 100_000  # characters
_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n{2,}")
_BREATHS = re.compile(r"(?<=[,;:])\s+|(?<=[、，；])|\s+")


@click.command(short_help="Say a text, into a file or to the loudspeaker.")
@click.argument("text")
@speech_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write there, in the format that the name ends with (wav, flac, ogg, mp3); - is stdout.",
)
@click.option("--play", is_flag=True, help="Play it while it is made.")
@click.option("--voice", metavar="NAME", help="Who speaks, in words that the model was taught.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0.1),
    metavar="S",
    help="End a sentence's speech after so long.  [default: 60]",
)
@click.option("--temperature", type=float, help="0 always takes the likeliest sound.")
@click.option("--top-k", type=int, help="Keep so many of the likeliest sounds.")
def speak(text: str, **params: Any) -> None:
    """Say TEXT, or with `-` what stands on standard input.

    \b
    lfm2-mm speak "Good morning!" -o morning.wav
    lfm2-mm speak - --play < letter.txt
    """  # noqa: D301
    output: str | None = params["output"]
    if output is None and not params["play"]:
        raise click.UsageError("say where the speech goes: -o FILE, --play, or both")
    if output == _STD and params["as_json"]:
        raise click.UsageError("-o - and --json both want stdout; leave out one of them")
    words = _text(text)
    if output not in (None, _STD):
        _check_place(Path(str(output)))
    if params["play"]:
        _check_loudspeaker()
    model = load_audio_model(params)
    began = time.perf_counter()
    pieces: list[Audio] = []
    times: list[float] = []  # at which they were there

    def kept() -> Iterator[Audio]:
        for chunk in _said(model, words, params):
            pieces.append(chunk)
            times.append(time.perf_counter() - began)
            yield chunk

    try:
        if params["play"]:
            _play(kept(), model.codec.rate)
        else:
            deque(kept(), maxlen=0)
    finally:  # what was said before Ctrl-C is kept
        if pieces:
            _finish(model, words, pieces, times[0], times[-1], params)
    if not pieces:
        raise InputError(f"{model.name} said nothing to this text; try other words or a --voice")


def _text(given: str) -> str:
    if given == _STD:
        data = sys.stdin.buffer.read(4 * _LIMIT + 1)
        try:
            given = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input is no text in UTF-8 (byte {error.start}); convert it first"
            ) from None
    words = given.strip()
    if not words:
        raise InputError("there is no text to say; give some words")
    if len(words) > _LIMIT:
        raise InputError(
            f"the text has {len(words):,} characters, over the limit of {_LIMIT:,}; say it in parts"
        )
    return words


def _check_place(path: Path) -> None:
    """Refuse a place that cannot be written, before anything is loaded."""
    if not path.expanduser().absolute().parent.is_dir():
        raise InputError(f"there is no folder for {str(path)!r}; make it, or correct the path")
    from lfm2_audio.waveform import check_ending

    check_ending(path.suffix)


def text_pieces(text: str, longest: int = _PIECE) -> list[str]:
    """A text in parts of at most so many characters, cut between sentences, else at commas, words.

    A word longer than that stays whole.
    """
    return _joined(_ENDS.split(text), longest)


def _joined(parts: list[str], longest: int) -> list[str]:
    out: list[str] = []
    for part in (" ".join(part.split()) for part in parts):
        if not part:
            continue
        if len(part) > longest and len(small := _BREATHS.split(part)) > 1:
            out += _joined(small, longest)
        elif out and len(out[-1]) + 1 + len(part) <= longest:
            out[-1] += " " + part
        else:
            out.append(part)
    return out


def _said(model: AudioModel, text: str, params: dict[str, Any]) -> Iterator[Audio]:
    """Sound as it comes, with a short pause between pieces of a long text."""
    import torch

    from lfm2_audio.waveform import Audio

    names = ("voice", "temperature", "top_k", "seed", "max_seconds")
    options = {name: params[name] for name in names if params.get(name) is not None}
    for i, piece in enumerate(text_pieces(text)):
        if i:
            rate = model.codec.rate
            yield Audio(torch.zeros(int(_PAUSE * rate)), rate)
        yield from model.speak(piece, stream=True, **options)


def _finish(
    model: AudioModel,
    text: str,
    pieces: list[Audio],
    first: float,
    taken: float,
    params: dict[str, Any],
) -> None:
    """Write the file and say what came of it."""
    import torch

    from lfm2_audio.waveform import Audio

    whole = Audio(torch.cat([piece.samples for piece in pieces]), pieces[0].rate)
    output = params["output"]
    if output == _STD:
        sys.stdout.buffer.write(whole.to_bytes("wav"))
        sys.stdout.buffer.flush()
    elif output is not None:
        whole.save(output)
    if params["as_json"]:
        terminal.print_json(
            {
                "model": model.name,
                "text": text,
                "output": output,
                "rate": whole.rate,
                "duration": round(whole.duration, 3),
                "first_audio": round(first, 3),
                "seconds": round(taken, 3),
            }
        )
    elif output not in (None, _STD) and not params["quiet"]:
        terminal.say(f"{whole.duration:.1f} s of speech: {output}")
    terminal.dim(
        f"first sound after {first:.2f} s, {taken / whole.duration:.2f} s for each second",
        quiet=params["quiet"],
    )


def _check_loudspeaker() -> None:
    """Refuse to play where nothing can be heard, before anything is loaded."""
    from lfm2_audio.voice.devices import pick

    with _told():
        pick(None, "output")


def _play(chunks: Iterator[Audio], rate: int) -> None:
    """Play chunks while the next ones are made, and return when the last was heard."""
    from lfm2_audio.voice.devices import play

    with _told():
        play((chunk.samples.numpy() for chunk in chunks), rate)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with a device, and what to do about it here."""
    try:
        yield
    except DeviceError as error:
        said = str(error)
        raise DeviceError(f"{said.rpartition(';')[0] or said}; write a file with -o") from None
