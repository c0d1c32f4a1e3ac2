"""What a benchmark of answers is, and how one is run: a task asks, a model answers, a task scores.

Tasks are small classes (`name`, `len`, `example`, `messages`, `score`), and a run is a list of
outcomes. Several questions are under way at once through the model's engine, each in a prompt of
its own and greedy, so that a run is repeatable. Knows no modality, no file and no table.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_evals.stats import Interval, wilson

if TYPE_CHECKING:
    from lfm2_mm.model import Model, Stream

__all__ = ["Example", "Outcome", "Run", "Score", "Task", "run", "score"]

Progress = Callable[[int, int], None]
"""Called with the number of items done and the number in all."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question.

    Attributes:
        kind: What is asked for; scores are given for each kind.
        question: The text.
        answer: What is expected.
        attachments: Content parts that precede the text, in message form.
        blind: What a guesser says who knows the question and not the attachments; None if the
            task has no such guesser.
        tags: Further properties to split the scores by.
    """

    kind: str
    question: str
    answer: str
    attachments: tuple[Mapping[str, Any], ...] = ()
    blind: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A benchmark: a fixed list of examples, how each is asked and how its answer is scored.

    Attributes:
        name: Short name.
        max_tokens: Tokens that an answer may have.
    """

    name: str
    max_tokens: int

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def example(self, i: int) -> Example:
        """The i-th example, the same each time."""
        ...

    def messages(self, example: Example) -> Sequence[Mapping[str, Any]]:
        """The conversation that asks it."""
        ...

    def score(self, example: Example, answer: str) -> bool:
        """Whether an answer is right."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one example.

    Attributes:
        index: Its number in the task.
        kind: Its kind.
        question: The text that was asked.
        expected: The right answer.
        given: The model's answer.
        right: Whether that was scored as right.
        blind_right: Whether the blind guess was; None without a guesser.
        tags: The example's tags, and what the model made of its attachments.
    """

    index: int
    kind: str
    question: str
    expected: str
    given: str
    right: bool
    blind_right: bool | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class Run:
    """A task that was run, to its end or until somebody stopped it.

    Attributes:
        task: The task's name.
        outcomes: One for each example that was answered, in order.
        total: Examples the task has.
        seconds: Time it took.
    """

    task: str
    total: int
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every example was answered."""
        return len(self.outcomes) == self.total


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a group of examples.

    Attributes:
        name: The group.
        right: Right answers.
        n: Examples.
        blind_right: Right blind guesses; None without a guesser.
        floor: What the accuracy should reach; None if nothing is demanded.
    """

    name: str
    right: int
    n: int
    blind_right: int | None = None
    floor: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 for an empty group."""
        return self.right / self.n if self.n else 0.0

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.right, self.n)

    @property
    def blind(self) -> float | None:
        """Share of right blind guesses."""
        return None if self.blind_right is None or not self.n else self.blind_right / self.n

    @property
    def reached(self) -> bool | None:
        """Whether the floor is reached; None without one."""
        return None if self.floor is None else self.accuracy >= self.floor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        interval = self.interval
        return {
            "name": self.name,
            "n": self.n,
            "right": self.right,
            "accuracy": round(self.accuracy, 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
            "blind": None if self.blind is None else round(self.blind, 4),
            "floor": self.floor,
        }


def score(outcomes: Iterable[Outcome], name: str, *, floor: float | None = None) -> Score:
    """Count the right answers of some outcomes."""
    group = list(outcomes)
    blind = [outcome.blind_right for outcome in group if outcome.blind_right is not None]
    return Score(
        name=name,
        right=sum(outcome.right for outcome in group),
        n=len(group),
        blind_right=sum(blind) if group and len(blind) == len(group) else None,
        floor=floor,
    )


def run(task: Task, model: Model, *, at_once: int = 16, progress: Progress | None = None) -> Run:
    """Ask a model every question of a task.

    An interruption (Ctrl-C) ends the run early; what was answered until then is kept, and `Run`
    says that it is not complete.

    Args:
        task: What to ask.
        model: From `lfm2_mm.load`.
        at_once: Questions under way at the same time.
        progress: Told after each answer.
    """
    from lfm2_mm.sampling import Sampling

    done = Run(task.name, len(task))
    began = time.perf_counter()
    waiting: deque[tuple[int, Example, Stream]] = deque()

    def collect() -> None:
        index, example, stream = waiting[0]
        answer = str(stream.answer)
        done.outcomes.append(_outcome(task, index, example, answer, stream))
        waiting.popleft()
        if progress is not None:
            progress(len(done.outcomes), len(task))

    try:
        for i in range(len(task)):
            example = task.example(i)
            stream = model.generate(
                model.prompt(task.messages(example)),
                max_tokens=task.max_tokens,
                sampling=Sampling(),
                reuse=False,
            )
            waiting.append((i, example, stream))
            if len(waiting) >= at_once:
                collect()
        while waiting:
            collect()
    except KeyboardInterrupt:
        for _, _, stream in waiting:
            stream.cancel()
    done.seconds = time.perf_counter() - began
    return done


def _outcome(task: Task, index: int, example: Example, answer: str, stream: Stream) -> Outcome:
    tiled = any(slot.prepared.info.get("tiles") for slot in stream.prompt.slots)
    made = {"view": "tiled" if tiled else "single"} if stream.prompt.slots else {}
    return Outcome(
        index=index,
        kind=example.kind,
        question=example.question,
        expected=example.answer,
        given=answer,
        right=task.score(example, answer),
        blind_right=None if example.blind is None else task.score(example, example.blind),
        tags={**example.tags, **made},
    )
