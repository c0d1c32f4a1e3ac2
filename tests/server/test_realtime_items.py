"""Items of realtime conversations: where they stand, what they became, how long they are kept."""

from __future__ import annotations

import base64
import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lfm2_audio.serving import remote
from lfm2_audio.serving.calling import Tools
from lfm2_audio.serving.remote import RemoteLoop
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import MessageError
from lfm2_mm.events import AudioFrame, Error, Event, TextDelta
from lfm2_mm.server import ServerOptions
from lfm2_mm.server.problems import ApiError
from tests.audio import speaking
from tests.audio.voice_fakes import FRAME, FakeModel, Talk, spoken
from tests.server.running import running
from tests.server.test_realtime import Voice, address, calling, event, sound, write

pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")


def seconds(n: float) -> Audio:
    return Audio(torch.zeros(int(n * 16000)), 16000)


class Line:
    """A loop without a socket, and what it says."""

    def __init__(self, model: FakeModel | None = None, *, automatic: bool = False) -> None:
        self.model = model or FakeModel(spoken(4))
        self.events: list[Any] = []
        self.loop = RemoteLoop(
            self.model,
            Talk(),
            settings=VoiceSettings(manual=True),
            emit=self.events.append,
            on_turn=lambda *turn: None,
        )
        self.loop.configure(self.loop.settings, automatic=automatic)

    def run(self, play: int = 10 * FRAME) -> None:
        """Until there is nothing to be thought."""
        for _ in range(200):
            self.loop.work()
            self.loop.play(play)
            if self.loop.idle:
                break

    @property
    def said(self) -> list[Any]:
        """What stands in the conversation, answers by their number of frames."""
        talk = self.loop.conversation
        assert isinstance(talk, Talk)
        return [
            sum(isinstance(part, AudioFrame) for part in turn.content)
            if turn.role == "assistant" and not isinstance(turn.content[0], str)
            else turn.content
            for turn in talk.turns
        ]

    def of(self, kind: str) -> list[Any]:
        return [one for one in self.events if one.type == kind]


# --- where they stand --------------------------------------------------------------------------


def test_items_stand_where_the_client_puts_them() -> None:
    line = Line()
    line.loop.put("user", "one", item_id="a")
    line.loop.put("user", "four", item_id="d")
    line.loop.put("user", "zero", item_id="z", after="root")
    line.loop.put("user", "two", item_id="b", after="a")
    line.loop.put("user", "three", item_id="c", after="b")
    line.loop.put("user", "five", item_id="e", after="d")
    assert line.said == ["zero", "one", "two", "three", "four", "five"]
    before = [one.previous_item_id for one in line.of("conversation.item.added")]
    assert before == [None, "a", None, "a", "b", "d"]
    line.loop.put("user", "six")
    assert line.of("conversation.item.added")[-1].previous_item_id == "e"
    line.loop.delete("b")
    line.loop.delete("z")
    assert line.said == ["one", "three", "four", "five", "six"]
    line.loop.respond()
    line.run()
    assert [turn.content for turn in line.model.asked[-1].turns] == line.said[:-1]


def test_behind_an_answer_and_behind_what_became_no_turn() -> None:
    line = Line()
    line.loop.put("user", "one", item_id="a")
    line.loop.respond()
    line.run()
    (answer,) = {one.item["id"] for one in line.of("conversation.item.added")} - {"a"}
    line.loop.put("user", "two", item_id="b")
    line.loop.put("user", "between", item_id="x", after=answer)
    assert line.said == ["one", 5, "between", "two"]
    line.loop.instruct(lambda talk: talk.drop(2))  # as if the context were full
    line.loop.put("user", "first", item_id="y", after="a")  # its turn is gone
    assert line.said == ["first", "between", "two"]


def test_unknown_and_taken_ids_are_refused_and_nothing_happens() -> None:
    line = Line()
    line.loop.put("user", "one", item_id="a")
    with pytest.raises(ApiError, match="there is no item 'b' in this conversation") as caught:
        line.loop.put("user", "two", after="b")
    assert (caught.value.code, caught.value.param) == (
        "item_create_invalid_previous_item_id",
        "previous_item_id",
    )
    with pytest.raises(ApiError, match="there is an item 'a' already; choose another id"):
        line.loop.put("user", "two", item_id="a")
    assert line.said == ["one"] and len(line.of("conversation.item.added")) == 1


