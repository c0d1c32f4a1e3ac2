"""Transcription, speech and spoken chat through the real OpenAI client, on random tiny weights."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import soundfile as sf  # type: ignore[import-untyped]
import torch

from lfm2_audio.model import AudioModel
from lfm2_audio.serving.encoding import Encoder
from lfm2_audio.waveform import Audio
from lfm2_mm.server import Limits, ServerOptions
from tests.audio import speaking
from tests.audio.voice_fakes import clip
from tests.server.running import running

SECOND = speaking.recording("route", 8000).to_bytes("wav")
LONG = Audio(torch.from_numpy(np.tile(clip("question"), 20)[: 16000 * 34]), 16000).to_bytes("flac")
MODEL = speaking.model()


def _short(conversation: Any, speech: Any, steps: int, began: float | None = None) -> Any:
    """Random weights never come to an end of themselves."""
    return AudioModel._run(MODEL, conversation, speech, min(steps, 24), began)


setattr(MODEL, "_run", _short)  # noqa: B010


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    limits = Limits(max_tokens=64, audio_bytes=2 << 20, audio_seconds=60)
    with running(ServerOptions(models=("tiny",), limits=limits), load=lambda name: MODEL) as url:
        yield url


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as made:
        yield made


def transcribe(client: openai.OpenAI, content: bytes = SECOND, **options: Any) -> Any:
    return client.audio.transcriptions.create(model="tiny", file=("speech.wav", content), **options)


def test_what_the_model_does_is_listed(client: openai.OpenAI) -> None:
    (row,) = client.models.list().data
    abilities = row.to_dict()["abilities"]
    assert abilities == ["chat", "audio", "transcription", "speech", "realtime"]


# --- transcriptions ----------------------------------------------------------------------------


def test_a_transcript_is_that_of_the_model(client: openai.OpenAI) -> None:
    wanted = MODEL.transcribe(SECOND)
    assert wanted.text
    found = transcribe(client)
    assert found.text == wanted.text
    assert found.usage.input_tokens == wanted.done.usage.prompt_tokens
    assert transcribe(client, response_format="text").strip() == wanted.text
    assert transcribe(client, language="en", temperature=0.0).text == wanted.text


def test_a_stream_tells_the_same_text(client: openai.OpenAI) -> None:
    wanted = transcribe(client).text
    events = list(transcribe(client, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == wanted
    assert len(deltas) > 1 and "".join(deltas).split()[0] == wanted.split()[0]


def test_a_long_recording_goes_piece_by_piece(client: openai.OpenAI, base: str) -> None:
    before = _requests(base)
    found = client.audio.transcriptions.create(
        model="tiny", file=("long.flac", LONG), response_format="verbose_json"
    )
    assert found.duration == pytest.approx(34.0)
    assert found.to_dict()["language"] == "unknown"
    for row in found.segments or ():
        assert 0 <= row.start < row.end <= 34.0 and row.text
    assert len(found.segments or ()) > 2
    assert _requests(base) >= before + len(found.segments or ())


def _requests(base: str) -> int:
    text = httpx2.get(f"{base}/metrics").text
    rows = [line for line in text.splitlines() if line.startswith("lfm2_requests_total")]
    return int(sum(float(row.rpartition(" ")[2]) for row in rows))


def test_subtitles(client: openai.OpenAI) -> None:
    assert str(transcribe(client, response_format="vtt")).startswith("WEBVTT")
    srt = str(transcribe(client, response_format="srt"))
    assert not srt or srt.startswith("1\n00:00:0")


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ({"content": b"no sound at all"}, 422, "is not a recording that can be read here"),
        ({"content": b""}, 422, "is empty (0 bytes)"),
        ({"content": bytes(3 << 20)}, 413, "the recording holds 3,145,728 bytes, and the limit"),
        ({"prompt": "names"}, 400, "prompt is not done by this server"),
        ({"timestamp_granularities": ["word"]}, 400, "times are given of segments only"),
        ({"response_format": "diarized_json"}, 400, "it must be one of json, text, srt, vtt"),
        ({"response_format": "srt", "stream": True}, 400, "srt cannot be streamed"),
        ({"temperature": 9}, 400, "temperature is no number from 0 to 2"),
    ],
)
def test_what_cannot_be_transcribed_is_said(
    client: openai.OpenAI, options: dict[str, Any], status: int, text: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        transcribe(client, **options)
    assert caught.value.status_code == status
    assert text in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} == set(caught.value.body)


def test_too_long_a_recording(client: openai.OpenAI) -> None:
    long = speaking.recording("route", 16000 * 61).to_bytes("flac")
    with pytest.raises(openai.APIStatusError, match="longer than 1 minutes; cut it") as caught:
        transcribe(client, long)
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"json": {"file": "x"}}, 415, "send multipart/form-data with the recording in file"),
        ({"files": {"other": b"x"}}, 400, "the form has no recording; send it in the field file"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "boundary",
        ),
    ],
)
def test_forms_that_are_none(base: str, body: dict[str, Any], status: int, text: str) -> None:
    answer = httpx2.post(f"{base}/v1/audio/transcriptions", **body)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]


def test_translations_are_refused_with_advice(base: str) -> None:
    answer = httpx2.post(f"{base}/v1/audio/translations", files={"file": SECOND})
    assert answer.status_code == 400
    assert "speech is not translated here; transcribe" in answer.json()["error"]["message"]


# --- speech ------------------------------------------------------------------------------------


def say(client: openai.OpenAI, text: str = "Hello", **options: Any) -> bytes:
    extra = {"temperature": 0, "seed": 1, **options.pop("extra_body", {})}
    body: dict[str, Any] = {"voice": "alloy", **options}
    with client.audio.speech.with_streaming_response.create(
        model="tiny", input=text, extra_body=extra, **body
    ) as answer:
        return b"".join(answer.iter_bytes())


def test_speech_is_that_of_the_model(client: openai.OpenAI) -> None:
    wanted = MODEL.speak("Hello", temperature=0, seed=1)
    assert wanted.duration > 0.5 and wanted.rate == 24000
    raw = np.frombuffer(say(client, response_format="pcm"), dtype="<i2") / 32767
    np.testing.assert_allclose(raw, wanted.samples.numpy().clip(-1, 1), atol=1e-3)
    wav = say(client, response_format="wav")
    assert wav[:4] == b"RIFF" and wav[44:] == say(client, response_format="pcm")


@pytest.mark.parametrize("form", ["wav", "mp3", "opus", "flac"])
def test_every_format_can_be_read_again(client: openai.OpenAI, form: str) -> None:
    wanted = MODEL.speak("Hello", temperature=0, seed=1)
    if form == "wav":
        data = say(client, response_format="wav")
        with suppress(RuntimeError):  # of unknown length, as every stream
            assert sf.info(io.BytesIO(data)).samplerate == 24000
        return
    samples, rate = sf.read(io.BytesIO(say(client, response_format=form)))
    assert rate in (24000, 48000)
    assert wanted.duration <= len(samples) / rate + 1e-3
    assert len(samples) / rate <= wanted.duration + 0.2


def test_a_long_text_is_said_in_pieces(client: openai.OpenAI, base: str) -> None:
    before = _requests(base)
    data = say(client, "Hello " * 90, response_format="pcm")
    assert _requests(base) == before + 3
    assert len(data) >= 2 * 2 * int(0.2 * 24000)  # two pauses


def test_events_carry_the_same_sound(base: str, client: openai.OpenAI) -> None:
    body = {
        "model": "tiny",
        "input": "Hello",
        "response_format": "pcm",
        "stream_format": "sse",
        "temperature": 0,
        "seed": 1,
    }
    lines = httpx2.post(f"{base}/v1/audio/speech", json=body, timeout=60).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    data = b"".join(
        base64.b64decode(e["audio"]) for e in events if e["type"] == "speech.audio.delta"
    )
    assert data == say(client, response_format="pcm")
    assert events[-1]["type"] == "speech.audio.done" and events[-1]["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"voice": "Napoleon"}, "there is no voice 'Napoleon'; use one of US male, US female"),
        ({"speed": 2}, "speed is 2, and only 1 is spoken"),
        ({"instructions": "Whisper."}, "instructions are not followed here"),
        ({"text": "  "}, "input holds no words"),
        ({"text": ""}, "input: string should have at least 1"),
        ({"response_format": "aac"}, "response_format: input should be"),
        ({"text": "word " * 4000}, "input: string should have at most"),
    ],
)
def test_what_cannot_be_said_is_said(
    client: openai.OpenAI, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, **options)
    assert text in caught.value.message


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3", "opus"])
def test_an_encoder_loses_nothing_however_sound_comes(form: str) -> None:
    tone = np.sin(np.arange(24000) * 0.05).astype(np.float32) / 2
    whole, pieces = Encoder(form, 24000), Encoder(form, 24000)
    once = whole.push(tone) + whole.finish()
    parts = b"".join(pieces.push(part) for part in np.array_split(tone, 7)) + pieces.finish()
    if form == "opus":  # pages carry a random serial number
        once, parts = (sf.read(io.BytesIO(data))[0].tobytes() for data in (once, parts))
    assert parts == once and len(once) > 1000


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3", "opus"])
def test_samples_that_are_no_numbers_do_not_end_the_server(form: str) -> None:
    encoder, broken = Encoder(form, 24000), np.full(2400, np.nan, dtype=np.float32)
    assert encoder.push(broken) + encoder.finish()


# --- spoken chat -------------------------------------------------------------------------------


def asking(*more: Any) -> list[Any]:
    data = base64.b64encode(SECOND).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [part]}, *more]


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": asking(),
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "max_completion_tokens": 24,
        "seed": 3,
        **changes,
    }
    return client.chat.completions.create(**body)


def test_a_spoken_answer(client: openai.OpenAI) -> None:
    model = MODEL
    wanted = model.reply(SECOND, max_tokens=24, seed=3)
    answer = chat(client).choices[0].message
    assert answer.content is None and answer.audio is not None
    assert answer.audio.transcript == wanted.text
    samples, rate = sf.read(io.BytesIO(base64.b64decode(answer.audio.data)))
    assert rate == 24000
    np.testing.assert_allclose(samples, wanted.audio.samples.numpy().clip(-1, 1), atol=1e-3)


def test_a_spoken_answer_can_be_referred_to(client: openai.OpenAI) -> None:
    first = chat(client).choices[0].message
    again = asking({"role": "assistant", "audio": {"id": first.audio.id}}, *asking())
    answer = chat(client, messages=again)
    kept = first.audio.transcript
    assert answer.usage.prompt_tokens_details.cached_tokens > 20  # what was said was not computed
    assert kept is not None and answer.choices[0].message.audio is not None
    with pytest.raises(openai.BadRequestError, match="names an answer that is not kept here"):
        chat(client, messages=asking({"role": "assistant", "audio": {"id": "audio_x"}}, *asking()))


def test_a_spoken_answer_streams(client: openai.OpenAI) -> None:
    whole = chat(client, audio={"voice": "alloy", "format": "pcm16"}).choices[0].message.audio
    chunks = list(
        chat(
            client,
            audio={"voice": "alloy", "format": "pcm16"},
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [c.choices[0].delta.to_dict().get("audio", {}) for c in chunks if c.choices]
    text = "".join(delta.get("transcript", "") for delta in deltas)
    data = b"".join(base64.b64decode(delta["data"]) for delta in deltas if "data" in delta)
    assert (text, data) == (whole.transcript, base64.b64decode(whole.data))
    assert sum("data" in delta for delta in deltas) > 1
    assert any(delta.get("expires_at") for delta in deltas)
    assert chunks[-1].usage.completion_tokens_details.audio_tokens > 0


def test_text_alone_is_answered_about_a_recording(client: openai.OpenAI) -> None:
    answer = chat(client, modalities=["text"], audio=None, max_completion_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stream": True}, "audio.format is wav; streams carry pcm16 only"),
        ({"n": 2}, "n is not done in spoken answers"),
        ({"stop": ["x"]}, "stop is not done in spoken answers"),
        ({"audio": {"voice": "Napoleon", "format": "wav"}}, "there is no voice 'Napoleon' in"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'; spoken"),
        ({"messages": [{"role": "system", "content": "x"}]}, "does not end with a user's turn"),
    ],
)
def test_what_spoken_answers_do_not_have(
    client: openai.OpenAI, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **changes)
    assert caught.value.status_code in (400, 422)
    assert text in caught.value.message


def test_a_server_without_audio_says_so() -> None:
    with running(ServerOptions(models=("x",)), load=lambda name: object()) as url:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "modalities": ["audio"],
            "audio": {"voice": "alloy", "format": "wav"},
        }
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 404
        assert "no model of this server does speech" in answer.json()["error"]["message"]
