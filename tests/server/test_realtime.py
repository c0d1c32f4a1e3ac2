"""Realtime conversations through the real OpenAI client: turns, interruptions, and abuse."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import soxr  # type: ignore[import-untyped]
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lfm2_mm.events import Event
from lfm2_mm.server import Limits, ServerOptions
from tests.audio import speaking
from tests.audio.voice_fakes import FRAME, FakeModel, Talk, clip, spoken
from tests.server.running import running

# the client's own way to open a socket, of which its websockets warns
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

RATE = 24000
HOLD = {"audio": {"input": {"turn_detection": None}}}


def answer(number: int, talk: Talk) -> Iterator[Event]:
    """Long answers to long questions, short ones to short."""
    content = talk.turns[-1].content
    long = not isinstance(content, str) and talk.seconds(-1) > 1.5
    return spoken(150 if long else 12)(number, talk)


class Voice(FakeModel):
    """A scripted model as the server sees one."""

    def conversation(self, system: str | None = None) -> Talk:
        return Talk()

    def converse(self) -> None:
        raise AssertionError("a server has no microphone")


VOICE = Voice(answer)


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    models = {"voice": VOICE, "tiny": speaking.model()}
    limits = Limits(sockets=3, frame_bytes=2 << 20)
    with running(
        ServerOptions(models=tuple(models), limits=limits), load=models.__getitem__
    ) as url:
        yield url


def sound(name: str, silence: float = 0.0) -> np.ndarray:
    """A clip as the socket carries it: 16 bits at 24 kHz."""
    samples = soxr.resample(clip(name), 16000, RATE)
    whole = np.concatenate([samples, np.zeros(int(silence * RATE), dtype=np.float32)])
    return np.asarray((whole * 32767).astype("<i2"))


def onset(name: str) -> float:
    """Seconds at which somebody begins to speak in a clip."""
    return float(np.argmax(np.abs(clip(name)) > 0.03)) / 16000


class Caller:
    """One client, and what it was told."""

    def __init__(self, line: Any) -> None:
        self.line, self.sent, self.events = line, 0, list[dict[str, Any]]()

    def say(self, samples: np.ndarray) -> None:
        for at in range(0, len(samples), RATE // 5):
            piece = samples[at : at + RATE // 5]
            audio = base64.b64encode(piece.tobytes()).decode()
            self.line.input_audio_buffer.append(audio=audio)
            self.sent += len(piece)

    @property
    def sent_ms(self) -> float:
        return 1000 * self.sent / RATE

    def until(self, kind: str) -> dict[str, Any]:
        """Read on to the next event of a kind."""
        while True:
            event = json.loads(self.line.recv_bytes())
            self.events.append(event)
            if event["type"] == kind:
                return dict(event)
            assert event["type"] != "error" or kind == "error", event

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def heard(self) -> int:
        """Samples of sound that came."""
        deltas = self.of("response.output_audio.delta")
        return sum(len(base64.b64decode(event["delta"])) // 2 for event in deltas)


@contextmanager
def calling(base: str, model: str = "voice") -> Iterator[Caller]:
    with (
        openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client,
        client.realtime.connect(model=model) as line,
    ):
        caller = Caller(line)
        created = caller.until("session.created")["session"]
        assert created["model"] == model and created["type"] == "realtime"
        yield caller


def in_order(events: list[dict[str, Any]], kinds: list[str]) -> bool:
    """Whether these kinds came one after the other, others between them."""
    found = iter(event["type"] for event in events)
    return all(kind in found for kind in kinds)


# --- turns -------------------------------------------------------------------------------------


def test_a_question_is_heard_and_answered(base: str) -> None:
    with calling(base) as caller:
        caller.say(sound("short", 1.0))
        done = caller.until("response.done")["response"]
        assert done["status"] == "completed"
        assert in_order(
            caller.events,
            [
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                "conversation.item.added",
                "response.created",
                "response.output_item.added",
                "response.output_audio_transcript.delta",
                "response.output_audio.delta",
                "response.output_audio.done",
                "response.output_audio_transcript.done",
                "response.done",
            ],
        )
        assert caller.heard == 12 * FRAME
        assert len(caller.of("response.output_audio.delta")) > 1  # as it was made
        latency = caller.until("lfm2_mm.turn.latency")  # once all was played
        assert latency["frames"] == 12 and "first audio" in latency["text"]
        assert len({event["event_id"] for event in caller.events}) == len(caller.events)


def test_the_client_knows_the_events(base: str) -> None:
    with calling(base) as caller:
        caller.line.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Hello"}],
            }
        )
        caller.line.response.create()
        kinds = set()
        for event in caller.line:
            kinds.add(type(event).__name__)
            if event.type == "response.done":
                assert event.response.output[0].content[0].transcript.startswith(" w0.0")
                break
        assert {"ConversationItemAdded", "ResponseCreatedEvent", "ResponseAudioDeltaEvent"} <= kinds


def test_two_talk_at_once_and_one_interrupts(base: str) -> None:
    before = len(VOICE.asked)
    with calling(base) as patient, calling(base) as rude:
        rude.say(sound("question", 0.8))
        patient.say(sound("short", 0.8))
        rude.until("output_audio_buffer.started")
        time.sleep(0.4)  # so that something of it is heard
        began = rude.sent_ms + 1000 * onset("second")
        rude.say(sound("second", 0.8))
        paused = rude.until("lfm2_mm.output.paused")
        assert 0 < paused["at_ms"] - began <= 200
        cancelled = rude.until("response.done")["response"]
        assert cancelled["status"] == "cancelled"
        assert cancelled["status_details"]["reason"] == "turn_detected"
        cut = rude.until("conversation.item.truncated")
        assert 0 < cut["audio_end_ms"] < 12_000
        rude.until("input_audio_buffer.committed")
        rude.until("response.output_audio.delta")
        assert patient.until("response.done")["response"]["status"] == "completed"
        assert patient.heard == 12 * FRAME
    asked = VOICE.asked[before:]
    assert sorted(talk.roles() for talk in asked) == ["u", "u", "uau"]
    (second,) = [talk for talk in asked if talk.roles() == "uau"]
    assert 0 < len(second.frames(1)) * 80 <= cut["audio_end_ms"] + 80  # what was heard, no more


def test_a_turn_can_be_committed_before_it_ends(base: str) -> None:
    with calling(base) as caller:
        caller.say(sound("question")[: int(1.5 * RATE)])
        caller.until("input_audio_buffer.speech_started")
        caller.line.input_audio_buffer.commit()
        caller.until("input_audio_buffer.committed")
        caller.until("response.output_audio.delta")


def test_what_was_begun_can_be_cleared(base: str) -> None:
    with calling(base) as caller:
        caller.say(sound("question")[: int(1.5 * RATE)])
        caller.until("input_audio_buffer.speech_started")
        caller.line.input_audio_buffer.clear()
        caller.until("input_audio_buffer.cleared")
        caller.say(np.zeros(RATE, dtype="<i2"))
        caller.line.input_audio_buffer.commit()
        assert caller.until("error")["error"]["code"] == "input_audio_buffer_commit_empty"
        assert not caller.of("response.created")


def test_turns_are_answered_on_demand_where_the_client_says_so(base: str) -> None:
    with calling(base) as caller:
        detection = {"type": "server_vad", "create_response": False, "silence_duration_ms": 300}
        caller.line.session.update(
            session={"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        )
        held = caller.until("session.updated")["session"]["audio"]["input"]["turn_detection"]
        assert held["create_response"] is False and held["silence_duration_ms"] == 300
        caller.say(sound("short", 0.6))
        caller.until("conversation.item.done")
        caller.until("lfm2_mm.conversation.warmed")  # ready, and waiting
        assert not caller.of("response.created")
        caller.line.response.create()
        assert caller.until("response.done")["response"]["status"] == "completed"


# --- by hand -----------------------------------------------------------------------------------


def by_hand(caller: Caller) -> None:
    caller.line.session.update(session={"type": "realtime", **HOLD})
    audio = caller.until("session.updated")["session"]["audio"]
    assert audio["input"]["turn_detection"] is None


def test_push_to_talk(base: str) -> None:
    with calling(base) as caller:
        by_hand(caller)
        caller.say(sound("short"))
        caller.line.input_audio_buffer.commit()
        caller.until("conversation.item.done")
        assert not caller.of("response.created")
        caller.line.response.create()
        assert caller.until("response.done")["response"]["status"] == "completed"
        asked = VOICE.asked[-1]
        assert asked.roles() == "u"
        assert asked.seconds(-1) == pytest.approx(len(clip("short")) / 16000, abs=0.01)


def test_an_answer_is_cancelled_and_cut(base: str) -> None:
    with calling(base) as caller:
        by_hand(caller)
        caller.say(sound("question"))
        caller.line.input_audio_buffer.commit()
        caller.line.response.create()
        item = caller.until("response.output_item.added")["item"]["id"]
        caller.until("output_audio_buffer.started")
        caller.line.response.create()
        active = caller.until("error")["error"]
        assert active["code"] == "conversation_already_has_active_response"
        time.sleep(0.4)
        caller.line.response.cancel()
        done = caller.until("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == (
            "cancelled",
            "client_cancelled",
        )
        heard = caller.until("conversation.item.truncated")["audio_end_ms"]
        assert heard >= 240
        caller.line.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=160)
        assert caller.until("conversation.item.truncated")["audio_end_ms"] == 160
        caller.line.response.cancel()
        assert caller.until("error")["error"]["code"] == "response_cancel_not_active"
        write(caller, "And then?")
        caller.line.response.create()
        caller.until("response.done")
        assert VOICE.asked[-1].roles() == "uau"
        assert len(VOICE.asked[-1].frames(1)) == 2


def write(caller: Caller, text: str, role: str = "user", kind: str = "input_text") -> None:
    content: Any = [{"type": kind, "text": text}]
    item: Any = {"type": "message", "role": role, "content": content, "id": f"mine_{len(text)}"}
    caller.line.conversation.item.create(item=item)


def test_items_are_put_in_and_answered(base: str) -> None:
    with calling(base) as caller:
        write(caller, "Hello")
        write(caller, "Good day.", "assistant", "output_text")
        write(caller, "How are you?")
        caller.line.response.create()
        caller.until("response.done")
        added = [event["item"]["id"] for event in caller.of("conversation.item.added")]
        assert added[:3] == ["mine_5", "mine_9", "mine_12"]
        assert VOICE.asked[-1].roles() == "uau"
        assert VOICE.asked[-1].turns[-1].content == "How are you?"
        assert not caller.of("input_audio_buffer.committed")


def test_an_answer_that_nobody_waits_for_ends_with_its_client(base: str) -> None:
    content = [
        {"type": "input_audio", "audio": base64.b64encode(sound("question").tobytes()).decode()}
    ]
    before = len(VOICE.handles)
    with connect(address(base), max_queue=None) as line:
        line.send(event("conversation.item.create", item={"role": "user", "content": content}))
        line.send(event("response.create"))
        _wait_for(lambda: len(VOICE.handles) > before)
    handle = VOICE.handles[-1]
    _wait_for(lambda: handle.cancelled)


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


# --- a model that is one -----------------------------------------------------------------------


def test_a_real_model_answers_in_speech_and_writes_down_what_it_heard(base: str) -> None:
    with calling(base, "tiny") as caller:
        caller.line.session.update(
            session={
                "type": "realtime",
                "instructions": "Be brief.",
                "max_output_tokens": 40,
                "audio": {"input": {"turn_detection": None, "transcription": {}}},
            }
        )
        session = caller.until("session.updated")["session"]
        assert session["instructions"] == "Be brief." and session["max_output_tokens"] == 40
        caller.say(sound("short"))
        caller.line.input_audio_buffer.commit()
        caller.line.response.create()
        usage = caller.until("response.done")["response"]["usage"]
        assert usage["output_tokens"] <= 40 and usage["input_tokens"] > 20
        if not caller.of("conversation.item.input_audio_transcription.completed"):
            caller.until("conversation.item.input_audio_transcription.completed")
        (row,) = caller.of("conversation.item.input_audio_transcription.completed")
        deltas = caller.of("conversation.item.input_audio_transcription.delta")
        assert "".join(event["delta"] for event in deltas).strip() == row["transcript"]
        assert caller.of("response.output_audio.delta")
        assert caller.heard % FRAME == 0
        write(caller, "And now?")
        caller.line.response.create()
        again = caller.until("response.done")["response"]["usage"]
        # what was said and heard before is found computed
        assert again["input_token_details"]["cached_tokens"] > usage["input_tokens"] // 2


def test_chat_goes_on_beside_a_conversation(base: str) -> None:
    with calling(base, "tiny") as caller:
        caller.line.session.update(session={"type": "realtime", "max_output_tokens": 30})
        write(caller, "Hello")
        caller.line.response.create()
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
            found = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=8
            )
        assert found.usage is not None and found.usage.completion_tokens > 0
        caller.until("response.done")


# --- what is refused ---------------------------------------------------------------------------


def address(base: str, model: str = "voice") -> str:
    return f"{base.replace('http', 'ws', 1)}/v1/realtime?model={model}"


def event(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, "event_id": "mine", **fields})


BAD: list[tuple[str | bytes, str]] = [
    ("{", "the message is not valid JSON"),
    ("[" * 100_000, "the message is not valid JSON"),
    (b"\xff\xfe", "the message is not valid JSON"),
    ("[]", "the message is no event"),
    ("null", "the message is no event"),
    ('{"type": 5}', "the message is no event"),
    (event("response.audio.delta"), "there is no event 'response.audio.delta' here"),
    (event("input_audio_buffer.append"), "audio is not valid base64"),
    (event("input_audio_buffer.append", audio="%%%"), "audio is not valid base64"),
    (event("input_audio_buffer.append", audio=7), "audio is not valid base64"),
    (event("input_audio_buffer.append", audio="AAAA"), "audio holds 3 bytes, but samples have two"),
    (event("input_audio_buffer.commit"), "no turn is on that could be committed"),
    (event("response.create"), "the user has said nothing that is not answered"),
    (event("response.create", response=5), "response is no object"),
    (event("response.create", response={"instructions": "x"}), "response.instructions is not"),
    (event("response.create", response={"output_modalities": ["text"]}), "answers are spoken"),
    (event("response.cancel"), "no answer is on its way"),
    (event("conversation.item.create"), "item is no message"),
    (event("conversation.item.create", item={"type": "mcp_call"}), "item is no message"),
    (
        event("conversation.item.create", item={"role": "system", "content": []}),
        "item.role is 'system'; it is user or assistant",
    ),
    (event("conversation.item.create", item={"role": "user"}), "item.content is no list"),
    (
        event("conversation.item.create", item={"role": "user", "content": [{"type": "image"}]}),
        "item.content[0] is no input_text part",
    ),
    (
        event(
            "conversation.item.create",
            item={"role": "user", "content": [{"type": "input_audio", "audio": "AAAA"}]},
        ),
        "is no sound of at least 100 ms",
    ),
    (event("conversation.item.truncate", item_id="x"), "truncating needs item_id and"),
    (
        event("conversation.item.truncate", item_id="x", audio_end_ms=5),
        "only the last answer can be truncated",
    ),
    (event("session.update"), "session is no object"),
    (event("session.update", session={"type": "transcription"}), "only realtime is done here"),
    (event("session.update", session={"output_modalities": ["text"]}), "answers of a realtime"),
    (event("session.update", session={"instructions": 5}), "instructions are no text"),
    (event("session.update", session={"max_output_tokens": -1}), "must be a number from 1 to"),
    (event("session.update", session={"audio": 7}), "session.audio is no object"),
    (
        event("session.update", session={"audio": {"input": {"format": {"type": "audio/pcmu"}}}}),
        "session.audio.input.format must be audio/pcm at 24000 Hz",
    ),
    (
        event("session.update", session={"audio": {"input": {"turn_detection": {"type": "x"}}}}),
        "turn_detection.type is 'x'",
    ),
    (
        event(
            "session.update",
            session={
                "audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}
            },
        ),
        "threshold is '7'; it must be a number from 0.05 to 0.99",
    ),
]


def test_every_bad_message_is_answered_and_the_conversation_goes_on(base: str) -> None:
    with connect(address(base)) as line:
        assert json.loads(line.recv())["type"] == "session.created"
        for message, text in BAD:
            line.send(message)
            told = json.loads(line.recv(timeout=20))
            while told["type"].startswith("lfm2_mm."):
                told = json.loads(line.recv(timeout=20))
            assert told["type"] == "error", (message[:80], told)
            assert text in told["error"]["message"], message[:200]
            assert told["error"]["event_id"] == ("mine" if b"mine" in _bytes(message) else None)
        line.send(event("input_audio_buffer.clear"))
        assert json.loads(line.recv(timeout=20))["type"] == "input_audio_buffer.cleared"


def _bytes(message: str | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.encode()


def test_wishes_that_cannot_be_met_are_named(base: str) -> None:
    wish = {
        "tracing": "auto",
        "audio": {
            "input": {
                "turn_detection": {"type": "semantic_vad"},
                "noise_reduction": {"type": "near_field"},
                "transcription": {"model": "whisper-1"},
            },
            "output": {"voice": "marin", "speed": 1.0},
        },
    }
    with calling(base) as caller:
        caller.line.session.update(session={"type": "realtime", **wish})
        session = caller.until("session.updated")["session"]
        assert session["audio"]["input"]["turn_detection"]["type"] == "server_vad"
        assert session["audio"]["input"]["transcription"] is None
        notice = caller.until("lfm2_mm.notice")["message"]
        for name in ("tracing", "semantic_vad", "noise_reduction", "transcription", "output.voice"):
            assert name in notice


def test_a_message_of_ten_megabytes_ends_the_conversation(base: str) -> None:
    with connect(address(base), max_size=None) as line:
        line.recv()
        line.send(event("input_audio_buffer.append", audio="A" * (10 << 20)))
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                line.recv(timeout=20)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def test_more_than_a_minute_does_not_wait_for_a_commit(base: str) -> None:
    second = base64.b64encode(bytes(2 * RATE * 20)).decode()
    with connect(address(base), max_size=None) as line:
        line.recv()
        line.send(event("session.update", session=HOLD))
        for _ in range(4):
            line.send(event("input_audio_buffer.append", audio=second))
        told = [json.loads(line.recv(timeout=20)) for _ in range(2)]
        while "error" not in told[-1]["type"]:
            told.append(json.loads(line.recv(timeout=20)))
        assert "the buffer is full (one minute)" in told[-1]["error"]["message"]


def test_there_is_room_for_so_many(base: str) -> None:
    with calling(base), calling(base), calling(base):
        with pytest.raises(InvalidStatus) as caught, connect(address(base)):
            raise AssertionError("a fourth was let in")
        assert caught.value.response.status_code == 429
        told = json.loads(caught.value.response.body or b"")["error"]
        assert "3 conversations are going on, and the limit is 3" in told["message"]

    def room() -> bool:
        try:
            with connect(address(base)) as line:
                return bool(line.recv())
        except InvalidStatus:  # those who left are still being seen off
            return False

    _wait_for(room)


@pytest.mark.parametrize(
    ("model", "headers", "status"),
    [
        ("other", {}, 404),
        ("voice", {"Origin": "http://evil.example"}, 403),
    ],
)
def test_who_may_not_talk(base: str, model: str, headers: dict[str, str], status: int) -> None:
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(address(base, model), additional_headers=headers),
    ):
        raise AssertionError("it was let in")
    assert caught.value.response.status_code == status


def test_silence_ends_a_conversation() -> None:
    options = ServerOptions(models=("voice",), limits=Limits(idle_seconds=0.3))
    with running(options, load=lambda name: Voice(answer)) as url, connect(address(url)) as line:
        kinds = []
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                kinds.append(json.loads(line.recv(timeout=20)))
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1000
        assert "nothing was sent for 0.3 seconds" in kinds[-1]["error"]["message"]
        assert httpx2.get(f"{url}/health").status_code == 200
