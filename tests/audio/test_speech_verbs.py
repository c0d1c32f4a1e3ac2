from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf  # type: ignore[import-untyped]
import torch

from lfm2_audio import commands, demo, opening, speaking, subtitles, transcribing
from lfm2_audio.demo import Sample
from lfm2_audio.speaking import text_pieces
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm import loading
from tests.audio import official
from tests.audio.verbs import Run, runner, sentence
from tests.audio.voice_devices import FakeSounddevice

RATE = 16000


class Scripted:
    """Hears how long a piece is, and says a tone of a tenth of a second for each word."""

    name, folder = "scripted", Path("no-such-folder")
    codec = SimpleNamespace(rate=24000)

    def __init__(self) -> None:
        self.heard: list[float] = []
        self.said: list[tuple[str, dict[str, Any]]] = []

    def transcribe(self, source: Audio, **options: Any) -> Any:
        self.heard.append(round(source.duration, 2))
        if len(self.heard) == 99:
            raise KeyboardInterrupt
        words = f"{source.duration:.1f} seconds" if source.samples.abs().max() > 0 else ""
        return SimpleNamespace(text=f"{words} {options.get('language', '')}")

    def speak(self, text: str, *, stream: bool, **options: Any) -> Iterator[Audio]:
        self.said.append((text, options))
        for word in text.split():
            if word == "stop":
                raise KeyboardInterrupt
            if word != "hush":
                yield Audio(torch.full((2400,), 0.25), 24000)

    def reply(self, source: Audio) -> Any:
        return SimpleNamespace(text="It is Paris.", audio=Audio(torch.zeros(4800), 24000))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    made = Scripted()
    for module in (transcribing, speaking):
        monkeypatch.setattr(module, "load_audio_model", lambda params: made)
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(monkeypatch)


def write(path: Path, seconds: float = 1.0, form: str | None = None, rate: int = RATE) -> Path:
    t = np.arange(int(seconds * rate)) / rate
    sf.write(path, 0.4 * np.sin(2 * np.pi * 300 * t), rate, format=form)
    return path


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "soundfile", "sounddevice", "onnxruntime", "rich")
    code = (
        "import sys\n"
        "from lfm2_audio.commands import plugin\n"
        "for verb in plugin.commands:\n"
        "    verb.main(['--help'], standalone_mode=False)\n"
        "list(plugin.demos), dict(plugin.recipes)\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "FILE…" in done.stdout and "--voice" in done.stdout


def test_the_formats_are_those_that_can_be_written() -> None:
    assert set(transcribing.FORMATS) == set(subtitles.FORMATS)


def test_a_recording_becomes_text_on_stdout(run: Run, model: Scripted, tmp_path: Path) -> None:
    result = run("transcribe", write(tmp_path / "a.wav", 1.5))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "1.5 seconds\n", "")


def test_standard_input_is_read(run: Run, model: Scripted, tmp_path: Path) -> None:
    data = write(tmp_path / "a.flac", 2.0).read_bytes()
    result = run("transcribe", "-", "--language", "Deutsch", stdin=data)
    assert result.stdout == "2.0 seconds Deutsch\n"


