"""Answers in text and speech: the official ones step by step, in company as alone; every end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lfm2_audio.model import AudioModel
from lfm2_audio.speech_head import DepthHead, Specials, Speech, SpeechHead
from lfm2_mm.errors import CheckpointError, Lfm2Error
from lfm2_mm.events import AudioFrame, Done, Error, TextDelta
from lfm2_mm.request import Handle, Request
from lfm2_mm.sampling import Sampling
from lfm2_mm.tokenizer import Tokenizer
from tests.audio import official
from tests.audio.speaking import Steps, prompt, shared, steps, submit

END = [2048] * 8
GOLDEN = [(mode, which) for mode, some in official.CHOSEN.items() for which in some]


@pytest.fixture
def model() -> AudioModel:
    """The tiny official checkpoint."""
    return shared()


def golden(mode: str, which: int) -> Steps:
    found: Steps = official.facts()["generation"][mode][str(which)]
    return found


def wanted(mode: str, which: int) -> Steps:
    """The golden answer without the end of the turn, which we do not say."""
    return [step for step in golden(mode, which) if step != official.IM_END]


def done(handle: Handle) -> Done:
    assert handle.done is not None
    return handle.done


@pytest.mark.parametrize(("mode", "which"), GOLDEN)
def test_200_greedy_steps_equal_the_official_code(model: AudioModel, mode: Any, which: int) -> None:
    handle = submit(model, which, mode=mode)
    made = steps(list(handle))
    assert made == wanted(mode, which)
    usage, ended = done(handle).usage, len(golden(mode, which)) < 200
    assert done(handle).finish_reason == ("stop" if ended else "length")
    assert usage.completion_tokens == len(made) + ended  # the end of the turn was generated
    assert usage.audio_frames == sum(isinstance(step, list) for step in made)


def test_all_of_them_at_once_with_text_requests_between(model: AudioModel) -> None:
    asked = Request(
        prompt=model.prompt([{"role": "user", "content": "hello"}]), max_tokens=30, reuse=False
    )
    text = model.engine.submit(asked).text()
    handles = []
    beside = []
    for mode, which in GOLDEN:
        handles.append(submit(model, which, mode=mode))
        beside.append(model.engine.submit(asked))
    model.engine.run_until_idle()
    for handle, (mode, which) in zip(handles, GOLDEN, strict=True):
        assert steps(list(handle)) == wanted(mode, which), (mode, which)
    assert [handle.text() for handle in beside] == [text] * len(beside)


# --- the corners of the loops, each met by a golden answer


def test_golden_answers_meet_every_corner() -> None:
    sequential = [golden("sequential", which) for which in official.CHOSEN["sequential"]]
    interleaved = [golden("interleaved", which) for which in official.CHOSEN["interleaved"]]
    twice = [answer.count(official.AUDIO_START) > 1 and END in answer for answer in sequential]
    assert any(twice)  # speech that starts anew after it has ended: back to text in between
    assert any(answer[-1] == official.IM_END for answer in sequential)
    assert any(answer[-1] == END for answer in sequential + interleaved)  # cut by the limit
    assert any(official.TEXT_END in answer for answer in interleaved)
    assert not any(official.IM_END in answer for answer in interleaved)  # ends, is not yielded


def test_end_of_speech_within_a_round_does_not_start_the_count_anew(model: AudioModel) -> None:
    answer = steps(list(submit(model, 1, 20, mode="interleaved")))
    kinds = "".join("e" if s == END else "A" if isinstance(s, list) else "t" for s in answer)
    assert kinds == "tttttt" + "e" + "t" * 11 + "AA"  # what was left of twelve frames becomes text


def test_after_the_end_of_text_speech_goes_on_for_good(model: AudioModel) -> None:
    found = 0
    for which in official.CHOSEN["interleaved"]:
        answer = wanted("interleaved", which)
        if official.TEXT_END not in answer:
            continue
        rest = answer[answer.index(official.TEXT_END) + 1 :]
        after = "".join("e" if s == END else "A" if isinstance(s, list) else "t" for s in rest)
        assert after.replace("et", "").strip("A") in ("", "e")  # a token only where speech ended
        found += len(after) > 12
    assert found


def test_everything_is_greedy_unless_asked(model: AudioModel) -> None:
    speech = Speech(head=model.speech)
    assert (speech.text, speech.audio, speech.mode) == (Sampling(), Sampling(), "interleaved")
    assert speech.text.greedy and speech.audio.greedy


# --- events


def test_text_comes_as_whole_characters_with_the_tokens_it_is_made_of(model: AudioModel) -> None:
    handle = submit(model, 12, mode="interleaved")
    events = list(handle)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    ids = [step for step in wanted("interleaved", 12) if isinstance(step, int)]
    assert text == model.tokenizer.decode(ids)
    frames = [event for event in events if isinstance(event, AudioFrame)]
    assert {(frame.codes.dtype, frame.codes.shape) for frame in frames} == {
        (torch.int64, torch.Size([8]))
    }


@pytest.mark.parametrize(("limit", "made"), [({"max_frames": 3}, 9), ({}, 8)])
def test_limits(model: AudioModel, limit: dict[str, Any], made: int) -> None:
    handle = submit(model, 15, 200 if limit else 8, mode="interleaved", **limit)
    assert steps(list(handle)) == wanted("interleaved", 15)[:made]
    assert done(handle).finish_reason == "length"


# --- draws


def drawn(model: AudioModel, seed: int | None, **settings: Any) -> Steps:
    audio = Sampling(seed=seed, **{"temperature": 1.0, "top_k": 4, **settings})
    return steps(list(submit(model, 15, 40, mode="interleaved", audio=audio)))


def test_a_seed_draws_the_same_alone_and_in_company(model: AudioModel) -> None:
    first = drawn(model, 7)
    assert drawn(model, 7) == first != drawn(model, 8)
    how: dict[str, Any] = {
        "mode": "interleaved",
        "audio": Sampling(temperature=1.0, top_k=4, seed=7),
    }
    company = [submit(model, which, 40, mode="interleaved") for which in (1, 12)]
    handle = submit(model, 15, 40, **how)
    company += [submit(model, 29, 40, **how), submit(model, 15, 40, **how)]
    model.engine.run_until_idle()
    assert steps(list(handle)) == first == steps(list(company[-1]))


def test_text_and_codes_are_drawn_apart(model: AudioModel) -> None:
    greedy = wanted("interleaved", 15)[:18]
    codes = drawn(model, 7)[:18]
    assert codes[:6] == greedy[:6]  # text stays greedy
    assert codes[6:] != greedy[6:]
    text = Sampling(temperature=2.0, seed=3)
    words = steps(list(submit(model, 15, 18, mode="interleaved", text=text)))
    assert words[:6] != greedy[:6]


def test_top_1_is_greedy(model: AudioModel) -> None:
    assert drawn(model, 7, top_k=1) == wanted("interleaved", 15)[:40]


def test_codes_without_a_sound_are_not_drawn(
    model: AudioModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.speech, "sounds", 5)
    frames = [step for step in drawn(model, 3, temperature=50.0) if isinstance(step, list)]
    assert len(frames) > 10
    assert all(max(frame) < 5 or frame == END for frame in frames)
    assert {code for frame in frames if frame != END for code in frame} == set(range(5))


def test_top_k_keeps_ties(model: AudioModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = torch.zeros(2049)
    tied[[10, 20, 30]] = 9.0  # three share the second place of two
    tied[40] = 9.5

    monkeypatch.setattr(
        "lfm2_audio.depthformer.Codebook.logits", lambda self, x: tied.expand(len(x), -1)
    )
    frames = [step for step in drawn(model, 1, top_k=2) if isinstance(step, list)]
    assert {code for frame in frames for code in frame} == {10, 20, 30, 40}


# --- another depth head


class Counting:
    """Says frames of its number, and ends speech with the fifth; chooses all codes in one go."""

    end = 2048

    def __init__(self) -> None:
        self.said = 0

    def frames(self, hidden: torch.Tensor, choose: Any) -> torch.Tensor:
        scores = torch.zeros(len(hidden), 2049)
        scores[:, self.said if self.said < 4 else self.end] = 1.0
        self.said += 1
        return torch.stack([choose(book, scores) for book in range(8)], 1)

    def pack(self) -> Iterator[None]:
        yield from ()


def test_any_depth_head_will_do(model: AudioModel) -> None:
    assert isinstance(model.speech.depthformer, DepthHead)
    counting: DepthHead = Counting()
    head = SpeechHead(
        model.head, counting, model.speech.frames, model.tokenizer, n_text=2, n_audio=3
    )
    given = prompt(model, 15)
    asked = Request(prompt=given, generation=Speech(head=head), max_tokens=9, reuse=False)
    answer = steps(list(model.engine.submit(asked)))
    kinds = "".join("A" if isinstance(step, list) else "t" for step in answer)
    assert kinds == "ttAAAttAA"
    frames = [step for step in answer if isinstance(step, list)]
    assert frames == [*([k] * 8 for k in range(4)), END]


# --- what goes wrong


def test_nan_ends_the_sequence_it_is_in(model: AudioModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real, poison = model.speech.depthformer.frames, [5]

    def poisoned(hidden: Any, choose: Any) -> Any:
        def spoilt(book: int, scores: torch.Tensor) -> Any:
            if book in poison:
                poison.remove(book)
                scores = scores.clone()
                scores[0] = float("nan")
            return choose(book, scores)

        return real(hidden, spoilt)

    monkeypatch.setattr(model.speech.depthformer, "frames", poisoned)
    bad = submit(model, 15, 10, mode="interleaved")
    drawing = Sampling(temperature=1.0, seed=1)
    good = submit(model, 12, 10, mode="interleaved")
    model.engine.run_until_idle()
    last = list(bad)[-1]
    assert isinstance(last, Error)
    assert str(last.exception) == (
        "the scores of a frame of speech hold NaN or infinity: the computation overflowed, try "
        "dtype float32 or check the weights"
    )
    assert steps(list(good)) == wanted("interleaved", 12)[:10]
    poison.append(2)
    worse = submit(model, 15, 10, mode="interleaved", audio=drawing)
    with pytest.raises(Lfm2Error, match="the computation overflowed"):
        steps(list(worse))


def test_cancelling_in_the_middle_of_a_frame(
    model: AudioModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = submit(model, 15, 60, mode="interleaved", reuse=True)
    other = submit(model, 12, 30, mode="interleaved")
    real, calls = model.speech.depthformer.frames, list[int]()

    def interrupted(hidden: Any, choose: Any) -> Any:
        def stop(book: int, scores: Any) -> Any:
            if len(calls) == 2 and book == 4:
                handle.cancel()  # as another thread would: the engine is in the midst of a step
            return choose(book, scores)

        calls.append(len(hidden))
        return real(hidden, stop)

    monkeypatch.setattr(model.speech.depthformer, "frames", interrupted)
    events = list(handle)
    assert isinstance(events[-1], Done) and events[-1].finish_reason == "cancelled"
    made = steps(events)
    assert made == wanted("interleaved", 15)[:8]  # six tokens, and the frame that was begun
    assert steps(list(other)) == wanted("interleaved", 12)[:30]
    monkeypatch.undo()
    assert steps(list(submit(model, 15, 30, mode="interleaved"))) == wanted("interleaved", 15)[:30]


def test_the_tokens_that_steer_come_from_the_tokenizer(tmp_path: Any) -> None:
    official.write_tokenizer(tmp_path)
    found = Specials.of(Tokenizer.load(tmp_path))
    assert (found.audio_start, found.text_end, found.turn_end) == (
        official.AUDIO_START,
        official.TEXT_END,
        official.IM_END,
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|text_end|>", "<|text_over|>"))
    with pytest.raises(CheckpointError) as caught:
        Specials.of(Tokenizer.load(tmp_path))
    assert str(caught.value) == (
        "the tokenizer has no token '<|text_end|>', without which speech cannot be generated; use "
        "the tokenizer files of an LFM2-Audio checkpoint"
    )