def test_names_of_the_clients_are_not_given_twice() -> None:
    line = Line()
    line.loop.put("user", "one", item_id="item_000001")
    line.loop.put("user", "two", item_id="item_a000001")
    line.loop.put("user", "three")
    line.loop.respond()
    line.run()
    ids = [one.item["id"] for one in line.of("conversation.item.added")]
    assert len(set(ids)) == 4


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    models = {"voice": Voice(spoken(4)), "tiny": speaking.model()}
    with running(ServerOptions(models=tuple(models)), load=models.__getitem__) as url:
        yield url


def test_clients_say_where_an_item_stands(base: str) -> None:
    with connect(address(base)) as line:
        line.recv()
        for name, before in (("b", None), ("a", "root"), ("c", "a")):
            content = [{"type": "input_text", "text": name}]
            item = {"id": name, "role": "user", "content": content}
            fields = {"item": item} | ({"previous_item_id": before} if before else {})
            line.send(event("conversation.item.create", **fields))
        added: list[tuple[str, str | None]] = []
        while len(added) < 3:
            told = json.loads(line.recv(timeout=20))
            if told["type"] == "conversation.item.added":
                added.append((told["item"]["id"], told["previous_item_id"]))
        assert added == [("b", None), ("a", None), ("c", "a")]
        for wrong, text in (("x", "there is no item 'x' in this"), (7, "previous_item_id is no")):
            line.send(event("conversation.item.create", item=item, previous_item_id=wrong))
            told = {"type": ""}
            while told["type"] != "error":
                told = json.loads(line.recv(timeout=20))
            assert text in told["error"]["message"]


# --- which turn an item became -----------------------------------------------------------------


def failing(number: int, talk: Talk) -> Iterator[Event]:
    """The second answer fails after a word."""
    if number != 2:
        yield from spoken(4)(number, talk)
        return
    yield TextDelta("Well,")
    yield Error(MessageError("the model fell over; try again"))


def test_an_answer_that_was_never_heard_names_no_turn() -> None:
    line = Line(FakeModel(failing), automatic=True)
    line.loop.ask("one")
    line.run()
    line.loop.ask("two")
    line.run()
    (unheard,) = [one.item["id"] for one in line.of("conversation.item.done")][-1:]
    assert unheard == "item_a000002"
    assert line.said == ["one", 5]
    assert line.loop.delete(unheard)
    assert line.said == ["one", 5]  # and not without the answer before it


def test_what_was_broken_off_unheard_is_not_cut_or_taken_for_another() -> None:
    line = Line(automatic=True)
    line.loop.ask("one")
    line.run()
    line.loop.ask("two")
    for _ in range(3):
        line.loop.work()  # it has begun, but nobody has heard of it
    unheard = line.of("conversation.item.added")[-1].item["id"]
    line.loop.cancel()
    assert line.said == ["one", 5, "two"]
    line.loop.delete(line.of("conversation.item.added")[-2].item["id"])
    assert line.said == ["one", 5]
    assert line.loop.cut(unheard, 80) is not None
    assert line.said == ["one", 5]


def test_a_turn_that_goes_on_is_one_item() -> None:
    line = Line(automatic=True)
    loud = np.full(16000, 0.5, dtype=np.float32)
    for _ in range(2):
        line.loop.press()
        line.loop.hear(loud)
        line.loop.release()  # and goes on before anything of an answer is heard
    line.run()
    talk = line.loop.conversation
    assert isinstance(talk, Talk) and talk.roles() == "ua" and talk.seconds(0) > 1.9
    added = [one.item["id"] for one in line.of("conversation.item.added")]
    (gone,) = [one.item_id for one in line.of("conversation.item.deleted")]
    assert gone == added[0]
    assert line.loop.delete(added[1])
    assert [turn.role for turn in line.loop.conversation.turns] == ["assistant"]


def test_a_turn_that_was_to_go_on_stands_if_it_does_not() -> None:
    line = Line(automatic=True)
    loud = np.full(16000, 0.5, dtype=np.float32)
    line.loop.press()
    line.loop.hear(loud)
    line.loop.release()
    line.loop.press()
    line.loop.drop()
    (item,) = [one.item["id"] for one in line.of("conversation.item.added")]
    assert [turn.role for turn in line.loop.conversation.turns] == ["user"]
    assert line.loop.delete(item)
    assert not line.loop.conversation.turns


