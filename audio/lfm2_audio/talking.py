"""`lfm2-mm talk`: a spoken conversation, over microphone and loudspeaker or over files.

Knows options, the turn log and the keys; the voice loop does the rest. Imported for `--help`, so
nothing here imports torch before the verb runs.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_audio.opening import load_audio_model, speech_options
from lfm2_mm.cli import terminal
from lfm2_mm.errors import AudioTooLong, InputError

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel
    from lfm2_audio.voice.events import VoiceEvent
    from lfm2_audio.voice.live import Live
    from lfm2_audio.voice.settings import VoiceSettings
    from lfm2_audio.waveform import Audio

__all__ = ["TurnLog", "talk"]


@click.command(short_help="Talk with a model, and interrupt it.")
@speech_options
@click.option("--list-devices", is_flag=True, help="List microphones and loudspeakers, and end.")
@click.option("--input", metavar="DEVICE", help="Microphone, by number or part of its name.")
@click.option("--output", metavar="DEVICE", help="Loudspeaker, by number or part of its name.")
@click.option(
    "--wav-in",
    metavar="FILE",
    help="Hear this recording in simulated real time instead of a microphone.",
)
@click.option("--wav-out", metavar="FILE", help="With --wav-in: write there what is to be heard.")
@click.option("--push-to-talk", is_flag=True, help="Enter begins a turn, Enter ends it.")
@click.option(
    "--echo",
    type=click.Choice(["gate", "half", "off"]),
    default="gate",
    show_default=True,
    help="Open speakers: gate lets only louder voices interrupt, half none; off is for headsets.",
)
@click.option(
    "--vad",
    type=click.Choice(["auto", "silero", "energy"]),
    default="auto",
    show_default=True,
    help="What tells speech from noise.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="How sure of speech it must be.",
)
@click.option(
    "--silence", type=int, default=500, show_default=True, help="Milliseconds that end a turn."
)
@click.option(
    "--prefix", type=int, default=300, show_default=True, help="Milliseconds kept before speech."
)
@click.option(
    "--interrupt-after",
    type=int,
    default=500,
    show_default=True,
    help="Milliseconds of speech that interrupt an answer; less only pauses it.",
)
@click.option("--no-interrupt", is_flag=True, help="Let no speech interrupt an answer.")
@click.option("--idle", type=int, metavar="MS", help="Say so when nobody speaks for so long.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=48.0,
    show_default=True,
    help="Length of an answer at most.",
)
@click.option("--temperature", type=float, help="0 always takes the likeliest sound.")
@click.option("--top-k", type=int, help="Keep so many of the likeliest sounds.")
@click.option("--system", metavar="TEXT", help="Instruction that precedes the conversation.")
def talk(**params: Any) -> None:
    """Talk with a model. Speak while it answers to interrupt it; Ctrl-C ends.

    \b
    lfm2-mm talk
    lfm2-mm talk --wav-in question.wav --wav-out answer.wav
    """  # noqa: D301
    if params["list_devices"]:
        _list(as_json=params["as_json"])
        return
    recording: str | None = params["wav_in"]
    if recording is None and params["wav_out"] is not None:
        raise click.UsageError("--wav-out needs --wav-in: say what is to be heard")
    if recording is not None and (params["input"] or params["output"] or params["push_to_talk"]):
        raise click.UsageError("--wav-in needs no device: leave out --input, --output and the like")
    settings = _settings(params)
    if recording is not None:
        _check_files(recording, params["wav_out"])
        _simulate(recording, settings, params)
    else:
        _converse(settings, params)


def _settings(params: dict[str, Any]) -> VoiceSettings:
    """The options as settings, judged before a model is loaded."""
    from lfm2_audio.voice.echo import EchoSettings
    from lfm2_audio.voice.settings import VoiceSettings
    from lfm2_audio.voice.turns import TurnSettings

    silence, threshold = params["silence"], params["threshold"]
    turns = TurnSettings(
        threshold=threshold,
        release=max(threshold - 0.15, 0.05) if threshold > 0.05 else threshold,
        prefix_ms=params["prefix"],
        silence_ms=silence,
        tail_ms=min(200, max(silence, 0)),
        interrupt_ms=params["interrupt_after"],
        idle_ms=params["idle"],
        interrupt=not params["no_interrupt"],
    )
    return VoiceSettings(
        turns=turns,
        echo=EchoSettings(mode=params["echo"] if params["wav_in"] is None else "off"),
        vad=params["vad"],
        manual=params["push_to_talk"],
    )


def _list(*, as_json: bool) -> None:
    from dataclasses import asdict

    from lfm2_audio.voice.devices import list_devices

    found = list_devices()
    if as_json:
        terminal.print_json([asdict(device) for device in found])
        return
    if not found:
        terminal.say("there are no sound devices; --wav-in and --wav-out need none")
    for device in found:
        click.echo(terminal.clean(device.line()))


def _check_files(recording: str, target: str | None) -> None:
    if recording != "-" and not Path(recording).expanduser().is_file():
        raise InputError(f"there is no recording {recording!r}; correct the path")
    if target is None:
        return
    from lfm2_audio.waveform import check_ending

    if not Path(target).expanduser().absolute().parent.is_dir():
        raise InputError(f"there is no folder for {target!r}; make it, or correct the path")
    check_ending(Path(target).suffix)


def _limited(settings: VoiceSettings, model: AudioModel, seconds: float) -> VoiceSettings:
    """With the length of an answer in frames of this model's."""
    codec = model.codec
    frames = max(1, math.ceil(seconds * codec.rate / codec.samples_per_frame))
    return replace(settings, max_frames=frames)


