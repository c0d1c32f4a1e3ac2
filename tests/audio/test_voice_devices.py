from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from lfm2_audio.voice import devices as module
from lfm2_audio.voice.devices import Microphone, Player, list_devices, pick, play
from lfm2_audio.voice.events import ResponseDone, SpeechStopped, VoiceEvent
from lfm2_audio.voice.live import Live, converse
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.turns import TurnSettings
from lfm2_mm.errors import DeviceError, MissingExtra
from tests.audio.voice_devices import FakeSounddevice
from tests.audio.voice_fakes import FakeModel, Talk, clip, spoken, talk_of


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> FakeSounddevice:
    return install(monkeypatch, FakeSounddevice())


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeSounddevice) -> FakeSounddevice:
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


# ---- lists and choices ----


def test_a_list_for_people(sound: FakeSounddevice) -> None:
    assert [device.line() for device in list_devices()] == [
        "  0  Built-in Microphone (in, 48000 Hz)  [default input]",
        "  1  Built-in Speaker (out, 48000 Hz)  [default output]",
        "  2  USB Headset (in, out, 48000 Hz)",
    ]


@pytest.mark.parametrize(
    ("wanted", "side", "number"),
    [(None, "input", 0), (None, "output", 1), ("usb", "input", 2), ("2", "output", 2)],
)
def test_devices_are_picked_by_number_or_name(
    sound: FakeSounddevice, wanted: str | None, side: Any, number: int
) -> None:
    assert pick(wanted, side).number == number


@pytest.mark.parametrize(
    ("wanted", "side", "said"),
    [
        ("Radio", "input", "no microphone is called 'Radio'; --list-devices shows what there is"),
        ("1", "input", "no microphone is called '1'"),
        ("b", "input", r"fits several devices: 0 \(Built-in Microphone\), 2 \(USB Headset\); give"),
    ],
)
def test_what_cannot_be_picked(sound: FakeSounddevice, wanted: str, side: Any, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        pick(wanted, side)


def test_a_whole_name_wins_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeSounddevice("Microphone", "Microphone 2"))
    assert pick("microphone", "input").number == 0


def test_no_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeSounddevice("Speaker"))
    with pytest.raises(DeviceError, match="no microphone was found; plug one in, or use files"):
        Microphone()


@pytest.mark.parametrize(
    ("problem", "kind", "said"),
    [
        (ImportError("no"), MissingExtra, r"run pip install 'lfm2-mm\[audio\]'"),
        (OSError("PortAudio library not found"), DeviceError, "apt install libportaudio2"),
    ],
)
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, kind: Any, said: str
) -> None:
    def load(name: str) -> Any:
        raise problem

    monkeypatch.setattr(module, "import_module", load)
    with pytest.raises(kind, match=said):
        list_devices()


def test_a_device_that_refuses(sound: FakeSounddevice) -> None:
    sound.rates = ()
    with pytest.raises(DeviceError, match=r"cannot be opened \(Invalid sample rate .*; choose"):
        Microphone()
    sound.rates, sound.refuse_start = (16000,), True
    with pytest.raises(DeviceError, match=r"cannot be started \(Device unavailable"):
        Microphone().start()


# ---- streams ----


def test_a_microphone_gives_blocks_and_chances_to_leave(sound: FakeSounddevice) -> None:
    with Microphone() as microphone:
        assert microphone.rate == 16000
        blocks = microphone.blocks()
        sound.stream("input").feed(np.full(512, 0.5, dtype=np.float32))
        block = next(blocks)
        assert block is not None and len(block) == 512
        assert next(blocks) is None
    assert sound.stream("input").closed
    assert list(blocks) == []


def test_a_microphone_of_another_rate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeSounddevice(rates=(48000,)))
    assert Microphone().rate == 48000


def test_a_microphone_that_nobody_reads_loses_blocks_and_counts_them(
    sound: FakeSounddevice,
) -> None:
    microphone = Microphone()
    for _ in range(600):
        sound.stream("input").feed(np.zeros(4, dtype=np.float32))
    assert microphone.lost == 600 - 512


def test_a_microphone_that_is_pulled_out(sound: FakeSounddevice) -> None:
    with Microphone() as microphone:
        blocks = microphone.blocks()
        sound.pull_out()
        with pytest.raises(DeviceError, match="'Built-in Microphone' went away; plug it in again"):
            next(blocks)


def test_a_microphone_that_falls_silent(
    sound: FakeSounddevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STALLED", 0.15)
    with Microphone() as microphone, pytest.raises(DeviceError, match="went away"):
        for _ in microphone.blocks():
            pass


def test_a_player_plays_what_it_is_given(sound: FakeSounddevice) -> None:
    asked: list[int] = []

    def source(n: int) -> np.ndarray:
        asked.append(n)
        return np.full(n, 0.25, dtype=np.float32)

    with Player(source) as player:
        assert np.all(sound.stream("output").pull(480) == 0.25)
        assert player.delay_ms == 50
    assert asked == [480]


def test_a_player_of_another_rate_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeSounddevice(rates=(48000,)))
    given = 0

    def source(n: int) -> np.ndarray:
        nonlocal given
        t = (given + np.arange(n)) / 24000
        given += n
        return np.sin(2 * np.pi * 300 * t).astype(np.float32)

    with Player(source, rate=24000):
        out = np.concatenate([fake.stream("output").pull(960) for _ in range(50)])
    assert abs(given - 24000) < 2000
    assert np.abs(np.fft.rfft(out[-24000:])).argmax() == 150  # 300 Hz at 48 kHz, half a second


