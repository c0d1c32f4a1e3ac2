from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_mm
from lfm2_audio import talking
from lfm2_audio.model import AudioModel
from lfm2_audio.voice import events as say
from lfm2_audio.voice import notes
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.meter import Meter, bar
from lfm2_audio.voice.script import Script
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.simulate import simulate
from lfm2_audio.waveform import Audio, read_audio
from tests.audio import official
from tests.audio.verbs import Run, runner, sentence
from tests.audio.voice_devices import FakeSounddevice
from tests.audio.voice_fakes import FakeModel, Talk, clip, spoken


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(monkeypatch)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """A scripted model behind the verb."""
    model: Any = FakeModel(spoken(14))
    model.conversation = lambda system: Talk()

    def converse(**options: Any) -> Any:
        from lfm2_audio.voice.live import converse

        del options["system"]
        return converse(model, Talk(), **options)

    model.converse = converse
    monkeypatch.setattr(talking, "load_audio_model", lambda params: model)
    made: FakeModel = model
    return made


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    script = Script().wait(0.5).say(clip("question")).wait(1.5)
    path = tmp_path / "in.wav"
    Audio(torch.from_numpy(script.samples()), 16000).save(path)
    return path


# ---- over files ----


def test_a_recording_is_answered(
    run: Run, scripted: FakeModel, recording: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.wav"
    result = run("talk", "--wav-in", recording, "--wav-out", out, "--top-k", "4", "--seed", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [re.sub(r" +", " ", line).split()[1] for line in lines] == ["you", "model", "time"]
    assert re.search(r"you +2\.\d s of speech", lines[0])
    assert re.search(r"time +vad 512 ms · encode 10 ms", lines[2])
    assert scripted.options == {"top_k": 4, "seed": 3, "max_frames": 600}
    heard = read_audio(out)
    assert heard.rate == 24000
    assert heard.duration > 3.5 and heard.samples.any()
    assert f"s of sound: {out}" in result.stderr


def test_every_event_as_json(run: Run, scripted: FakeModel, recording: Path) -> None:
    result = run("talk", "--wav-in", recording, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    types = [row["type"] for row in rows]
    assert types.index("input_audio_buffer.speech_started") < types.index("response.created")
    assert types[-1] == "lfm2_mm.turn.latency"
    sound = [row for row in rows if row["type"] == "response.output_audio.delta"]
    assert sum(row["samples"] for row in sound) == 14 * 1920
    assert all(row["delta"] == "" for row in sound)
    assert [row["at_ms"] for row in rows] == sorted(row["at_ms"] for row in rows)


def test_a_silent_recording(run: Run, scripted: FakeModel, tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    Audio(torch.zeros(16000), 16000).save(path)
    result = run("talk", "--wav-in", path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nobody spoke in the recording" in result.stderr


def test_a_turn_that_fails_is_a_failure(run: Run, scripted: FakeModel, recording: Path) -> None:
    scripted.script = spoken(5, fail_at=0)
    result = run("talk", "--wav-in", recording, "-q")
    assert result.exit_code == 1
    told = "error: the turn failed (RuntimeError: the model fell over); say it again"
    assert told in result.stderr.splitlines()


def test_ctrl_c_keeps_what_was_heard(
    run: Run, scripted: FakeModel, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.wav"

    def interrupt(self: Any, event: Any) -> None:
        if isinstance(event, say.OutputStarted):
            raise KeyboardInterrupt

    monkeypatch.setattr(talking.TurnLog, "take", interrupt)
    result = run("talk", "--wav-in", recording, "--wav-out", out)
    assert result.exit_code != 0
    assert 2.0 < read_audio(out).duration < 4.0


def test_the_real_thing_with_random_weights(tmp_path: Path, recording: Path, run: Run) -> None:
    """What is said means nothing, but every part of the way is the real one."""
    out = tmp_path / "out.wav"
    result = run(
        *("talk", "-m", official.folder(), "--wav-in", recording, "--wav-out", out),
        *("--seed", "1", "--json", "--max-seconds", "0.5"),
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    (line,) = [row for row in rows if row["type"] == "lfm2_mm.turn.latency"]
    assert line["cached"] == line["positions"] - 1  # computed during the silence
    assert read_audio(out).duration >= 3.7


def test_two_turns_and_an_interruption_with_random_weights() -> None:
    model = lfm2_mm.load(official.folder(), threads=1, dtype="float32")
    assert isinstance(model, AudioModel)
    loop = VoiceLoop(
        model,
        model.conversation(),
        settings=VoiceSettings(max_frames=24),
        options={"seed": 1, "temperature": 1.0},
    )
    script = Script().wait(0.5).say(clip("question")).wait(1.6).say(clip("stop")).wait(1)
    sim = simulate(loop, script.samples(), cost=lambda _: 0.005)
    said: Any = loop.conversation
    assert [turn.role for turn in said.turns] == ["user", "assistant", "user", "assistant"]
    (cut,) = sim.of(say.ItemTruncated)
    assert isinstance(cut, say.ItemTruncated)
    heard = cut.audio_end_ms // 80
    assert heard - 12 < said.turns[1].n_frames <= heard
    ahead = [event for event in sim.of(notes.Warmed) if isinstance(event, notes.Warmed)]
    assert ahead[0].computed == ahead[0].positions  # the system prompt
    for event in ahead[1:]:  # what was said before is never computed again
        assert event.computed < 70 < event.positions
    assert sim.of(say.VoiceError) == []


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--wav-out", "a.wav"), "--wav-out needs --wav-in"),
        (("--wav-in", "a.wav", "--input", "1"), "--wav-in needs no device"),
        (("--threshold", "1.5"), "1.5 is not in the range 0<x<1"),
    ],
)
def test_options_that_do_not_fit(run: Run, options: tuple[str, ...], said: str) -> None:
    result = run("talk", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_files_are_looked_at_before_a_model_is_loaded(run: Run, recording: Path) -> None:
    assert sentence(run("talk", "--wav-in", "nowhere.wav")) == (
        "there is no recording 'nowhere.wav'; correct the path"
    )
    out = "nowhere/out.wav"
    assert "there is no folder for 'nowhere/out.wav'" in sentence(
        run("talk", "--wav-in", recording, "--wav-out", out)
    )


def test_settings_are_judged_before_a_model_is_loaded(run: Run, recording: Path) -> None:
    assert sentence(run("talk", "--wav-in", recording, "--silence", "-5")) == (
        "silence_ms is -5; it must not be negative"
    )


# ---- over devices ----


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> FakeSounddevice:
    fake = FakeSounddevice()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def test_devices_are_listed(run: Run, sound: FakeSounddevice) -> None:
    result = run("talk", "--list-devices")
    assert result.stdout.splitlines()[2] == "  2  USB Headset (in, out, 48000 Hz)"
    rows = json.loads(run("talk", "--list-devices", "--json").stdout)
    assert rows[0]["default"] == ["input"]


def test_no_devices_are_listed_as_none(run: Run, sound: FakeSounddevice) -> None:
    sound.names = ()
    result = run("talk", "--list-devices")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "there are no sound devices; --wav-in and --wav-out need none" in result.stderr


def test_no_microphone_is_one_sentence(run: Run, sound: FakeSounddevice) -> None:
    sound.names = ("Speaker",)
    assert sentence(run("talk")).startswith("no microphone was found; plug one in, or use files")


def test_a_live_talk_until_the_device_goes(
    run: Run, scripted: FakeModel, sound: FakeSounddevice
) -> None:
    def play() -> None:
        while len(sound.streams) < 2 or not sound.stream("input").started:
            threading.Event().wait(0.005)
        samples = np.concatenate([clip("question"), np.zeros(40000, dtype=np.float32)])
        for at in range(0, len(samples), 512):
            sound.stream("input").feed(samples[at : at + 512])
            sound.stream("output").pull(768)
            threading.Event().wait(0.002)
        for _ in range(2000):
            sound.stream("output").pull(768)
            sound.stream("input").feed(np.zeros(512, dtype=np.float32))
            threading.Event().wait(0.002)
            if len(scripted.handles) and scripted.asked:
                break
        sound.pull_out()

    thread = threading.Thread(target=play)
    thread.start()
    result = run("talk", "--echo", "off")
    thread.join()
    assert result.exit_code == 1
    assert "s of speech" in result.stdout
    assert "went away; plug it in again, or choose another with --list-devices" in result.stderr


# ---- what is shown ----


def test_a_bar() -> None:
    assert bar(-60, 4) == "    "
    assert bar(0, 4) == bar(9, 4) == "████"
    assert bar(-30, 4) == "██  "
    assert bar(-60 + 60 / 32, 4) == "▏   "


def test_a_meter_draws_only_where_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(lambda: (-20.0, "listening")) as meter:
        assert not meter.shown
    assert capsys.readouterr().err == ""
    with Meter(lambda: (-20.0, "hearing"), shown=True) as meter:
        meter.draw()
        with meter.aside():
            pass
    drawn = capsys.readouterr().err
    assert "you speak" in drawn and "-20 dB" in drawn
    assert drawn.endswith("\r\x1b[K")


LINES: list[tuple[say.VoiceEvent, str]] = [
    (say.ItemTruncated(item_id="a", audio_end_ms=1840, at_ms=2000), "   2.00  cut    the answer"),
    (notes.OutputPaused(response_id="r", heard_ms=1), "   0.00  pause  somebody speaks"),
    (notes.OutputResumed(response_id="r"), "   0.00  go on  it was nothing"),
    (say.IdleTimeout(audio_start_ms=0, audio_end_ms=9, item_id="a"), "   0.00  idle   nobody"),
    (
        notes.ContextDropped(turns=4, positions_before=9, positions_after=3),
        "   0.00  full   the oldest 4 turns had to be forgotten",
    ),
]


@pytest.mark.parametrize(("event", "line"), LINES, ids=lambda one: getattr(one, "type", ""))
def test_the_turn_log(event: say.VoiceEvent, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    talking.TurnLog().take(event)
    assert capsys.readouterr().out.startswith(line)


def test_what_a_model_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    event = say.TranscriptDone(response_id="r", item_id="i", transcript="\x1b[31mred\a")
    talking.TurnLog().take(event)
    assert capsys.readouterr().out == "   0.00  model  [31mred\n"


def test_notices_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    talking.TurnLog().take(notes.Notice(message="loudness decides"))
    assert capsys.readouterr().err == "note: loudness decides\n"
    talking.TurnLog(quiet=True).take(notes.OutputPaused(response_id="r", heard_ms=1))
    assert capsys.readouterr() == ("", "")
