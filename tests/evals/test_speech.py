"""The task `speech`: words heard wrongly, and what is left for one who does not listen."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from lfm2_audio.speech import synthesis
from lfm2_audio.speech.voices import Voice
from lfm2_audio.waveform import Audio
from lfm2_evals import commands, speech
from lfm2_evals.commands import evaluate as verb
from lfm2_evals.speech import FLOOR, TIERS, Run, evaluate, plain, utterances
from lfm2_evals.speech_report import SpeechReport
from lfm2_evals.stats import ratio_bootstrap
from lfm2_mm.errors import MissingExtra


@dataclass
class Answer:
    text: str


class Knowing:
    """Knows what is said by the length of the sound."""

    name, dtype = "knowing", torch.float32

    def __init__(self, known: dict[int, str]) -> None:
        self.known = known

    def transcribe(self, source: Any) -> Answer:
        return Answer(self.known[len(source.samples)])


def spoken(*texts: str) -> list[tuple[str, str, Audio]]:
    return [(text, "en+f2", Audio(torch.zeros(1000 + i), 16000)) for i, text in enumerate(texts)]


def run_of(said: list[str], found: list[str], tier: str = "voices") -> Run:
    known = {1000 + i: text for i, text in enumerate(found)}
    return evaluate(tier, Knowing(known), spoken(*said))


def test_word_errors_of_a_set() -> None:
    run = run_of(["turn on the light", "what is two"], ["Turn on the light.", "what was two too"])
    assert run.complete
    assert run.score.errors == [0, 2]
    assert run.score.words == [4, 3]
    assert run.score.rate == pytest.approx(2 / 7)
    assert run.score.interval.low <= 2 / 7 <= run.score.interval.high


def test_a_model_that_writes_nothing() -> None:
    run = run_of(["one two", "three"], ["", ""])
    assert run.score.rate == 1.0


def test_one_who_does_not_listen() -> None:
    texts = ["one two", "three four", "five six", "seven eight"]
    run = run_of(texts, texts)
    assert run.score.rate == 0.0
    assert run.deaf.rate == 1.0


def test_plain_words() -> None:
    assert plain(" It's  TWO-fold, über! ") == "it's two fold über"


def test_progress_and_interruption() -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    texts = ["a b", "c d", "e f"]
    model = Knowing({1000 + i: text for i, text in enumerate(texts)})
    run = evaluate("both", model, spoken(*texts), progress=stop)
    assert seen == [(1, 3), (2, 3)]
    assert len(run.heard) == 2 and not run.complete


def test_the_report(tmp_path: Path) -> None:
    texts = [f"say word {i}" for i in range(10)]
    wrong = ["say | word", *texts[1:]]
    report = SpeechReport(facts={"model": "m"}, runs=[run_of(texts, wrong), run_of(texts, texts)])
    text = report.markdown()
    assert "3.3 | " in text and "reached (10)" in text
    assert "Errors: Held-out voices" in text
    paths = report.write(tmp_path, "speech")
    assert [path.name for path in paths] == ["speech.md", "speech.json"]
    data = json.loads(paths[1].read_text())
    assert data["sets"]["voices"]["score"]["errors"] == 0  # the later of the two runs
    assert data["sets"]["voices"]["complete"]


def test_a_missed_floor_is_said() -> None:
    tier, most = FLOOR
    run = run_of(["one two three"], ["one"], tier)
    assert run.score.rate > most
    assert "missed (10)" in SpeechReport(facts={}, runs=[run]).markdown()


def test_ratio_bootstrap() -> None:
    found = ratio_bootstrap([0, 1] * 50, [2] * 100)
    assert 0.15 < found.low < 0.25 < found.high < 0.35
    assert str(ratio_bootstrap([], [])) == "0.0 to 100.0"
    assert ratio_bootstrap([1, 1], [1, 1]) == ratio_bootstrap([1, 1], [1, 1], seed=4)


def beep(text: str, voice: Voice) -> NDArray[np.float32]:
    made = np.sin(np.arange(4000 + 100 * len(text)) * 0.3) * 0.4
    return np.asarray(made, dtype=np.float32)


def test_what_is_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "synthesise", beep)
    made = utterances("voices", 5)
    assert len(made) == 5
    for text, voice, audio in made:
        assert text == plain(text) and "+" in voice
        assert audio.rate == 16000 and audio.duration > 0.2


def test_what_a_model_reads_aloud() -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []

    class Reader:
        name = "reader"

        def speak(self, text: str, **params: Any) -> Audio:
            assert params == {"temperature": 0.0, "max_seconds": 10}
            said.append(text)
            return Audio(torch.zeros(24000), 24000)

    made = speech.aloud(Reader(), 3, progress=lambda i, n: seen.append((i, n)))  # type: ignore[arg-type]
    assert [text for text, _, _ in made] == said and len(set(said)) == 3
    assert {voice for _, voice, _ in made} == {"reader"}
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_without_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "PROGRAM", "no-such-espeak")
    with pytest.raises(MissingExtra, match="made by the program no-such-espeak"):
        utterances("voices", 1)


def test_without_jiwer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtra, match="the package jiwer is needed to count word errors"):
        _ = run_of(["a"], ["a"]).score


def test_all_sets_without_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["turn on the light", "open the door"]
    monkeypatch.setattr(speech, "utterances", lambda tier, count: spoken(*texts[:count]))
    monkeypatch.setattr(speech, "aloud", lambda model, count: spoken(*texts[:count]))
    monkeypatch.setattr(commands, "_has_judge", lambda: False)
    model = Knowing({1000 + i: text for i, text in enumerate(texts)})
    monkeypatch.setattr("lfm2_audio.opening.load_audio_model", lambda params: model)
    result = CliRunner().invoke(verb, ["speech", "--tier", "all", "--count", "2", "-q"])
    assert result.exit_code == 0, result.output
    assert TIERS["aloud"] in result.output and TIERS["judged"] not in result.output


def test_the_verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = ["turn on the light", "open the door", "what is two", "say cat"]
    monkeypatch.setattr(speech, "utterances", lambda tier, count: spoken(*texts[:count]))
    monkeypatch.setattr(speech, "aloud", lambda model, count: spoken(*texts[:count]))
    model = Knowing({1000 + i: text for i, text in enumerate(texts)})
    monkeypatch.setattr(commands, "_judge", lambda: model)
    monkeypatch.setattr("lfm2_audio.opening.load_audio_model", lambda params: model)
    tiers = [part for tier in TIERS for part in ("--tier", tier)]
    arguments = ["speech", *tiers, "--count", "4", "--out", str(tmp_path), "-q"]
    result = CliRunner().invoke(verb, arguments)
    assert result.exit_code == 0, result.output
    for title in TIERS.values():
        assert title in result.output
    assert (
        json.loads((tmp_path / "speech.json").read_text())["facts"]["model"] == "knowing (float32)"
    )