def test_play_waits_for_the_last_sample(sound: FakeSounddevice) -> None:
    heard: list[np.ndarray] = []

    def pump() -> None:
        until(lambda: sound.streams and sound.stream("output").started)
        while not sound.stream("output").closed:
            heard.append(sound.stream("output").pull(480))
            time.sleep(0.001)

    thread = threading.Thread(target=pump)
    thread.start()
    seconds = play(iter([np.ones(1000, dtype=np.float32)] * 3), 24000)
    thread.join()
    assert seconds == 3000 / 24000
    assert np.concatenate(heard)[:3000].sum() == 3000


# ---- the whole, live ----


class Room:
    """Feeds a live conversation block by block, and collects what is played."""

    def __init__(self, sound: FakeSounddevice, live: Live) -> None:
        self.sound, self.live, self.played = sound, live, [np.zeros(0, dtype=np.float32)]

    def hear(self, samples: np.ndarray) -> None:
        for at in range(0, len(samples), 512):
            before = self.live.loop.clock
            block = np.zeros(512, dtype=np.float32)
            piece = samples[at : at + 512]
            block[: len(piece)] = piece
            self.sound.stream("input").feed(block)
            until(lambda before=before: self.live.loop.clock > before)
            self.played.append(self.sound.stream("output").pull(768))


def test_a_live_conversation(sound: FakeSounddevice) -> None:
    model, types = FakeModel(spoken(4)), list[str]()
    with converse(model, Talk(), temperature=0.5) as live:
        reader = threading.Thread(
            target=lambda: types.extend(event.type for event in live.events())
        )
        reader.start()
        room = Room(sound, live)
        room.hear(np.concatenate([clip("question"), np.zeros(16000, dtype=np.float32)]))
        until(lambda: model.asked)
        for _ in range(200):
            room.hear(np.zeros(512, dtype=np.float32))
            if live.loop.idle:
                break
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert talk_of(live.loop).roles() == "ua"
    assert np.concatenate(room.played).any()
    assert {"response.done", "lfm2_mm.turn.latency"} <= set(types)
    assert model.options == {"temperature": 0.5, "max_frames": 600}
    assert live.loop.settings.output_delay_ms == 50
    assert all(stream.closed for stream in sound.streams)


def test_a_device_unplugged_mid_turn_loses_nothing(sound: FakeSounddevice) -> None:
    model, told = FakeModel(spoken(200)), list[VoiceEvent]()
    live = converse(model, Talk(), settings=VoiceSettings(output_delay_ms=10))
    with pytest.raises(DeviceError, match="went away; plug it in again"), live:
        room = Room(sound, live)
        room.hear(np.concatenate([clip("question"), np.zeros(16000, dtype=np.float32)]))
        until(lambda: live.loop.speaker.pending > 24000)
        room.hear(np.zeros(20 * 512, dtype=np.float32))
        sound.pull_out()
        for event in live.events():
            told.append(event)
    (done,) = [event for event in told if isinstance(event, ResponseDone)]
    assert done.status == "cancelled"
    assert {"output_audio_buffer.cleared", "conversation.item.truncated"} <= {
        event.type for event in told
    }
    talk = talk_of(live.loop)
    assert talk.roles() == "ua"
    heard = live.loop.speaker.heard
    assert heard > 0
    assert len(talk.frames(1)) == (heard - 240) // 1920
    assert all(handle.cancelled for handle in model.handles[-1:])


def test_a_question_that_the_cable_cuts_short_is_kept_and_told(sound: FakeSounddevice) -> None:
    live, told = converse(FakeModel(), Talk()), list[VoiceEvent]()
    with pytest.raises(DeviceError, match="went away"), live:
        Room(sound, live).hear(clip("question")[:24000])
        sound.pull_out()
        for event in live.events():
            told.append(event)
    assert talk_of(live.loop).roles() == "u"
    (stopped,) = [event for event in told if isinstance(event, SpeechStopped)]
    assert stopped.audio_end_ms == 1504  # 1500 ms, in windows of 32
    assert 1.0 < talk_of(live.loop).seconds(0) <= 1.504


def test_a_loudspeaker_that_goes_alone_ends_it_too(sound: FakeSounddevice) -> None:
    live = converse(FakeModel(), Talk())
    with pytest.raises(DeviceError, match="the loudspeaker 'Built-in Speaker' went away"), live:
        sound.pull_out("output")
        sound.stream("input").feed(np.zeros(512, dtype=np.float32))
        for _ in live.events():
            pass


def test_closing_twice_and_from_elsewhere(sound: FakeSounddevice) -> None:
    live = Live(FakeModel(), Talk(), settings=VoiceSettings(turns=TurnSettings(silence_ms=300)))
    with live:
        threading.Timer(0.05, live.close).start()
        assert all(event.type for event in live.events())
    live.close()


def test_without_a_loudspeaker_the_microphone_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeSounddevice("Microphone"))
    with pytest.raises(DeviceError, match="no loudspeaker was found"):
        Live(FakeModel(), Talk())
    assert fake.stream("input").closed