def _options(params: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "top_k", "seed")
    return {name: params[name] for name in names if params.get(name) is not None}


def _read(recording: str) -> Audio:
    from lfm2_audio.waveform import read_audio

    try:
        return read_audio(recording)
    except AudioTooLong as error:  # its advice is an option that means something else here
        raise AudioTooLong(f"{str(error).rpartition(';')[0]}; cut it into parts") from None


def _simulate(recording: str, settings: VoiceSettings, params: dict[str, Any]) -> None:
    audio = _read(recording)
    model = load_audio_model(params)
    from lfm2_audio.voice.loop import VoiceLoop
    from lfm2_audio.voice.simulate import simulate_file

    settings = _limited(settings, model, params["max_seconds"])
    conversation, options = model.conversation(params["system"]), _options(params)
    loop = VoiceLoop(model, conversation, settings=settings, options=options)
    log = TurnLog(as_json=params["as_json"], quiet=params["quiet"])
    out = simulate_file(loop, audio, params["wav_out"], take=log.take)
    if params["wav_out"] is not None:
        seconds = len(out.heard) / out.rate
        terminal.say(f"{seconds:.1f} s of sound: {params['wav_out']}", quiet=params["quiet"])
    if not log.turns:
        terminal.say("nobody spoke in the recording", quiet=params["quiet"])
    if log.failed:
        raise click.exceptions.Exit(1)


def _converse(settings: VoiceSettings, params: dict[str, Any]) -> None:
    from lfm2_audio.voice.devices import pick
    from lfm2_audio.voice.meter import Meter

    pick(params["input"], "input")  # before a model is loaded
    pick(params["output"], "output")
    model = load_audio_model(params)
    live: Live = model.converse(
        system=params["system"],
        settings=_limited(settings, model, params["max_seconds"]),
        input=params["input"],
        output=params["output"],
        **_options(params),
    )
    loop = live.loop
    meter = Meter(lambda: (loop.hearing.level, loop.state), False if params["quiet"] else None)
    log = TurnLog(as_json=params["as_json"], quiet=params["quiet"], aside=meter.aside)
    try:
        with live, meter:
            if params["push_to_talk"]:
                _keys(live)
                terminal.say("Enter begins a turn and ends it; Ctrl-C ends", quiet=params["quiet"])
            else:
                terminal.say("speak; Ctrl-C ends", quiet=params["quiet"])
            for event in live.events():
                log.take(event)
    except KeyboardInterrupt:  # the way to end it
        terminal.say("", quiet=params["quiet"])
    terminal.say(terminal.count(log.turns, "turn"), quiet=params["quiet"])


def _keys(live: Live) -> None:
    """Enter toggles a turn, on a thread of its own."""

    def read() -> None:
        for _ in sys.stdin:
            live.loop.release() if live.loop.state == "hearing" else live.loop.press()

    threading.Thread(target=read, daemon=True, name="lfm2-keys").start()


class TurnLog:
    """Writes what happens: lines for a person, or each event as JSON.

    Args:
        as_json: Events as JSON, one a line; of sound only how much it was.
        quiet: Nothing but turns and errors.
        aside: Entered while a line is written.

    Attributes:
        turns: Turns of the user's so far.
        failed: Turns that failed.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._as_json, self._quiet, self._aside = as_json, quiet, aside
        self._began = 0
        self.turns = self.failed = 0

    def take(self, event: VoiceEvent) -> None:
        """Write what is to be said of an event."""
        from lfm2_audio.voice import events as say

        self.turns += isinstance(event, say.Committed)
        self.failed += isinstance(event, say.VoiceError)
        if isinstance(event, say.SpeechStarted):
            self._began = event.audio_start_ms
        with self._aside():
            if self._as_json:
                terminal.print_json(_plain(event))
            else:
                self._write(event)

    def _write(self, event: VoiceEvent) -> None:
        from lfm2_audio.voice import events as say
        from lfm2_audio.voice import notes

        if isinstance(event, say.SpeechStopped):
            self._line(event, "you", f"{(event.audio_end_ms - self._began) / 1000:.1f} s of speech")
        elif isinstance(event, say.TranscriptDone):
            self._line(event, "model", " ".join(event.transcript.split()) or "(no words)")
        elif isinstance(event, say.ItemTruncated):
            self._line(event, "cut", f"the answer was heard for {event.audio_end_ms / 1000:.1f} s")
        elif isinstance(event, say.VoiceError):
            terminal.fail(event.message)
        elif isinstance(event, notes.Notice):
            terminal.say(f"note: {event.message}", quiet=self._quiet)
        elif self._quiet:
            return
        elif isinstance(event, notes.OutputPaused):
            self._line(event, "pause", "somebody speaks")
        elif isinstance(event, notes.OutputResumed):
            self._line(event, "go on", "it was nothing")
        elif isinstance(event, say.IdleTimeout):
            self._line(event, "idle", "nobody speaks")
        elif isinstance(event, notes.ContextDropped):
            turns = terminal.count(event.turns, "turn")
            self._line(event, "full", f"the oldest {turns} had to be forgotten")
        elif isinstance(event, notes.TurnLatency):
            self._line(event, "time", event.line())

    def _line(self, event: VoiceEvent, who: str, text: str) -> None:
        click.echo(f"{event.at_ms / 1000:7.2f}  {who:<6} {terminal.clean(text)}")


def _plain(event: VoiceEvent) -> dict[str, Any]:
    from lfm2_audio.voice.events import OutputAudioDelta

    fields = {"at_ms": event.at_ms, **event.to_realtime()}
    if isinstance(event, OutputAudioDelta):
        fields["delta"] = ""
        fields["samples"] = len(event.samples)
    return fields
