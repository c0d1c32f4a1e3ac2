"""Spoken questions and their answers: the grammar, the layout of dialogues, what is learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lfm2_mm
from lfm2_audio import nano_answers, nano_voice
from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.conversation import Conversation
from lfm2_audio.nano_answers import Lessons, Task, dialogue_loss
from lfm2_audio.nano_data import files, tokenizer
from lfm2_audio.nano_dialogues import (
    N_AUDIO,
    Exchange,
    Heard,
    Words,
    answered,
    collate,
    joined,
    read,
    transcribed,
)
from lfm2_audio.prompts import CONVERSATION
from lfm2_audio.speech.questions import (
    NUMBERS,
    QUESTION_KINDS,
    UNKNOWN,
    answer,
    answer_words,
    question,
)
from lfm2_audio.speech.sentences import is_held_out, lexicon
from lfm2_mm.events import TextDelta
from lfm2_mm.tokenizer import Tokenizer
from lfm2_mm.train.objectives import IGNORE

TEXT_END, IM_END, AUDIO_START = 130, 7, 128


# -- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("what is seven plus eight", "fifteen"),
        ("please add nine and nine", "eighteen"),
        ("how much is two minus nine", "minus seven"),
        ("how much is six times seven", "forty two"),
        ("what is the capital of peru", "lima"),
        ("is oslo the capital of norway", "yes"),
        ("is oslo the capital of cuba", "no"),
        ("how do you spell mouse", "m o u s e"),
        ("say dog cat dog", "dog cat dog"),
        ("please say big red hat", "big red hat"),
        ("what is three in german", "drei"),
        ("how do you say eleven in spanish", "once"),
        ("what is twenty plus two", None),
        ("what is thirty in german", None),
        ("how do you spell beautiful", None),
        ("is oslo the capital of cuba now", None),
        ("turn on the kitchen light", None),
    ],
)
def test_answers(text: str, wanted: str | None) -> None:
    assert answer(text) == wanted


def test_every_question_has_an_answer_in_words_that_can_be_said() -> None:
    known = {*lexicon(), *answer_words()}
    for kind in QUESTION_KINDS:
        for split in ("train", "held_out"):
            for i in range(40):
                text, found = question(5, i, split, kind=kind)
                assert found == kind and is_held_out(text) == (split == "held_out")
                right = answer(text)
                assert right is not None and set(right.split()) <= known
                assert set(text.split()) <= set(lexicon())
    assert set(UNKNOWN.split()) <= known
    assert {kind for _, kind in (question(1, i) for i in range(60))} == set(QUESTION_KINDS)


def test_questions_are_pure_functions() -> None:
    assert question(3, 7) == question(3, 7)
    assert len({question(3, i)[0] for i in range(50)}) > 40


def test_words_of_answers_are_no_words_of_sentences() -> None:
    assert not set(answer_words()) & set(lexicon())
    assert {"yes", "no", "know", "zwölf", "b"} <= set(answer_words())
    assert all(len(numbers) == 12 for numbers in NUMBERS.values())


# -- dialogues -----------------------------------------------------------------------------------


def words() -> Words:
    known = (*lexicon(), *answer_words())
    return Words({word: torch.full((3, 4), i + 1) for i, word in enumerate(known)})


def test_a_short_answer_is_text_then_speech() -> None:
    rows = torch.randn(5, 160)
    one = answered(rows, "forty two", words())
    ids = [step for step in one.steps if isinstance(step, int)]
    assert tokenizer().decode(ids[:-2]) == "forty two"
    assert ids[-2:] == [TEXT_END, IM_END]
    assert [isinstance(step, int) for step in one.steps] == [True] * 3 + [False] * 7 + [True]
    last, named = one.steps[-2]  # type: ignore[misc]
    assert last.tolist() == [END_OF_AUDIO] * 4 and named == IGNORE
    assert tokenizer().decode([one.steps[3][1]]) == " forty"  # type: ignore[index]


def test_a_long_answer_takes_turns() -> None:
    one = answered("please spell the word picture", "p i c t u r e", words())
    kinds = "".join("t" if isinstance(step, int) else "a" for step in one.steps)
    assert kinds == "t" * 6 + "a" * 12 + "tt" + "a" * 10 + "t"


def test_an_answer_without_speech_ends_with_its_text() -> None:
    one = answered("say cat cat cat", "cat cat cat", None)
    assert one.steps[-1] == TEXT_END
    assert all(isinstance(step, int) for step in one.steps)


def test_the_layout_is_that_of_a_conversation(tmp_path: Path) -> None:
    """What is learnt is what the model is asked with."""
    for name, text in files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text("{}")
    model: Any = SimpleNamespace(tokenizer=Tokenizer.load(tmp_path))
    asked = Conversation(CONVERSATION).user("say cat cat cat")
    one = answered("say cat cat cat", "cat cat cat", None)
    assert isinstance(one.user, list)
    assert asked.to_prompt(model).ids.tolist() == [*one.before, *one.user, *one.lead]


def segments(one: Exchange) -> list[Any]:
    """An answer as the events of a handle."""
    said: list[Any] = []
    for step in one.steps:
        if isinstance(step, tuple):
            said.append(step[0])
        elif step != IM_END:
            said.append(TextDelta(tokenizer().decode([step]), (step,)))
    return said


@pytest.mark.parametrize("rounds", [None, 0, 1, 2])
def test_what_follows_an_answer_is_laid_out_as_in_a_conversation(rounds: int | None) -> None:
    """Also after one that was interrupted: before it was heard at all, and later."""
    model = lfm2_mm.load("nano-audio")
    first = answered("please spell the word picture", "p i c t u r e", words())
    talk = Conversation(CONVERSATION).user("please spell the word picture")
    talk = talk.assistant(segments(first))
    if rounds is not None:
        first, talk = first.cut(rounds), talk.cut(rounds * N_AUDIO)
    second = answered("say cat cat cat", "cat cat cat", None)
    made = collate([joined([first, second])], width=160, books=4)
    asked = talk.user("say cat cat cat").to_prompt(model)
    until = len(asked.ids)
    framed = made.framed[0, :until]
    assert (
        int(made.framed.sum())
        == int(framed.sum())
        == sum(s.prepared.n_positions for s in asked.slots)
    )
    torch.testing.assert_close(made.ids[0, :until][~framed], asked.ids[~framed])
    assert made.ids[0, until:].tolist() == second.steps
    # nothing but answers is learnt, and no end of an answer that was cut
    answers = made.ids[0][made.answered[0] & ~made.framed[0]].tolist()
    assert answers.count(IM_END) == (rounds in (None, 2))


def test_a_cut_keeps_whole_rounds() -> None:
    one = answered("please spell the word picture", "p i c t u r e", words())
    assert one.cut(2) is one and one.cut(9) is one
    assert one.cut(0).steps == []
    kinds = "".join("t" if isinstance(step, int) else "a" for step in one.cut(1).steps)
    assert kinds == "t" * 6 + "a" * 12


def test_reading_and_writing_down() -> None:
    one = read("red cat", words())
    assert one.steps[0] == AUDIO_START and one.steps[-1] == IM_END and len(one.steps) == 9
    rows = torch.randn(4, 160)
    two = transcribed(Heard("red cat", rows, chain=True))
    assert two.user is rows and two.steps[-1] == IM_END
    prompt = tokenizer().decode(two.before, skip_special_tokens=False)
    assert prompt.endswith("Perform ASR.<|im_end|>\n<|im_start|>user\n")


def test_a_batch_of_dialogues() -> None:
    rows = torch.randn(5, 160)
    spoken, typed = answered(rows, "paris", words()), answered("say cat cat cat", "cat", None)
    batch = collate([joined([spoken]), joined([typed])], width=160, books=4)
    assert batch.ids.shape == (2, spoken.size)
    at = len(spoken.before)
    torch.testing.assert_close(batch.heard[0, at : at + 5], rows)
    assert batch.hearing[0].sum() == 5 and not batch.hearing[1].any()
    assert batch.framed[0].sum() == 4 and not batch.framed[1].any()
    assert int(batch.answered[0].sum()) == len(spoken.steps)
    assert (batch.ids[1, typed.size :] == IGNORE).all()
    assert batch.codes[0][batch.framed[0]][-1].tolist() == [END_OF_AUDIO] * 4


# -- lessons -------------------------------------------------------------------------------------


def lessons() -> Lessons:
    rng = np.random.default_rng(0)
    texts = [question(0, i)[0] for i in range(8)] + ["turn on the light", "red cat"]
    heard = [
        Heard(text, torch.from_numpy(rng.normal(size=(4 + i, 160)).astype(np.float32)), i == 9)
        for i, text in enumerate(texts)
    ]
    return Lessons(heard, words())


@pytest.mark.parametrize("name", list(nano_answers.TASKS))
def test_a_step_of_every_task(name: str) -> None:
    one = lessons()
    tasks = {name: Task(share=1.0, batch=3)}
    batch, again = one.step(1, 4, tasks), one.step(1, 4, tasks)
    torch.testing.assert_close(batch.ids, again.ids)
    torch.testing.assert_close(batch.heard, again.heard)
    assert len(batch.ids) == 3
    assert bool(batch.framed.any()) == (name in ("answered", "again", "read"))
    assert bool(batch.hearing.any()) == (name in ("heard", "answered", "again", "transcribed"))


def test_tasks_take_turns() -> None:
    one = lessons()
    tasks = {"typed": Task(share=1, batch=1), "read": Task(share=1, batch=1)}
    spoken = [bool(one.step(1, i, tasks).framed.any()) for i in range(12)]
    assert True in spoken and False in spoken


def test_it_learns_an_answer() -> None:
    torch.manual_seed(0)
    model = nano_voice.Speaker()
    one = answered(torch.randn(4, 160), "paris", words())
    batch = collate([joined([one])], width=160, books=4)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    first = 0.0
    for _ in range(25):
        loss, parts = dialogue_loss(model, batch)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss.detach()) < 0.2 * first
    assert set(parts) == {"tokens", "tokens_right", "code_0", "codes", "words"}


def test_text_alone_asks_no_voice() -> None:
    model = nano_voice.Speaker()
    batch = collate([joined([answered("say cat cat cat", "cat", None)])], width=160, books=4)
    loss, parts = dialogue_loss(model, batch)
    torch.autograd.backward(loss)
    assert set(parts) == {"text", "text_right"}
    assert all(p.grad is None for p in model.voice.parameters())
