from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from lfm2_audio.voice import events, notes
from lfm2_audio.voice.events import VoiceEvent, assistant_item, pcm16, user_item
from lfm2_audio.voice.notes import TurnLatency

READS: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)

OUT: dict[str, Any] = {"response_id": "resp_1", "item_id": "item_2"}
SAID = assistant_item("item_2", "completed", "Paris.")

EVENTS: list[VoiceEvent] = [
    events.SpeechStarted(audio_start_ms=10, item_id="item_1"),
    events.SpeechStopped(audio_end_ms=900, item_id="item_1"),
    events.Committed(item_id="item_1"),
    events.Committed(item_id="item_1", previous_item_id="item_0"),
    events.IdleTimeout(audio_start_ms=0, audio_end_ms=5000, item_id="item_1"),
    events.ItemAdded(item=user_item("item_1")),
    events.ItemAdded(item=user_item("item_1", text="Hello"), previous_item_id="item_0"),
    events.ItemDone(item=SAID),
    events.ItemTruncated(item_id="item_2", audio_end_ms=1840),
    events.ResponseCreated(response_id="resp_1"),
    events.ResponseDone(response_id="resp_1", status="completed", item=SAID, usage=(40, 30, 12)),
    events.ResponseDone(response_id="resp_1", status="cancelled", reason="turn_detected"),
    events.ResponseDone(response_id="resp_1", status="incomplete", reason="max_output_tokens"),
    events.ResponseDone(response_id="resp_1", status="failed", message="it fell over"),
    events.OutputItemAdded(response_id="resp_1", item=assistant_item("item_2", "in_progress")),
    events.OutputItemDone(response_id="resp_1", item=assistant_item("item_2", "cancelled", "Pa")),
    events.ContentPartAdded(**OUT),
    events.ContentPartDone(**OUT, transcript="Paris."),
    events.TranscriptDelta(**OUT, delta="Pa"),
    events.TranscriptDone(**OUT, transcript="Paris."),
    events.OutputAudioDelta(**OUT, samples=np.zeros(3, dtype=np.float32), rate=24000),
    events.OutputAudioDone(**OUT),
    events.OutputStarted(response_id="resp_1"),
    events.OutputStopped(response_id="resp_1"),
    events.OutputCleared(response_id="resp_1"),
    events.VoiceError(message="it fell over"),
    events.VoiceError(message="no sound", kind="invalid_request_error", code="bad_audio"),
]

OURS: list[VoiceEvent] = [
    notes.OutputPaused(response_id="resp_1", heard_ms=700),
    notes.OutputResumed(response_id="resp_1"),
    notes.TurnDismissed(audio_start_ms=600),
    notes.Warmed(positions=40, computed=3),
    notes.ContextDropped(turns=4, positions_before=900, positions_after=400),
    notes.Notice(message="loudness decides"),
    TurnLatency(response_id="resp_1", vad_ms=500.0, frames=3),
]


def every(base: type[VoiceEvent]) -> set[type[VoiceEvent]]:
    found = set(base.__subclasses__())
    return found | {deep for one in found for deep in every(one)}


def test_every_event_is_tried_here() -> None:
    tried = {type(event) for event in EVENTS + OURS}
    # a server has further ones of its own
    ours = {one for one in every(VoiceEvent) if one.__module__.startswith("lfm2_audio.voice.")}
    assert {one for one in ours if hasattr(one, "type")} == tried
    assert {one.__name__ for one in tried} <= set(events.__all__) | set(notes.__all__)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_openais_client_reads_it_without_a_rest(event: VoiceEvent) -> None:
    plain = json.loads(json.dumps({**event.to_realtime(), "event_id": "event_1"}))
    read = READS.validate_python(plain, strict=True)
    assert read.type == event.type
    assert read.model_extra == {}
    assert read.to_dict(exclude_unset=True) == plain


@pytest.mark.parametrize("event", OURS, ids=lambda event: event.type)
def test_ours_are_told_apart(event: VoiceEvent) -> None:
    assert event.to_realtime()["type"].startswith("lfm2_mm.")
    assert json.dumps(event.to_realtime())


def test_a_failed_answer_says_so() -> None:
    read = READS.validate_python(EVENTS[13].to_realtime())
    assert read.response.status_details.type == "failed"
    assert read.response.status_details.error.message == "it fell over"


def test_usage_adds_up() -> None:
    usage = READS.validate_python(EVENTS[10].to_realtime()).response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (40, 12, 52)
    assert usage.input_token_details.cached_tokens == 30


def test_sound_travels_as_16_bit_integers() -> None:
    loud = np.array([0.0, 0.5, -0.5, 2.0, -np.inf, np.nan], dtype=np.float32)
    assert np.frombuffer(pcm16(loud), "<i2").tolist() == [0, 16383, -16383, 32767, -32767, 0]
    event = events.OutputAudioDelta(**OUT, samples=loud, rate=24000)
    assert base64.b64decode(event.to_realtime()["delta"]) == pcm16(loud)


def test_a_latency_line_names_what_is_known() -> None:
    line = TurnLatency(
        response_id="resp_1",
        vad_ms=512.0,
        encode_ms=20.4,
        prefill_ms=30.0,
        first_token_ms=61.0,
        first_audio_ms=90.0,
        heard_ms=700.0,
        cached=30,
        positions=40,
        frames=25,
        real_time=0.5,
        gaps_ms=80.0,
    ).line()
    assert line == (
        "vad 512 ms · encode 20 ms · prefill 30 ms · first token 61 ms · first audio 90 ms · "
        "heard 700 ms · 30 of 40 positions cached · real time x0.50 · gaps 80 ms"
    )
    assert TurnLatency(response_id="resp_1", vad_ms=500.0).line() == "vad 500 ms"
