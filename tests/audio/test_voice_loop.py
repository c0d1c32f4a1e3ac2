"""The loop over a scripted model: what is answered, what is heard, what is remembered."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_audio.voice import events as say
from lfm2_audio.voice import loop as module
from lfm2_audio.voice import notes
from lfm2_audio.voice.echo import EchoSettings
from lfm2_audio.voice.loop import VoiceLoop
from lfm2_audio.voice.script import Script, cough
from lfm2_audio.voice.settings import VoiceSettings
from lfm2_audio.voice.simulate import Simulation, simulate
from lfm2_audio.voice.turns import TurnSettings
from lfm2_audio.voice.vad import EnergyVad
from lfm2_mm.errors import ContextOverflow, InputError, SettingError
from lfm2_mm.events import AudioFrame, Done, Event, TextDelta, Timings, Usage
from tests.audio.voice_fakes import (
    CODEBOOKS,
    FRAME,
    RATE,
    FakeModel,
    Loud,
    Talk,
    clip,
    run,
    spoken,
    talk_of,
    value,
)

TONE = np.full(16000, 0.3, dtype=np.float32)  # a second of "speech" for the loud detector


def heard_frames(sim: Simulation) -> list[int]:
    """Numbers of the frames that were heard, by their samples, in order; fades left out."""
    steady = np.flatnonzero(np.diff(sim.heard, append=-1) != 0)
    values = {round(value(i), 5): i for i in range(1000)}
    out: list[int] = []
    for start, end in zip([-1, *steady], steady, strict=False):
        number = values.get(round(float(sim.heard[end]), 5))
        if end - start > 100 and number is not None and (not out or out[-1] != number):
            out.append(number)
    return out


def question(seconds: float = 1.0) -> Script:
    return Script().wait(0.5).say(TONE[: round(16000 * seconds)])


def kinds(sim: Simulation) -> list[str]:
    return [event.type for event in sim.events]


# ---- the conversation that must be shown ----


@pytest.fixture(scope="module", params=[None, 10], ids=["quiet", "10 dB SNR"])
def conversation(request: pytest.FixtureRequest) -> tuple[Simulation, VoiceLoop, Script, FakeModel]:
    """Speech, pauses, a cough, a yes in between, an interruption, 30 s of silence."""
    script = (
        Script()
        .wait(1)
        .say(clip("question"))
        .wait(5.5)
        .sound(cough())
        .wait(3.5)
        .say(clip("second"))
        .wait(2.5)
        .say(clip("backchannel"))
        .wait(2.5)
        .say(clip("stop"))
        .wait(30)
        .say(clip("question"))
        .wait(2)
    )
    model = FakeModel(spoken(100))
    sim, loop = run(model, script.samples(snr_db=request.param), cost=0.01)
    return sim, loop, script, model


Shown = tuple[Simulation, VoiceLoop, Script, FakeModel]


def test_right_turns(conversation: Shown) -> None:
    sim, loop, script, model = conversation
    questions = [script.spoken[i] for i in (0, 1, 3, 4)]
    started, stopped = sim.of(say.SpeechStarted), sim.of(say.SpeechStopped)
    assert len(started) == len(stopped) == len(questions)
    for (first, last), start, stop in zip(questions, started, stopped, strict=True):
        assert isinstance(start, say.SpeechStarted) and isinstance(stop, say.SpeechStopped)
        assert first - 0.4 * 16000 <= 16 * start.audio_start_ms <= first
        assert last <= 16 * stop.audio_end_ms <= last + 0.5 * 16000
        assert 16 * stop.at_ms <= last + 0.9 * 16000
    assert len(model.asked) == 4
    assert sim.of(say.VoiceError) == []


def test_a_yes_in_between_only_pauses_the_answer(conversation: Shown) -> None:
    sim, _, script, _ = conversation
    first, last = script.spoken[2]
    paused, resumed = sim.of(notes.OutputPaused)[0], sim.of(notes.OutputResumed)[0]
    assert 0 < 16 * paused.at_ms - first <= 0.2 * 16000
    assert 0 < 16 * resumed.at_ms - last <= 0.7 * 16000
    done = [e for e in sim.of(say.ItemTruncated) if e.at_ms < 16000]
    assert done == []


def test_the_interruption_stops_the_answer_in_time(conversation: Shown) -> None:
    sim, loop, script, _ = conversation
    first = script.spoken[3][0]
    paused = [e for e in sim.of(notes.OutputPaused) if 16 * e.at_ms > first][0]
    cleared = [e for e in sim.of(say.OutputCleared) if 16 * e.at_ms > first]
    assert 16 * paused.at_ms - first <= 0.2 * 16000  # known within 200 ms
    silent = sim.heard[(paused.at_ms + 40) * RATE // 1000 :][: RATE // 5]
    assert not silent.any()  # and silent 40 ms later, fade and block of the player included
    assert len(cleared) == 1
    assert 16 * cleared[0].at_ms - first <= 2.0 * 16000


def test_the_history_is_what_was_heard(conversation: Shown) -> None:
    sim, loop, script, model = conversation
    talk = talk_of(loop)
    assert talk.roles() == "ua" * 4
    for at in (1, 5, 7):
        assert len(talk.frames(at)) == 101  # all of it, and the end
    (cut,) = sim.of(say.ItemTruncated)
    assert isinstance(cut, say.ItemTruncated)
    frames = len(talk.frames(3))
    assert frames == cut.audio_end_ms // 80
    paused = sim.of(notes.OutputPaused)[-1]
    assert isinstance(paused, notes.OutputPaused)
    assert 0 <= paused.heard_ms + 5 - cut.audio_end_ms < 80 + 5
    lengths = [talk.seconds(at) for at in (0, 2, 4, 6)]
    said = [(script.spoken[i][1] - script.spoken[i][0]) / 16000 for i in (0, 1, 3, 4)]
    for have, want in zip(lengths, said, strict=True):
        assert want + 0.3 <= have <= want + 1.0


def test_what_was_heard_is_what_was_made(conversation: Shown) -> None:
    sim, loop, _, _ = conversation
    assert heard_frames(sim)[:100] == list(range(100))


def test_every_turn_has_a_latency_line(conversation: Shown) -> None:
    sim, _, _, _ = conversation
    lines = sim.of(notes.TurnLatency)
    assert len(lines) == 4
    for line in lines:
        assert isinstance(line, notes.TurnLatency)
        assert line.vad_ms == 512
        # the model needs 7 steps of 10 ms to the first frame, and the player takes 32 ms a time
        assert line.heard_ms is not None and line.heard_ms - line.vad_ms == 96
        assert line.gaps_ms == 0


def test_what_may_be_the_whole_turn_is_computed_ahead(conversation: Shown) -> None:
    sim, _, _, model = conversation
    assert model.warmed[0] == Talk()  # the system prompt
    for asked in model.asked:
        assert any(asked is warmed for warmed in model.warmed)  # the very same audio


# ---- noise, silence, endurance ----


@pytest.mark.parametrize("pink", [False, True])
def test_noise_alone_is_no_turn(pink: bool) -> None:
    model = FakeModel()
    noise = Script().wait(15).samples(snr_db=10, pink=pink, seed=5)
    sim, _ = run(model, noise)
    assert model.asked == []
    assert set(kinds(sim)) <= {"lfm2_mm.conversation.warmed"}


def test_noise_does_not_interrupt() -> None:
    script = Script().wait(0.5).say(clip("question")).wait(8)
    model = FakeModel(spoken(80))
    sim, loop = run(model, script.samples(snr_db=10, pink=True))
    assert len(model.asked) == 1
    assert sim.of(notes.OutputPaused) == []
    assert len(talk_of(loop).turns[1].content) > 80


def test_two_hundred_turns_need_no_more_memory_than_twenty() -> None:
    """Objects are counted where equally many turns are remembered: not one a turn may be left."""
    model = FakeModel(spoken(6), max_positions=600)
    loop = VoiceLoop(model, Talk(), vad=Loud(), settings=VoiceSettings(reserve=100))
    turn = Script().wait(0.1).say(TONE[:5120]).wait(1.2).samples()
    kept: dict[int, list[int]] = {}
    longest = dropped = answered = 0
    for i in range(200):
        sim = simulate(loop, turn, chunk=2048, cost=lambda _: 0.0, finish=False)
        dropped += len(sim.of(notes.ContextDropped))
        answered += len(sim.of(say.OutputStopped))
        del sim
        for seen in (model.asked, model.warmed, model.handles):
            seen.clear()
        turns = len(talk_of(loop).turns)
        longest = max(longest, turns)
        if 20 <= i < 32 or i >= 188:
            gc.collect()
            kept.setdefault(turns, []).append(sys.getallocatedblocks())
    assert answered == 200
    assert dropped > 3
    assert longest < 60
    again = [counts[-1] - counts[0] for counts in kept.values() if len(counts) > 1]
    assert len(again) > 5
    assert max(again) < 80  # of 160 turns and more
    assert loop.hearing.kept < 32000


def test_the_same_input_gives_the_same_conversation() -> None:
    script = question().wait(1.2).say(TONE).wait(3).samples()
    first, _ = run(FakeModel(), script, vad=Loud(), cost=0.013)
    second, _ = run(FakeModel(), script, vad=Loud(), cost=0.013)
    assert np.array_equal(first.heard, second.heard)
    plain = [
        [(e.type, e.at_ms) for e in sim.events if not isinstance(e, notes.TurnLatency)]
        for sim in (first, second)
    ]
    assert plain[0] == plain[1]


@given(st.integers(100, 5000))
@settings(max_examples=8)
def test_any_chunk_size_gives_the_same_turns(chunk: int) -> None:
    script = question().wait(1.5).samples()
    sim, loop = run(FakeModel(spoken(4)), script, vad=Loud(), chunk=chunk)
    assert talk_of(loop).roles() == "ua"
    started, stopped = sim.of(say.SpeechStarted)[0], sim.of(say.SpeechStopped)[0]
    assert isinstance(started, say.SpeechStarted) and isinstance(stopped, say.SpeechStopped)
    assert (started.audio_start_ms, stopped.audio_end_ms) == (180, 1704)
    assert heard_frames(sim) == list(range(4))


def test_24_khz_are_heard_as_well() -> None:
    script = Script().wait(0.5).say(clip("question")).wait(1.5).samples()
    high = np.interp(np.arange(0, len(script), 2 / 3), np.arange(len(script)), script)
    model = FakeModel(spoken(4))
    loop = VoiceLoop(model, Talk())
    simulate(loop, high.astype(np.float32), 24000, cost=lambda _: 0.0)
    assert talk_of(loop).roles() == "ua"


# ---- interruptions ----


def interrupted(at: float, length: float = 1.0, **changes: Any) -> tuple[Simulation, VoiceLoop]:
    """Somebody speaks, so long, when so many seconds of the answer are over."""
    script = question().wait(0.512 + at).say(TONE[: round(16000 * length)]).wait(5)
    chosen = VoiceSettings(**changes)
    return run(FakeModel(spoken(50)), script.samples(), vad=Loud(), settings=chosen)


@pytest.mark.parametrize("at", [0.3, 1.0, 1.04, 2.5])
def test_the_history_is_cut_to_whole_frames_heard(at: float) -> None:
    sim, loop = interrupted(at)
    talk = talk_of(loop)
    assert talk.roles() == "uaua"
    (cut,) = sim.of(say.ItemTruncated)
    assert isinstance(cut, say.ItemTruncated)
    frames = [int(codes[0]) for codes in talk.frames(1)]
    assert frames == list(range(cut.audio_end_ms // 80))
    second = heard_frames(sim).index(0, 1)  # where the second answer begins
    heard = heard_frames(sim)[:second]
    assert frames in (heard, heard[:-1])  # the last frame was cut short, or not even begun
    (cancelled, completed) = sim.of(say.ResponseDone)
    assert isinstance(cancelled, say.ResponseDone) and isinstance(completed, say.ResponseDone)
    assert completed.status == "completed"


def test_what_the_device_holds_back_was_not_heard() -> None:
    _, exact = interrupted(1.0)
    _, late = interrupted(1.0, output_delay_ms=160)
    assert len(talk_of(exact).frames(1)) - len(talk_of(late).frames(1)) == 2


def test_an_unheard_answer_was_no_answer_and_the_question_goes_on() -> None:
    script = question().wait(0.544).say(TONE).wait(4)
    model = FakeModel(spoken(25))
    loop = VoiceLoop(model, Talk(), vad=Loud())
    sim = simulate(loop, script.samples(), cost=lambda _: 0.05)  # 0.35 s to the first frame
    talk = talk_of(loop)
    assert talk.roles() == "ua"
    assert talk.seconds(0) > 2.4  # both parts in one
    assert [e.status for e in sim.of(say.ResponseDone) if isinstance(e, say.ResponseDone)] == [
        "cancelled",
        "completed",
    ]
    assert model.handles[0].cancelled
    assert heard_frames(sim)[0] == 0


def test_an_endless_question_is_not_joined_for_ever() -> None:
    chosen = VoiceSettings(turns=TurnSettings(max_turn_ms=1500))
    script = Script().wait(0.5).say(np.tile(TONE, 6)).wait(4)
    loop = VoiceLoop(FakeModel(spoken(3)), Talk(), vad=Loud(), settings=chosen)
    simulate(loop, script.samples(), cost=lambda _: 0.2)
    talk = talk_of(loop)
    longest = [talk.seconds(i) for i, turn in enumerate(talk.turns) if turn.role == "user"]
    assert max(longest) <= 3.1
    assert 6.0 < sum(longest) < 7.0  # nothing of it is lost


def test_a_cough_before_the_answer_only_delays_it() -> None:
    script = question().wait(0.52).sound(TONE[:2400]).wait(4)
    sim, loop = run(FakeModel(spoken(5)), script.samples(), vad=Loud(), cost=0.02)
    assert talk_of(loop).roles() == "ua"
    assert len(sim.of(notes.TurnDismissed)) == 1
    assert heard_frames(sim) == list(range(5))


def test_nothing_is_cut_when_the_answer_is_over() -> None:
    sim, loop = interrupted(4.5)
    assert sim.of(say.ItemTruncated) == []
    assert len(talk_of(loop).frames(1)) == 51


def test_interruptions_can_be_switched_off() -> None:
    sim, loop = interrupted(1.0, turns=TurnSettings(interrupt=False))
    assert talk_of(loop).roles() == "ua"
    assert sim.of(notes.OutputPaused) == []


# ---- open speakers ----


def with_echo(loop: VoiceLoop, windows: int, voice: float = 0.0) -> None:
    """The microphone hears what is played, thrice as loud and two windows late, and a voice."""
    echo: deque[np.ndarray] = deque([np.zeros(512, dtype=np.float32)] * 2)
    for _ in range(windows):
        loop.hear(echo.popleft() + np.float32(voice))
        while loop.think():
            pass
        echo.append(3 * loop.play(768)[:512])


def test_our_own_voice_from_the_loudspeaker_is_nobodys() -> None:
    paused = {}
    modes: tuple[Literal["off", "gate", "half"], ...] = ("off", "gate", "half")
    for mode in modes:
        model = FakeModel(spoken(90))
        chosen = VoiceSettings(echo=EchoSettings(mode=mode))
        loop = VoiceLoop(model, Talk(), vad=Loud(), settings=chosen)
        loop.ask("Tell me something.")
        with_echo(loop, 300)
        paused[mode] = any(isinstance(e, notes.OutputPaused) for e in loop.events)
        assert mode == "off" or len(talk_of(loop).frames(1)) == 91
    assert paused == {"off": True, "gate": False, "half": False}


def test_a_voice_over_our_own_interrupts() -> None:
    chosen = VoiceSettings(echo=EchoSettings(mode="gate", warmup_ms=1000))
    loop = VoiceLoop(FakeModel(spoken(90)), Talk(), vad=Loud(), settings=chosen)
    loop.ask("Tell me something.")
    with_echo(loop, 60)
    with_echo(loop, 30, voice=0.4)
    with_echo(loop, 300)
    assert talk_of(loop).roles() == "uaua"
    assert len(talk_of(loop).frames(1)) < 60


# ---- by hand ----


def tick(loop: VoiceLoop, windows: int, sound: float = 0.0) -> np.ndarray:
    """So many windows, all thinking done at once."""
    out = []
    for _ in range(windows):
        loop.hear(np.full(512, sound, dtype=np.float32))
        while loop.think():
            pass
        out.append(loop.play(768))
    return np.concatenate(out)


def test_push_to_talk() -> None:
    model = FakeModel(spoken(25))
    loop = VoiceLoop(model, Talk(), vad=Loud(), settings=VoiceSettings(manual=True))
    tick(loop, 40, 0.3)
    states = [loop.state]
    loop.press()
    states.append(loop.state)
    tick(loop, 40, 0.3)
    loop.release()
    states.append(loop.state)
    tick(loop, 20)
    states.append(loop.state)
    assert states == ["listening", "hearing", "thinking", "speaking"]
    loop.press()  # interrupts at once
    tick(loop, 20, 0.3)
    loop.release()
    tick(loop, 100)
    talk = talk_of(loop)
    assert talk.roles() == "uaua"
    assert talk.seconds(0) == 40 * 0.032
    assert len(talk.frames(1)) == 20 * 768 // FRAME


def test_written_questions_are_answered_aloud() -> None:
    loop = VoiceLoop(FakeModel(spoken(3)), Talk(), vad=Loud())
    loop.ask("How are you?")
    sound = tick(loop, 20)
    assert talk_of(loop).roles() == "ua"
    assert talk_of(loop).turns[0].content == "How are you?"
    assert sound.any()


def test_a_written_question_replaces_a_turn_that_is_on() -> None:
    loop = VoiceLoop(FakeModel(spoken(3)), Talk(), vad=Loud())
    tick(loop, 20, 0.3)
    loop.ask("How are you?")
    tick(loop, 40)
    assert talk_of(loop).roles() == "ua"
    assert loop.idle


def test_a_client_may_stop_an_answer_and_say_what_it_heard() -> None:
    loop = VoiceLoop(FakeModel(spoken(50)), Talk(), vad=Loud())
    loop.ask("How are you?")
    tick(loop, 40)
    loop.stop()
    assert len(talk_of(loop).frames(1)) == 40 * 768 // FRAME
    loop.truncate(500)
    assert len(talk_of(loop).frames(1)) == 6
    reasons = [e.reason for e in loop.events if isinstance(e, say.ResponseDone)]
    assert reasons in ([None], ["client_cancelled"])


def test_closing_keeps_what_was_said_and_heard() -> None:
    loop = VoiceLoop(FakeModel(spoken(50)), Talk(), vad=Loud())
    loop.ask("How are you?")
    tick(loop, 40)
    assert len(talk_of(loop).frames(1)) == 40 * 768 // FRAME  # also before
    loop.close()
    loop.close()
    assert len(talk_of(loop).frames(1)) == 40 * 768 // FRAME
    with pytest.raises(InputError, match="the voice loop is closed; make a new one"):
        loop.hear(np.zeros(512, dtype=np.float32))


def test_closing_in_the_midst_of_a_turn_keeps_the_turn() -> None:
    loop = VoiceLoop(FakeModel(spoken(50)), Talk(), vad=Loud())
    tick(loop, 40, 0.3)
    loop.close()
    assert talk_of(loop).roles() == "u"
    assert talk_of(loop).seconds(0) == 40 * 0.032


# ---- what goes wrong ----


def failing(error: Exception) -> Any:
    def script(number: int, talk: Talk) -> Iterator[Event]:
        if number == 1:
            raise error
        yield from spoken(3)(number, talk)

    return script


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ContextOverflow("the prompt has 9 tokens; shorten it"),
            "the prompt has 9 tokens; shorten it",
        ),
        (ZeroDivisionError("no"), "the turn failed (ZeroDivisionError: no); say it again"),
    ],
)
def test_a_turn_that_fails_is_told_and_the_loop_goes_on(error: Exception, said: str) -> None:
    script = question().wait(1.5).say(TONE).wait(2)
    sim, loop = run(FakeModel(failing(error)), script.samples(), vad=Loud())
    (told,) = sim.of(say.VoiceError)
    assert isinstance(told, say.VoiceError)
    assert told.message == said
    failed, completed = sim.of(say.ResponseDone)
    assert isinstance(failed, say.ResponseDone) and isinstance(completed, say.ResponseDone)
    assert (failed.status, completed.status) == ("failed", "completed")
    assert talk_of(loop).roles() == "ua"  # the question that fails would fail again


def test_of_an_answer_that_fails_midway_stays_what_was_heard() -> None:
    script = question().wait(4)
    sim, loop = run(FakeModel(spoken(50, fail_at=10)), script.samples(), vad=Loud())
    assert talk_of(loop).roles() == "ua"
    heard = heard_frames(sim)
    assert [int(codes[0]) for codes in talk_of(loop).frames(1)] in (heard, heard[:-1])


def test_broken_samples_are_silence() -> None:
    script = question().wait(2).samples()
    script[100:200] = np.nan
    script[-20000:-10000] = np.inf
    sim, loop = run(FakeModel(spoken(3)), script, vad=Loud())
    told = [e.message for e in sim.of(say.VoiceError) if isinstance(e, say.VoiceError)]
    assert len(told) == 2 and all("are no numbers" in message for message in told)
    assert talk_of(loop).roles() == "ua"
    assert np.isfinite(np.asarray(talk_of(loop).turns[0].content.samples)).all()
    assert np.isfinite(sim.heard).all()


def test_an_answer_without_sound_is_an_answer() -> None:
    def script(number: int, talk: Talk) -> Iterator[Event]:
        yield TextDelta("Yes.")
        yield Done("stop", Usage(20), Timings())

    sim, loop = run(FakeModel(script), question().wait(2).samples(), vad=Loud())
    assert talk_of(loop).turns[1].content == (TextDelta("Yes."),)
    assert not sim.heard.any()


def test_the_end_of_audio_is_kept_but_never_decoded() -> None:
    def script(number: int, talk: Talk) -> Iterator[Event]:
        yield AudioFrame(torch.zeros(CODEBOOKS, dtype=torch.int64))
        yield AudioFrame(torch.full((CODEBOOKS,), 2048))
        yield TextDelta("Bye.")
        yield Done("stop", Usage(20), Timings())

    sim, loop = run(FakeModel(script), question().wait(2).samples(), vad=Loud())
    assert heard_frames(sim) == [0]
    assert len(talk_of(loop).turns[1].content) == 3


def test_an_answer_that_is_too_long_is_incomplete() -> None:
    sim, _ = run(FakeModel(spoken(5, ends=False)), question().wait(2).samples(), vad=Loud())
    (done,) = sim.of(say.ResponseDone)
    assert isinstance(done, say.ResponseDone)
    assert (done.status, done.reason) == ("incomplete", "max_output_tokens")


def test_without_silero_a_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_vad", lambda kind: EnergyVad())
    loop = VoiceLoop(FakeModel(), Talk())
    (notice,) = loop.events
    assert isinstance(notice, notes.Notice)
    assert notice.message.startswith("silero-vad is not installed, so loudness alone tells")


# ---- pace ----


def test_chunks_grow_from_small_to_large() -> None:
    model = FakeModel(spoken(40))
    sim, _ = run(model, question().wait(5).samples(), vad=Loud())
    sizes = [len(e.samples) for e in sim.of(say.OutputAudioDelta) if hasattr(e, "samples")]
    assert sizes[0] == FRAME - 480
    assert sorted(sizes[:-2]) == sizes[:-2]
    assert sizes[-3] == 8 * FRAME
    assert sum(sizes) == 40 * FRAME


def test_the_model_stops_and_waits_when_it_is_far_ahead() -> None:
    model = FakeModel(spoken(100))
    loop = VoiceLoop(model, Talk(), vad=Loud(), settings=VoiceSettings(ahead_s=1.0))
    loop.ask("Tell me a long story.")
    tick(loop, 3)
    assert RATE <= loop.speaker.pending <= 1.7 * RATE
    tick(loop, 300)
    assert len(talk_of(loop).frames(1)) == 101


def test_a_model_that_is_too_slow_leaves_gaps_and_says_so() -> None:
    sim, loop = run(FakeModel(spoken(10)), question().wait(9).samples(), vad=Loud(), cost=0.15)
    (line,) = sim.of(notes.TurnLatency)
    assert isinstance(line, notes.TurnLatency)
    assert line.gaps_ms > 300
    assert heard_frames(sim) == list(range(10))


def test_options_reach_the_model() -> None:
    model = FakeModel(spoken(2))
    loop = VoiceLoop(
        model,
        Talk(),
        vad=Loud(),
        settings=VoiceSettings(max_frames=77),
        options={"audio_top_k": 4},
    )
    loop.ask("Hello")
    tick(loop, 2)
    assert model.options == {"max_frames": 77, "audio_top_k": 4}


# ---- the context ----


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    model = FakeModel(spoken(10), max_positions=300)
    loop = VoiceLoop(model, Talk(), vad=Loud(), settings=VoiceSettings(reserve=60, keep=0.5))
    script = question().wait(2.5).samples()
    dropped: list[Any] = []
    for _ in range(12):
        dropped += simulate(loop, script, cost=lambda _: 0.0, finish=False).of(notes.ContextDropped)
    assert dropped
    for event in dropped:
        assert event.positions_before > 240 and event.positions_after <= 120
    assert all(talk.turns[0].role == "user" for talk in model.asked)
    assert all(len(talk.to_prompt(model)) <= 240 for talk in model.asked)
    whole = talk_of(loop)
    assert len(whole.to_prompt(model)) < 300
    assert whole.roles() == "ua" * (len(whole.turns) // 2)


def test_one_turn_that_is_too_long_fails_and_is_forgotten() -> None:
    class Small(FakeModel):
        def reply_stream(self, conversation: Talk, **options: Any) -> Any:
            if len(conversation.to_prompt(self)) > self.max_positions:
                raise ContextOverflow("the prompt has too many tokens; shorten it")
            return super().reply_stream(conversation, **options)

    model = Small(spoken(3), max_positions=80)
    script = question(1.0).wait(1.5).say(np.tile(TONE, 6)).wait(1.5).say(TONE).wait(1.5)
    sim, loop = run(model, script.samples(), vad=Loud())
    assert len(sim.of(say.VoiceError)) == 1
    assert talk_of(loop).roles() == "ua"
    assert talk_of(loop).seconds(0) < 2


# ---- idle ----


def test_long_silence_is_told() -> None:
    chosen = VoiceSettings(turns=TurnSettings(idle_ms=3000))
    sim, _ = run(FakeModel(), Script().wait(10).samples(), vad=Loud(), settings=chosen)
    (idle,) = sim.of(say.IdleTimeout)
    assert isinstance(idle, say.IdleTimeout)
    assert 3000 <= idle.audio_end_ms - idle.audio_start_ms < 3032


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chunk_frames": ()}, r"chunk_frames is \(\); give at least one number"),
        ({"keep": 1.0}, "keep is 1.0; it must lie between 0 and 1"),
        ({"ahead_s": 0}, "max_frames is 600 and ahead_s 0; both must be positive"),
        ({"reserve": 0}, "output_delay_ms is 0 and reserve 0; the first must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        VoiceSettings(**wrong)