def test_several_files_are_named(run: Run, model: Scripted, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.wav", 1.0), write(tmp_path / "b.mp3", 2.0, rate=24000)
    result = run("transcribe", a, b)
    assert result.stdout.splitlines()[0] == f"{a}: 1.0 seconds"
    assert result.stdout.splitlines()[1].startswith(f"{b}: 2.")


def test_a_file_that_fails_does_not_stop_the_others(
    run: Run, model: Scripted, tmp_path: Path
) -> None:
    a, b = write(tmp_path / "a.wav"), write(tmp_path / "b.wav")
    (tmp_path / "bad.wav").write_bytes(b"")
    result = run("transcribe", a, tmp_path / "bad.wav", tmp_path / "none.wav", b)
    assert result.exit_code == 1
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == ["1.0 seconds"] * 2
    errors = result.stderr.splitlines()
    assert errors == [
        f"error: '{tmp_path}/bad.wav' is empty (0 bytes); record or download it again",
        f"error: there is no file '{tmp_path}/none.wav'; check the path",
    ]


def test_subtitles_have_times(
    run: Run, model: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_audio.voice import vad

    spans = [(RATE, 2 * RATE), (5 * RATE, 7 * RATE)]
    monkeypatch.setattr(vad, "speech_spans", lambda values: spans)
    path = write(tmp_path / "a.wav", 9.0)
    result = run("transcribe", path, "-o", tmp_path / "a.srt")
    assert (result.exit_code, result.stdout) == (0, "")
    text = (tmp_path / "a.srt").read_text()
    assert text.startswith("1\n00:00:00,800 --> 00:00:02,200\n1.4 seconds\n\n2\n00:00:04,800 -->")
    assert model.heard == [1.4, 2.4]
    shown = run("transcribe", path, "--format", "vtt")
    assert shown.stdout.startswith("WEBVTT\n\n00:00:00.800 --> 00:00:02.200\n1.4 seconds")


def test_several_files_go_into_a_folder(run: Run, model: Scripted, tmp_path: Path) -> None:
    files = [write(tmp_path / name) for name in ("a.wav", "a.flac", "b.wav")]
    out = tmp_path / "out"
    result = run("transcribe", *files, "--format", "txt", "-o", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["a.flac.txt", "a.wav.txt", "b.txt"]
    assert (out / "b.txt").read_text() == "1.0 seconds\n"


def test_json_says_everything(run: Run, model: Scripted, tmp_path: Path) -> None:
    a = write(tmp_path / "a.wav", 1.0)
    result = run("transcribe", a, tmp_path / "none.wav", "--json")
    assert result.exit_code == 1
    good, bad = (json.loads(line) for line in result.stdout.splitlines())
    assert good["file"] == str(a) and good["model"] == "scripted" and good["duration"] == 1.0
    assert set(good) == {"file", "model", "text", "duration", "segments", "seconds"}
    assert bad["error"].startswith("there is no file")
    form = json.loads(run("transcribe", a, "--format", "json").stdout)
    assert set(form) == {"text", "duration", "segments"}


def test_wrong_places_and_usage_are_refused_before_a_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(params: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transcribing, "load_audio_model", load)
    monkeypatch.setattr(speaking, "load_audio_model", load)
    a, b = write(tmp_path / "a.wav"), write(tmp_path / "b.wav")
    assert sentence(run("transcribe", a, "-o", tmp_path / "no" / "a.txt")).startswith(
        "there is no folder for"
    )
    assert "several transcripts need a folder" in sentence(run("transcribe", a, b, "-o", b))
    (tmp_path / "sub").mkdir()
    again = write(tmp_path / "sub" / "a.wav")
    text = sentence(run("transcribe", a, again, "-o", tmp_path / "out"))
    assert text.startswith("two recordings would be written to 'a.wav.txt'")
    assert run("transcribe", a, b, "--format", "srt").exit_code == 2
    assert run("transcribe").exit_code == 2
    assert run("speak", "hello").exit_code == 2
    assert run("speak", "hello", "-o", "-", "--json").exit_code == 2
    assert sentence(run("speak", " ", "-o", tmp_path / "a.wav")).startswith("there is no text")
    assert "written as 'doc'" in sentence(run("speak", "hello", "-o", tmp_path / "a.doc"))
    assert "there is no folder" in sentence(run("speak", "hello", "-o", tmp_path / "x" / "a.wav"))
    assert "no text in UTF-8 (byte 0)" in sentence(
        run("speak", "-", "-o", tmp_path / "a.wav", stdin=b"\xff\xfe")
    )
    long = "word " * 30_000
    assert "over the limit of 100,000" in sentence(run("speak", long, "-o", tmp_path / "a.wav"))


def test_a_limit_can_be_set(run: Run, model: Scripted, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 3.0)
    text = sentence(run("transcribe", path, "--max-seconds", "2"))
    assert text.endswith("raise max_seconds (--max-seconds)")


def test_what_was_heard_before_ctrl_c_is_kept(
    run: Run, model: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_audio.voice import vad

    spans = [(i * 40 * RATE, (i * 40 + 20) * RATE) for i in range(4)]
    monkeypatch.setattr(vad, "speech_spans", lambda values: spans)
    model.heard = [0.0] * 96  # the third piece is the hundredth, and interrupts
    path = write(tmp_path / "long.wav", 160.0)
    result = run("transcribe", path)
    assert result.exit_code == 130
    assert result.stdout == "20.2 seconds 20.4 seconds\n"


def test_a_text_is_said_into_a_file(run: Run, model: Scripted, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    result = run(
        "speak", "good  morning", "-o", out, "--voice", "US female", "--seed", "3", "--top-k", "4"
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"0.2 s of speech: {out}\n"
    assert model.said == [("good morning", {"voice": "US female", "top_k": 4, "seed": 3})]
    audio = read_audio(out)
    assert audio.rate == 24000 and audio.duration == pytest.approx(0.2)
    assert run("speak", "a", "-o", out, "-q").stderr == ""


def test_a_text_from_standard_input_goes_to_standard_output(run: Run, model: Scripted) -> None:
    result = run("speak", "-", "-o", "-", stdin="three little words\n")
    assert result.exit_code == 0
    assert read_audio(io.BytesIO(result.stdout_bytes)).duration == pytest.approx(0.3)


def test_speech_as_json(run: Run, model: Scripted, tmp_path: Path) -> None:
    out = tmp_path / "out.flac"
    value = json.loads(run("speak", "one two", "-o", out, "--json").stdout)
    assert (value["model"], value["text"], value["output"]) == ("scripted", "one two", str(out))
    assert (value["rate"], value["duration"]) == (24000, 0.2)
    assert 0 <= value["first_audio"] <= value["seconds"]


def test_what_was_said_before_ctrl_c_is_kept(run: Run, model: Scripted, tmp_path: Path) -> None:
    result = run("speak", "one two stop three", "-o", tmp_path / "out.wav")
    assert result.exit_code == 130
    assert read_audio(tmp_path / "out.wav").duration == pytest.approx(0.2)


def test_silence_is_a_failure(run: Run, model: Scripted, tmp_path: Path) -> None:
    text = sentence(run("speak", "hush", "-o", tmp_path / "out.wav"))
    assert text == "scripted said nothing to this text; try other words or a --voice"


def test_long_texts_are_said_in_pieces_with_pauses(
    run: Run, model: Scripted, tmp_path: Path
) -> None:
    text = "This sentence has exactly seven words in it. " * 12
    run("speak", text, "-o", tmp_path / "out.wav")
    assert len(model.said) == 3
    seconds = len(text.split()) * 0.1 + 2 * 0.2
    assert read_audio(tmp_path / "out.wav").duration == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "longest", "pieces"),
    [
        ("One. Two! Three?", 100, ["One. Two! Three?"]),
        ("One. Two! Three?", 9, ["One. Two!", "Three?"]),
        ("a b c, d e f g", 6, ["a b c,", "d e f", "g"]),
        ("今日は。明日は？はい", 5, ["今日は。", "明日は？", "はい"]),
        ("unbreakable", 4, ["unbreakable"]),
        ("one\n\ntwo\nthree", 9, ["one", "two three"]),
        ("3.14 is pi. Yes", 11, ["3.14 is pi.", "Yes"]),
    ],
)
def test_texts_are_cut_between_sentences(text: str, longest: int, pieces: list[str]) -> None:
    assert text_pieces(text, longest) == pieces


def pulled(fake: FakeSounddevice, ready: Callable[[], bool]) -> tuple[Thread, list[np.ndarray]]:
    """A loudspeaker that plays once `ready`, until it is closed."""
    heard: list[np.ndarray] = []

    def pump() -> None:
        while not (fake.streams and fake.stream("output").started and ready()):
            sleep(0.002)
        while not fake.stream("output").closed:
            heard.append(fake.stream("output").pull(480))
            sleep(0.0005)

    thread = Thread(target=pump, daemon=True)
    thread.start()
    return thread, heard


def test_speech_is_made_while_it_is_played_and_played_to_its_end(
    run: Run, model: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is played before all is made here: whoever waited to be heard would wait for ever."""
    fake, said = FakeSounddevice(), list[str]()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    speak = model.speak

    def noted(text: str, **options: Any) -> Iterator[Audio]:
        yield from speak(text, **options)
        said.append(text)

    monkeypatch.setattr(model, "speak", noted)
    thread, heard = pulled(fake, lambda: bool(said))
    result = run("speak", "one two three", "--play", "-o", tmp_path / "too.wav")
    thread.join(timeout=20)
    assert result.exit_code == 0, result.output
    assert fake.stream("output").options["samplerate"] == 24000
    sound = np.concatenate(heard)
    assert (sound[:7200] == 0.25).all() and not sound[7200 + 120 :].any()  # but for the fade
    assert read_audio(tmp_path / "too.wav").duration == pytest.approx(0.3)


def test_a_loudspeaker_of_another_rate_plays_too(
    run: Run, model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSounddevice(rates=(48000,))
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    thread, heard = pulled(fake, lambda: True)
    assert run("speak", "one two three", "--play").exit_code == 0
    thread.join(timeout=20)
    assert np.count_nonzero(np.concatenate(heard).round(2) == 0.25) > 13000


def test_no_loudspeaker_is_one_sentence(
    run: Run, model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSounddevice("Microphone")
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(speaking, "load_audio_model", None)  # known before a model is loaded
    text = sentence(run("speak", "one", "--play"))
    assert text == "no loudspeaker was found; write a file with -o"
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert sentence(run("speak", "one", "--play")) == (
        "sounddevice is not installed; run pip install 'lfm2-mm[audio]'"
    )


def test_a_loudspeaker_that_goes_leaves_the_file(
    run: Run, model: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeSounddevice()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)

    def speak(text: str, **options: Any) -> Iterator[Audio]:
        yield Audio(torch.full((2400,), 0.25), 24000)
        fake.pull_out()
        yield Audio(torch.full((2400,), 0.25), 24000)

    monkeypatch.setattr(model, "speak", speak)
    result = run("speak", "one two", "--play", "-o", tmp_path / "rest.wav")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: the loudspeaker 'Built-in Speaker' went away; write a file with -o"
    )
    assert read_audio(tmp_path / "rest.wav").duration == pytest.approx(0.2)


def test_the_default_model_is_the_embedded_one_or_an_audio_model_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert opening._default() == "nano-audio"
    monkeypatch.setenv("LFM2_MM_MODEL", "nano-vl")
    assert opening._default() == "nano-audio"
    monkeypatch.setenv("LFM2_MM_MODEL", "LiquidAI/LFM2.5-Audio-1.5B")
    assert opening._default() == "LiquidAI/LFM2.5-Audio-1.5B"


def test_models_that_are_not_there_or_cannot_hear_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.wav")
    assert "nano-nothing" in sentence(run("transcribe", path, "-m", "nano-nothing"))
    monkeypatch.setattr(loading, "load", lambda name, **flags: SimpleNamespace(name=name))
    text = sentence(run("transcribe", path, "-m", "nano-vl", "-q"))
    assert text.startswith("nano-vl neither hears nor speaks; use an audio model such as")


def test_the_demo_transcribes_and_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    write(folder / "note.wav", 2.0)
    write(folder / "question.wav", 1.0)
    rows = [
        {"file": "note.wav", "text": "2.0 Seconds!"},
        {"file": "question.wav", "text": "What?", "answer": "Paris"},
    ]
    monkeypatch.setattr(demo, "_folder", lambda: folder)
    assert demo.samples() == []
    (folder / "samples.json").write_text(json.dumps(rows))
    assert demo.samples()[1] == Sample(file="question.wav", text="What?", answer="Paris")
    out = tmp_path / "out"
    out.mkdir()
    answers = list(demo.run(1, out, model=Scripted()))  # type: ignore[arg-type]
    assert [a.right for a in answers] == [True, False, True, False]
    assert answers[2].files == ("question-answer.wav",)
    assert answers[3].question == "What is said? (heard by the model itself)"
    assert read_audio(out / "question-answer.wav").duration == pytest.approx(0.2)
    assert "0.2 s of speech in question-answer.wav" in answers[2].answer


def test_the_demo_is_there_when_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "embedded_models", lambda: ())
    assert commands.plugin.demos == ()
    model = SimpleNamespace(name="nano-audio")
    monkeypatch.setattr(commands, "embedded_models", lambda: (model,))
    assert len(commands.plugin.demos) == 1
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert list(commands.plugin.demos[0](None, 1, Path())) == []


def test_a_tiny_checkpoint_transcribes_and_speaks(run: Run, tmp_path: Path) -> None:
    """Random weights: what is said means nothing, but every part of the way is the real one."""
    model = official.folder()
    path = write(tmp_path / "a.flac", 1.2, rate=48000)
    value = json.loads(run("transcribe", path, "-m", model, "--json").stdout)
    assert value["file"] == str(path) and value["model"] == str(model)
    assert value["duration"] == pytest.approx(1.2)
    out = tmp_path / "out.wav"
    options = ["-o", str(out), "-m", str(model), "--seed", "1", "--voice", "uk-male"]
    result = run("speak", "one two", *options, "--max-seconds", "0.4", "--json")
    assert result.exit_code == 0, result.stderr  # these weights do begin to speak
    said = json.loads(result.stdout)
    audio = read_audio(out)
    assert audio.rate == said["rate"] == 24000
    assert 0 < audio.duration == pytest.approx(said["duration"], abs=0.001)