# --- what holds for one answer -----------------------------------------------------------------


def told(name: str) -> Callable[[Any], Any]:
    """A conversation whose first turn says what the model is told."""

    def how(talk: Talk) -> Talk:
        rest = [turn for turn in talk.turns if not str(turn.content).startswith("told ")]
        return Talk((*Talk().user(f"told {name}").turns, *rest))

    return how


def test_instructions_that_change_during_an_answer_of_its_own_hold() -> None:
    line = Line()
    line.loop.instruct(told("old"))
    line.loop.put("user", "one")
    line.loop.respond(Tools(), told("own"), told("old"))
    line.loop.instruct(told("new"))
    line.run()
    assert line.model.asked[-1].turns[0].content == "told own"
    assert line.said == ["told new", "one", 5]
    line.loop.put("user", "two")
    line.loop.respond(Tools(), told("own"), told("new"))
    line.run()
    assert line.said == ["told new", "one", 5, "two", 5]


def test_a_conversation_that_cannot_go_on_is_ended(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RemoteLoop) -> bool:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(RemoteLoop, "work", broken)
    with connect(address(base)) as line, pytest.raises(ConnectionClosed) as caught:
        told = json.loads(line.recv(timeout=20))
        while True:
            told = json.loads(line.recv(timeout=20))
    assert caught.value.rcvd is not None and caught.value.rcvd.code == 1011
    assert told["error"]["message"] == "the model failed in this conversation; connect again"


# --- how long sound is kept --------------------------------------------------------------------


def test_a_conversation_that_ended_is_let_go(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Noted(RemoteLoop):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(weakref.ref(self))

    monkeypatch.setattr("lfm2_audio.serving.realtime.RemoteLoop", Noted)
    for _ in range(2):
        with calling(base) as caller:
            write(caller, "Hello")
            caller.line.response.create()
            caller.until("response.done")
    for _ in range(200):
        gc.collect()
        if made and all(one() is None for one in made):
            return
        time.sleep(0.05)
    raise AssertionError("something holds it")


def test_sound_that_left_the_conversation_is_let_go() -> None:
    line = Line(FakeModel(spoken(4), max_positions=100))
    recordings = [seconds(5) for _ in range(4)]
    held = [weakref.ref(one.samples) for one in recordings]
    while recordings:
        line.loop.put("user", recordings.pop(0))
        line.run()
    line.model.warmed.clear()
    gc.collect()
    assert len(line.loop.conversation.turns) == 1
    assert [one() is None for one in held] == [True, True, True, False]
    assert len(line.of("conversation.item.added")) == 4


def test_recordings_of_a_conversation_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SOUND", 3 << 20)
    line = Line()
    for n in range(30):  # 20 seconds are 1.2 MiB
        line.loop.put("user", seconds(20), item_id=f"i{n}")
    line.loop.put("user", "And?")
    assert [turn.role for turn in line.loop.conversation.turns] == ["user"] * 3
    assert "recordings hold over 3 MiB" in line.of("lfm2_mm.notice")[-1].message


def test_a_recording_that_is_put_in_is_written_down_without_an_answer(base: str) -> None:
    data = base64.b64encode(sound("short").tobytes()).decode()
    with calling(base, "tiny") as caller:
        caller.line.session.update(
            session={"type": "realtime", "audio": {"input": {"transcription": {}}}}
        )
        caller.until("session.updated")
        item: Any = {"role": "user", "type": "message", "id": "x"}
        item["content"] = [{"type": "input_audio", "audio": data}]
        caller.line.conversation.item.create(item=item)
        row = caller.until("conversation.item.input_audio_transcription.completed")
        assert row["item_id"] == "x"
        write(caller, "Thanks")
        caller.until("conversation.item.done")


def test_more_than_can_be_written_down_is_said(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2_audio.serving.minutes._MOST", 1000)
    data = base64.b64encode(sound("short").tobytes()).decode()
    with calling(base, "tiny") as caller:
        caller.line.session.update(
            session={"type": "realtime", "audio": {"input": {"transcription": {}}}}
        )
        caller.until("session.updated")
        item: Any = {"role": "user", "type": "message"}
        item["content"] = [{"type": "input_audio", "audio": data}]
        caller.line.conversation.item.create(item=item)
        row = caller.until("conversation.item.input_audio_transcription.failed")
        assert "sound wait to be written down" in row["error"]["message"]
