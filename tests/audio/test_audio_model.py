"""The verbs of a speech model: transcribe, speak, reply, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_audio
import lfm2_mm
from lfm2_audio import prompts
from lfm2_audio.conversation import Conversation
from lfm2_audio.model import AudioModel
from lfm2_audio.results import Reply, Transcript, together
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm.cache import SequenceCache
from lfm2_mm.errors import InputError, SettingError
from lfm2_mm.events import AudioFrame, Done, TextDelta, Timings, Usage
from lfm2_mm.sampling import Sampling
from tests.audio import official
from tests.audio.speaking import recording, shared


@pytest.fixture
def model() -> AudioModel:
    """The tiny official checkpoint."""
    return shared()


@pytest.fixture
def asked(model: AudioModel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine is asked for, in order."""
    requests: list[Any] = []
    submit = model.engine.submit

    def note(request: Any) -> Any:
        requests.append(request)
        return submit(request)

    monkeypatch.setattr(model.engine, "submit", note)
    return requests


def read(model: AudioModel, request: Any) -> str:
    text: str = model.tokenizer.decode(request.prompt.ids.tolist(), skip_special=False)
    return text


def test_the_face_is_lazy() -> None:
    assert lfm2_audio.AudioModel is AudioModel
    assert all(getattr(lfm2_audio, name) is not None for name in lfm2_audio.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Speaker'"):
        lfm2_audio.Speaker  # noqa: B018


def test_transcribe_is_greedy_and_sequential(model: AudioModel, asked: list[Any]) -> None:
    audio = recording("prompt 18", 12000)
    heard = model.transcribe(audio)
    assert isinstance(heard, Transcript)
    assert str(heard) == heard.text
    (request,) = asked
    generation = request.generation
    assert (generation.mode, generation.text.greedy) == ("sequential", True)
    assert "<|im_start|>system\nPerform ASR.<|im_end|>\n<|im_start|>user\n" in read(model, request)
    assert heard.done.usage.completion_tokens > 0
    assert all(0 <= s.start <= s.end <= audio.duration for s in heard.segments)
    model.transcribe(audio, language="German")
    assert "Perform ASR in German." in read(model, asked[1])


def test_a_model_that_repeats_itself_is_stopped(
    model: AudioModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.speech, "_token", _babble(model))
    heard = model.transcribe(recording("prompt 18", 24000))
    assert heard.done.finish_reason == "cancelled"
    assert heard.done.usage.completion_tokens < 64
    assert heard.segments[0].looped


def _babble(model: AudioModel) -> Any:
    from lfm2_mm.heads import StepResult

    row = model.backbone.embed_tokens.weight[200]

    def token(scores: Any, state: Any) -> StepResult:
        state.n_generated += 1
        return StepResult([TextDelta("so it is ", (200,))], row, identity=200)

    return token


def test_speak_makes_sound_and_streams_the_same(model: AudioModel, asked: list[Any]) -> None:
    options: dict[str, Any] = {"seed": 3, "max_seconds": 2.0}
    whole = model.speak("Good morning", **options)
    assert isinstance(whole, Audio) and whole.rate == model.codec.rate
    first = asked[0]
    assert "Perform TTS. Use the US female voice.<|im_end|>" in read(model, first)
    assert "<|im_start|>user\nGood morning<|im_end|>" in read(model, first)
    audio = first.generation.audio
    assert (audio.temperature, audio.top_k, first.generation.text) == (0.8, 64, Sampling())
    assert first.generation.max_frames == int(2 * whole.rate / model.codec.samples_per_frame)
    pieces = list(model.speak("Good morning", stream=True, **options))
    together = torch.cat([piece.samples for piece in pieces]) if pieces else torch.zeros(0)
    assert len(together) == len(whole.samples)
    peak = float(whole.samples.abs().max()) if len(whole.samples) else 1.0
    torch.testing.assert_close(together, whole.samples, atol=1e-5 * max(peak, 1e-9), rtol=0)


def test_dropping_a_stream_cancels_it(model: AudioModel, monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[Any] = []
    submit = model.engine.submit

    def note(request: Any) -> Any:
        handles.append(submit(request))
        return handles[-1]

    monkeypatch.setattr(model.engine, "submit", note)
    conversation = model.conversation().user(recording("prompt 15", 12000))
    from lfm2_audio.sounding import chunks

    stream = chunks(model.codec, model.reply_stream(conversation, temperature=0))
    assert len(next(stream).samples) > 0
    stream.close()  # type: ignore[attr-defined]
    assert handles[0].done.finish_reason == "cancelled"


def test_reply_answers_a_recording_and_can_be_continued(
    model: AudioModel, asked: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "q.wav"
    recording("prompt 15", 12000).save(path)
    reply = model.reply(path, max_tokens=40, temperature=0)
    assert isinstance(reply, Reply)
    assert (reply.dropped, reply.done.usage.completion_tokens) == (0, 40)
    frames = reply.conversation.turns[-1].n_frames
    assert len(reply.audio.samples) == frames * model.codec.samples_per_frame > 0
    assert reply.text == reply.conversation.turns[-1].text
    assert prompts.CONVERSATION in read(model, asked[0])
    generation = asked[0].generation
    assert (generation.mode, generation.text.greedy) == ("interleaved", True)
    more = model.reply(reply.conversation.user("and then?"), max_tokens=20, seed=1)
    assert asked[1].generation.audio == Sampling(temperature=1.0, top_k=4, seed=2)
    assert more.done.usage.cached_tokens > len(asked[0].prompt)
    assert len(more.conversation.turns) == 4


def test_oldest_turns_go_when_the_context_is_full(model: AudioModel) -> None:
    long = model.conversation()
    for i in range(12):
        long = long.user("a" * 150).assistant([f"answer {i}"])
    reply = model.reply(long.user("now"), max_tokens=6)
    assert reply.dropped > 0
    assert reply.conversation.turns[0].role == "user"
    assert len(reply.conversation.turns) == 26 - reply.dropped
    assert reply.done.usage.prompt_tokens < model.max_positions * 7 // 8


def test_no_more_is_kept_than_a_few_contexts_hold(model: AudioModel) -> None:
    """Each interruption and each dropped turn leaves a state behind that nobody asks for again."""
    config = model.backbone.config
    keys, values = SequenceCache(config, capacity=model.max_positions).buffers
    assert model.context_bytes == keys.nbytes + values.nbytes
    assert model.engine.prefixes.max_bytes == 4 * model.context_bytes < 512 << 20


def test_text_in_and_out_as_every_model(model: AudioModel) -> None:
    answer = model.ask("hello", max_tokens=5)
    assert answer.done.usage.audio_frames == 0
    assert model.logits([1, 2, 3]).shape == (3, official.N_VOCAB)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.speak("  "), "the text has 0 characters; give between 1 and 4000"),
        (lambda m: m.speak("a" * 4001), "the text has 4001 characters"),
        (lambda m: m.reply_stream(m.conversation()), "does not end with a user's turn"),
        (lambda m: m.reply(Conversation().user("q").assistant(["a"])), "end with a user's turn"),
    ],
)
def test_what_cannot_be_done_is_refused(model: AudioModel, call: Any, said: str) -> None:
    with pytest.raises(InputError) as refused:
        call(model)
    assert said in str(refused.value)


