"""The task `scenes`: purity, what is held out, the blind guesser, the run and its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lfm2_evals.blind import BlindGuesser
from lfm2_evals.scenes import TIERS, Scenes, scores, slices
from lfm2_evals.task import Outcome, run, score
from lfm2_mm.errors import SettingError
from lfm2_vision.scenes import CORE_KINDS, HELD_OUT_WORDS, QA, SIGNS, generate, wordings


@dataclass
class FakeStream:
    """A stream of the model below."""

    text: str
    prompt: Any
    cancelled: bool = False

    @property
    def answer(self) -> str:
        if self.text == "stop here":
            raise KeyboardInterrupt
        return self.text

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakePrompt:
    """What was asked, and what became of the picture."""

    question: str
    slots: Sequence[Any] = ()


@dataclass
class FakeModel:
    """Answers from a list, and remembers how it was asked."""

    answers: Iterator[str]
    asked: list[dict[str, Any]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> FakePrompt:
        image, text = messages[0]["content"]
        assert (image["type"], text["type"]) == ("image", "text")
        return FakePrompt(text["text"])

    def generate(self, prompt: FakePrompt, **options: Any) -> FakeStream:
        self.asked.append(options)
        self.streams.append(FakeStream(next(self.answers), prompt))
        return self.streams[-1]


def asked(tier: str, count: int) -> list[QA]:
    return Scenes(tier, count=count).questions()


# --- what is asked ------------------------------------------------------------------------------


def test_examples_are_pure_and_those_of_the_held_out_split() -> None:
    one, other = Scenes("core", count=3), Scenes("core", count=3)
    made = [one.example(i) for i in range(len(one))]
    for i in reversed(range(len(other))):
        example = other.example(i)
        assert example.question == made[i].question and example.answer == made[i].answer
        picture, first = example.attachments[0]["image"], made[i].attachments[0]["image"]
        assert picture.tobytes() == first.tobytes()
    for index in range(3):
        sample = generate(one.seed, index, split="held_out")
        mine = [e for e in made if e.tags["scene"] == str(index)]
        assert mine[0].attachments[0]["image"].tobytes() == sample.image.tobytes()
        core = [(e.question, e.answer) for e in mine if e.kind in CORE_KINDS]
        assert core == [(qa.question, qa.answer) for qa in sample.questions]


def test_a_longer_run_begins_with_the_questions_of_a_shorter_one() -> None:
    assert asked("core", 40)[: len(asked("core", 20))] == asked("core", 20)


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_asks_its_kinds_in_its_wordings(tier: str) -> None:
    questions = asked(tier, 60)
    assert {qa.kind for qa in questions} == set(TIERS[tier].kinds)
    seen = TIERS[tier].wordings == "seen"
    assert all(qa.wording_seen is seen for qa in questions)


def test_half_of_the_scenes_show_a_held_out_pair_and_of_the_signs_a_held_out_word() -> None:
    core = Scenes("core", count=400)
    held_out = [core.scene(i).has_held_out_pair for i in range(400)]
    assert 0.4 < sum(held_out) / 400 < 0.6
    words = Counter(qa.answer in HELD_OUT_WORDS for qa in asked("signs", 400))
    assert 0.25 < words[True] / 400 < 0.45  # of the 7 in 10 scenes with a sign one half
    assert SIGNS.sign_probability == 0.7


def test_unknown_tiers_and_empty_runs_are_refused() -> None:
    with pytest.raises(SettingError, match=r"^the tier is 'hard'; choose from core, wordings, "):
        Scenes("hard")
    with pytest.raises(SettingError, match="^the number of scenes is 0; ask for at least 1$"):
        Scenes(count=0)


# --- the blind guesser --------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["core", "wordings", "more-shapes", "small"])
def test_a_blind_guess_gets_little_on_the_very_questions_that_are_asked(tier: str) -> None:
    task = Scenes(tier, count=1500)
    right, total = Counter[str](), Counter[str]()
    for qa in task.questions():
        total[qa.kind] += 1
        right[qa.kind] += task.guess(qa) == qa.answer
    shares = {kind: right[kind] / total[kind] for kind in total}
    assert shares["exist"] <= 0.55 and shares["relation"] <= 0.55, shares
    assert shares["count"] <= 0.30, shares
    assert shares["colour"] <= 0.20 and shares["shape"] <= 0.32, shares


def test_the_guesser_finds_what_is_there_to_be_found_in_the_text() -> None:
    def question(text: str, answer: str) -> QA:
        return QA(kind="exist", question=text, answer=answer, args={})

    taught = [question("Is there a red star?", "yes")] * 70
    taught += [question("Is there a star?", "no")] * 80
    guesser = BlindGuesser(taught)
    assert guesser.guess("exist", "Is there a red star?") == "yes"
    assert guesser.guess("exist", "Do you see any red stars?") == "yes"  # another wording
    assert guesser.guess("exist", "Is there a blue circle?") == "yes"  # colour and shape named
    assert guesser.guess("exist", "Is there a square?") == "no"
    assert guesser.guess("exist", "Well?") == "no"  # the kind's majority
    assert guesser.guess("count", "How many?") == ""


def test_the_guesser_tells_sides_apart() -> None:
    texts = {"left": "Is it left or right of the star?", "above": "Is it over or under the star?"}
    taught = [
        QA(kind="where", question=text, answer=answer, args={})
        for answer, text in texts.items()
        for _ in range(70)
    ]
    guesser = BlindGuesser(taught)
    assert guesser.guess("where", "On which side is it, left or right of the square?") == "left"
    assert guesser.guess("where", "Where is it, above or below the square?") == "above"


# --- the run ------------------------------------------------------------------------------------


def test_a_run_scores_exact_matches_in_order_and_asks_greedily_without_reuse() -> None:
    task = Scenes("core", count=4)
    truth = [qa.answer for qa in task.questions()]
    model = FakeModel(iter([f" {answer}\n" if i else "wrong" for i, answer in enumerate(truth)]))
    seen: list[tuple[int, int]] = []
    done = run(task, model, at_once=3, progress=lambda *n: seen.append(n))  # type: ignore[arg-type]
    assert done.complete and done.total == len(truth)
    assert [outcome.right for outcome in done.outcomes] == [False] + [True] * (len(truth) - 1)
    assert [outcome.index for outcome in done.outcomes] == list(range(len(truth)))
    assert seen == [(i + 1, len(truth)) for i in range(len(truth))]
    assert all(o["sampling"].greedy and o["reuse"] is False for o in model.asked)
    guesses = [task.guess(qa) == qa.answer for qa in task.questions()]
    assert [outcome.blind_right for outcome in done.outcomes] == guesses


def test_an_interrupted_run_keeps_its_answers_and_cancels_the_rest() -> None:
    task = Scenes("core", count=4)
    truth = [qa.answer for qa in task.questions()]
    truth[5] = "stop here"
    model = FakeModel(iter(truth))
    done = run(task, model, at_once=3)  # type: ignore[arg-type]
    assert not done.complete
    assert len(done.outcomes) == 5
    assert [stream.cancelled for stream in model.streams[5:]] == [True] * 3


def test_a_real_model_answers_the_same_however_many_run_at_once(tmp_path: Path) -> None:
    import lfm2_mm
    from lfm2_vision import nano

    nano.export(nano.build(0), tmp_path / "nano")
    model = lfm2_mm.load(tmp_path / "nano")
    task = Scenes("core", count=2)
    task.max_tokens = 3
    together, alone = run(task, model), run(task, model, at_once=1)
    assert [o.given for o in together.outcomes] == [o.given for o in alone.outcomes]
    assert {o.tags["view"] for o in together.outcomes} <= {"single", "tiled"}
    assert model.engine.features.encoded == 2  # one picture each, however many questions


# --- scores -------------------------------------------------------------------------------------


def outcome(kind: str, right: bool, **tags: str) -> Outcome:
    return Outcome(
        index=0,
        kind=kind,
        question="?",
        expected="a",
        given="b",
        right=right,
        blind_right=not right,
        tags=tags,
    )


def test_scores_have_floors_where_the_tier_has_and_leave_where_out_of_the_sum() -> None:
    outcomes = [outcome("colour", True)] * 9 + [outcome("colour", False)]
    outcomes += [outcome("count", False)] * 2 + [outcome("where", True)] * 4
    found = {s.name: s for s in scores(TIERS["core"], outcomes)}
    assert (found["colour"].accuracy, found["colour"].blind) == (0.9, 0.1)
    assert found["colour"].reached is True and found["count"].reached is False
    assert found["where"].floor is None and found["where"].reached is None
    assert found["all of colour, shape, exist, count, relation"].n == 12
    assert found["shape"].n == 0 and found["shape"].accuracy == 0.0
    assert all(s.floor is None for s in scores(TIERS["small"], outcomes))


def test_slices_split_by_pairs_views_and_words() -> None:
    outcomes = [
        outcome("sign", True, pairs="trained", view="tiled", word="held out"),
        outcome("sign", False, pairs="held out", view="single"),
    ]
    found = slices(TIERS["signs"], outcomes)
    assert {name: (group[0].right, group[0].n) for name, group in found.items()} == {
        "only trained pairs": (1, 1),
        "a held-out pair": (0, 1),
        "one view": (0, 1),
        "tiled": (1, 1),
        "held-out word": (1, 1),
    }


def test_a_score_without_guesses_has_no_blind_share() -> None:
    half = Outcome(index=0, kind="k", question="?", expected="a", given="a", right=True)
    assert score([half, outcome("k", True)], "mixed").blind is None
    assert score([], "empty").to_dict()["blind"] is None


def test_every_kind_has_wordings_of_both_sorts() -> None:
    assert all(wordings.SEEN[kind] and wordings.HELD_OUT[kind] for kind in CORE_KINDS)
