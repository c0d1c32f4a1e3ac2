"""Spoken questions: what counts as right, who judges, and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from lfm2_audio.conversation import Conversation
from lfm2_audio.speech import synthesis
from lfm2_audio.speech.questions import answer
from lfm2_audio.speech.sentences import is_held_out
from lfm2_audio.speech.voices import HELD_OUT_VARIANTS, Voice
from lfm2_audio.waveform import Audio
from lfm2_evals import commands, speech_answers
from lfm2_evals.commands import evaluate as verb
from lfm2_evals.speech_answers import (
    ANSWER_TIERS,
    AnswerRun,
    Asked,
    evaluate_answers,
    questions,
)
from lfm2_evals.speech_report import SpeechReport


@dataclass
class Text:
    text: str
    audio: Audio
    conversation: Conversation | None = None


class Knowing:
    """Answers by the length of the question; as judge, hears by the length of the answer."""

    name, dtype = "knowing", torch.float32

    def __init__(self, written: list[str], heard: list[str]) -> None:
        self.written, self.heard = written, heard
        self.asked: list[Conversation] = []

    def reply(self, source: Audio | Conversation, **options: Any) -> Text:
        assert options == {"temperature": 0.0, "max_frames": 120}
        asked = source if isinstance(source, Conversation) else Conversation().user(source)
        self.asked.append(asked)
        question = asked.turns[-1].parts[0]
        assert isinstance(question, Audio)
        i = len(question.samples) - 1000
        text = f" {self.written[i].title()}."
        said = asked.assistant([text, torch.zeros(30, 4)])
        return Text(text, Audio(torch.zeros(2000 + i), 24000), said)

    def transcribe(self, source: Audio) -> Text:
        return Text(self.heard[len(source.samples) - 2000], source)


def asked(*answers: str) -> list[Asked]:
    return [
        Asked(
            text=f"say {right}",
            kind="echo" if i % 2 else "capital",
            answer=right,
            voice="en+f2",
            audio=Audio(torch.zeros(1000 + i), 16000),
        )
        for i, right in enumerate(answers)
    ]


def run_of(written: list[str], heard: list[str], tier: str = "answers") -> AnswerRun:
    model = Knowing(written, heard)
    return evaluate_answers(tier, model, model, asked("forty two", "rome", "c a t", "no"))


def test_right_in_text_and_right_in_speech() -> None:
    run = run_of(["forty two", "oslo", "c a t", "no"], ["forty two", "oslo", "c t", "no"])
    assert run.complete
    assert [one.right for one in run.answered] == [True, False, True, True]
    assert [one.said_right for one in run.answered] == [True, False, False, True]
    assert list(run.words.errors) == [0, 0, 1, 0]  # what was said, right or not
    assert run.words.rate == pytest.approx(1 / 7)
    same = run_of(["to", "rome", "c a t", "know"], ["two", "rome", "c a tea", "no"])
    assert sum(same.words.errors) == 0 and same.answered[2].said_right
    assert run.right.low < 0.75 < run.right.high
    assert run.said_right.low < 0.5 < run.said_right.high


def test_a_question_behind_an_interrupted_answer_has_one_before_it() -> None:
    right = ["forty two", "rome", "c a t", "no"]
    model = Knowing(right, right)
    run = evaluate_answers("again", model, model, asked(*right))
    assert all(one.right for one in run.answered)
    assert [len(one.turns) for one in model.asked] == [1, 3, 3, 3]
    for earlier, later in pairwise(model.asked):
        first, cut, _ = later.turns
        assert first is earlier.turns[-1] and cut.role == "assistant"
        assert cut.n_frames == 12  # of 30, half of which were heard: a whole round


def test_progress_and_interruption() -> None:
    def stop(done: int, total: int) -> None:
        assert total == 2
        raise KeyboardInterrupt

    model = Knowing(["rome", "no"], ["rome", "no"])
    run = evaluate_answers("answers", model, model, asked("rome", "no"), progress=stop)
    assert len(run.answered) == 1 and not run.complete
    assert "Stopped early" in SpeechReport(facts={}, answers=[run]).markdown()


def beep(text: str, voice: Voice) -> NDArray[np.float32]:
    assert voice.variant in HELD_OUT_VARIANTS
    return np.asarray(np.sin(np.arange(4000 + 100 * len(text)) * 0.3) * 0.4, dtype=np.float32)


@pytest.mark.parametrize("tier", list(ANSWER_TIERS))
def test_what_is_asked(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    monkeypatch.setattr(synthesis, "synthesise", beep)
    made = questions(tier, 8)
    assert len({one.text for one in made}) == 8
    for one in made:
        assert answer(one.text) == one.answer and one.audio.rate == 16000
        assert is_held_out(one.text) == (tier == "reworded")


def test_the_report(tmp_path: Path) -> None:
    right = ["forty two", "rome", "c a t", "no"]
    good, bad = run_of(right, right), run_of(["x"] * 4, ["y"] * 4)
    text = SpeechReport(facts={"model": "m"}, answers=[good]).markdown()
    assert "reached (85), reached (15)" in text and "| capital | 2 | 100 | 100 |" in text
    assert "Errors" not in text and "without listening" not in text
    text = SpeechReport(facts={}, answers=[bad]).markdown()
    assert "missed (85), missed (15)" in text
    assert "## Errors: Spoken questions, held-out voices" in text
    report = SpeechReport(facts={}, answers=[good, run_of(right, right, "reworded")])
    data = json.loads(report.write(tmp_path, "speech")[1].read_text())
    assert data["answers"]["reworded"]["said_right"] == 1.0
    assert data["answers"]["answers"]["said"]["wer"] == 0.0 and data["sets"] == {}


def test_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ["rome", "no", "oslo"]
    model = Knowing(right, right)
    monkeypatch.setattr(speech_answers, "questions", lambda tier, count: asked(*right[:count]))
    monkeypatch.setattr("lfm2_audio.opening.load_audio_model", lambda params: model)
    monkeypatch.setattr(commands, "_judge", lambda: model)
    arguments = ["speech", "--tier", "answers", "--count", "3", "-q"]
    result = CliRunner().invoke(verb, arguments)
    assert result.exit_code == 0, result.output
    assert "Spoken questions, held-out voices | 3 | 100.0" in result.output