# --- prompts, recipes, sums


def test_voices() -> None:
    assert prompts.tts_prompt("uk_male") == "Perform TTS. Use the UK male voice."
    assert prompts.tts_prompt("  US-Female ") == "Perform TTS. Use the US female voice."
    assert prompts.tts_prompt() == "Perform TTS. Use the US female voice."
    with pytest.raises(SettingError) as refused:
        prompts.tts_prompt("pirate")
    assert str(refused.value) == (
        "there is no voice 'pirate'; use one of US male, US female, UK male, UK female"
    )
    assert prompts.tts_prompt(described=True) == "Perform TTS."
    assert prompts.tts_prompt("A calm woman.", described=True) == (
        "Perform TTS.\nUse the following voice: A calm woman."
    )
    assert prompts.asr_prompt() == "Perform ASR."


def test_an_lfm2_audio_takes_descriptions_and_its_file_may_set_the_draws(tmp_path: Path) -> None:
    folder = official.write(tmp_path / "v1")
    (folder / "generation_config.json").write_text('{"audio_temperature": 0.5, "audio_top_k": 9}')
    model = lfm2_mm.load(folder, threads=1, dtype="float32")
    assert model.described
    assert model.spoken == model.read == Sampling(temperature=0.5, top_k=9)
    assert not shared().described
    assert shared().spoken == prompts.SPOKEN


def test_what_is_saved_speaks_the_same(model: AudioModel, tmp_path: Path) -> None:
    model.save(tmp_path / "copy")
    again = lfm2_mm.load(tmp_path / "copy", threads=1, dtype="float32")
    question = model.conversation().user(recording("prompt 15", 12000))
    answers = []
    for one in (model, again):
        events = list(one.reply_stream(question, max_tokens=20, temperature=0))
        answers.append([e.codes.tolist() for e in events if isinstance(e, AudioFrame)])
    assert answers[0] == answers[1] != []


def test_requests_sum_up() -> None:
    parts = [
        Done("stop", Usage(prompt_tokens=3, audio_frames=1), Timings(decode=1.0, first_token=0.5)),
        Done("length", Usage(prompt_tokens=4), Timings(decode=2.0, first_token=0.7)),
    ]
    whole = together(parts)
    assert whole.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.audio_frames) == (7, 1)
    assert (whole.timings.decode, whole.timings.first_token) == (3.0, 0.5)
    assert together([]).finish_reason == "stop"


def test_codes_that_are_drawn_have_a_sound_before_the_codec_was_ever_used() -> None:
    model = lfm2_mm.load("nano-audio", threads=1)
    assert model.speech.sounds == 2048
    sample = Path(lfm2_audio.__file__).parent / "samples" / "klatt3-arithmetic.wav"
    question = model.conversation().user(read_audio(sample))
    handle = model.reply_stream(question, temperature=50.0, top_k=0, seed=1, max_frames=24)
    frames = [event.codes for event in handle if isinstance(event, AudioFrame)]
    assert frames and model.codec.entries == 512
    assert all(int(f.max()) < 512 for f in frames if int(f[0]) != 2048)
