"""Realtime conversations with the embedded nano-audio: right answers, beside an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr  # type: ignore[import-untyped]

import lfm2_audio
from lfm2_audio.waveform import read_audio
from lfm2_mm.server import ServerOptions
from tests.server.running import running
from tests.server.test_realtime import RATE, Caller, calling

pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

SAMPLES = Path(lfm2_audio.__file__).parent / "samples"
KNOWN = {
    row["file"].split("-")[1].removesuffix(".wav"): row
    for row in json.loads((SAMPLES / "samples.json").read_text())
    if "answer" in row
}


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with running(ServerOptions(models=("nano-audio",))) as url:
        yield url


def recorded(kind: str, silence: float = 1.0) -> np.ndarray:
    """A recorded question as the socket carries it."""
    samples = read_audio(SAMPLES / KNOWN[kind]["file"]).samples.numpy()
    whole = np.concatenate([soxr.resample(samples, 16000, RATE), np.zeros(int(silence * RATE))])
    return np.asarray((whole * 32767).astype("<i2"))


def onset(kind: str) -> float:
    samples = recorded(kind)
    return float(np.argmax(np.abs(samples) > 0.03 * 32767)) / RATE


def said(caller: Caller) -> str:
    """What the last answer says."""
    return str(caller.until("response.output_audio_transcript.done")["transcript"]).strip()


def test_two_ask_aloud_and_one_interrupts(base: str) -> None:
    """Right answers to both, also to the question that interrupted another answer."""
    heard: dict[str, Any] = {"audio": {"input": {"transcription": {}}}}
    with calling(base, "nano-audio") as patient, calling(base, "nano-audio") as rude:
        for caller in (patient, rude):
            caller.line.session.update(session={"type": "realtime", **heard})
            caller.until("session.updated")
        rude.say(recorded("echo"))
        patient.say(recorded("arithmetic"))
        rude.until("output_audio_buffer.started")
        began = rude.sent_ms + 1000 * onset("capital")
        rude.say(recorded("capital"))
        paused = rude.until("lfm2_mm.output.paused")
        assert 0 < paused["at_ms"] - began <= 200
        cancelled = rude.until("response.done")["response"]
        assert cancelled["status"] == "cancelled"
        assert cancelled["status_details"]["reason"] == "turn_detected"
        words = "".join(one["delta"] for one in rude.of("response.output_audio_transcript.delta"))
        assert KNOWN["echo"]["answer"].startswith(words.strip()) and words.strip()
        assert said(patient) == KNOWN["arithmetic"]["answer"]
        assert patient.until("response.done")["response"]["status"] == "completed"
        assert patient.heard > 0.3 * RATE
        assert said(rude) == KNOWN["capital"]["answer"]
        assert rude.until("response.done")["response"]["status"] == "completed"
        patient.say(recorded("echo"))
        assert said(patient) == KNOWN["echo"]["answer"]
        assert patient.until("response.done")["response"]["status"] == "completed"
        kind = "conversation.item.input_audio_transcription.completed"
        for caller, asked in ((patient, "arithmetic"), (rude, "echo")):
            if not caller.of(kind):
                caller.until(kind)
            assert caller.of(kind)[0]["transcript"] == KNOWN[asked]["text"]
