"""How nano-audio learns to answer spoken questions in interleaved text and speech.

Goes on from weights that hear and read aloud, and keeps doing both a little, so that neither is
forgotten. The encoder rests, so recordings are encoded once; facts are learnt from typed questions,
which are short. Knows the recipe of answers, and of dialogues only their kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.nano import CONFIG
from lfm2_audio.nano_data import data
from lfm2_audio.nano_dialogues import (
    Dialogue,
    DialogueBatch,
    Exchange,
    Heard,
    Words,
    answered,
    collate,
    encoded,
    joined,
    read,
    spoken_words,
    transcribed,
)
from lfm2_audio.nano_scores import held_out_scores
from lfm2_audio.nano_voice import Speaker, averaged
from lfm2_audio.speech.questions import UNKNOWN, answer, question
from lfm2_audio.speech.sentences import sentence
from lfm2_mm.train.attention import PlainWhole
from lfm2_mm.train.objectives import IGNORE
from lfm2_mm.train.trainer import Schedule, Trainer

__all__ = ["SEED", "STEPS", "Lessons", "Task", "dialogue_loss", "train_answers"]

STEPS = 6000
"""Length of the recipe of answers."""
SEED = 20261125
"""Of its batches."""

_WEIGHTS = (1.0, 0.6, 0.4, 0.3)  # of the codebooks: the first holds most of what is heard
_FRAMES = 256  # of a step at most that the depthformer learns from
_UNKNOWN = 0.12  # share of what is said to it that is no question it can answer
_SCORED = 30  # utterances of each held-out set, for the log
_CUT = 0.4  # share of answers before the last that are interrupted
_CHOICE = 3  # times as many dialogues are drawn as a batch takes, which are then of like length


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of step.

    Attributes:
        share: Of all steps.
        batch: Dialogues in one.
    """

    share: float
    batch: int


TASKS = {
    "typed": Task(share=0.14, batch=32),  # a typed question, answered in text
    "heard": Task(share=0.16, batch=16),  # a spoken one, answered in text
    "answered": Task(share=0.24, batch=14),  # a spoken one, answered in text and speech
    "again": Task(share=0.20, batch=6),  # one behind others, answered or interrupted
    "read": Task(share=0.12, batch=12),
    "transcribed": Task(share=0.14, batch=16),
}
"""What steps are spent on."""

_TYPED = {"arithmetic": 0.5, "capital": 0.12, "spelling": 0.14, "echo": 0.08, "translation": 0.16}


class Lessons:
    """Makes the batch of a step.

    Args:
        heard: Recordings, encoded.
        words: How the assistant says each word.
    """

    def __init__(self, heard: Sequence[Heard], words: Words) -> None:
        self.heard, self.words = heard, words
        plain = [one for one in heard if not one.chain]
        self._asked = [one for one in plain if answer(one.text) is not None]
        self._others = [one for one in plain if answer(one.text) is None]

    def step(self, seed: int, step: int, tasks: dict[str, Task] | None = None) -> DialogueBatch:
        """The batch of a step, a pure function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        tasks = tasks or TASKS
        shares = np.array([task.share for task in tasks.values()])
        name = list(tasks)[int(rng.choice(len(tasks), p=shares / shares.sum()))]
        size = tasks[name].batch
        places = ((seed, step, i) for i in range(_CHOICE * size))
        if name == "again":
            drawn = [self._again(rng, place) for place in places]
        else:
            drawn = [joined([self._exchange(name, rng, place)]) for place in places]
        drawn.sort(key=lambda one: one.size)
        start = int(rng.integers(0, _CHOICE)) * size
        made = collate(
            drawn[start : start + size],
            width=CONFIG.backbone.hidden_size,
            books=CONFIG.codebooks,
        )
        return made

    def _again(self, rng: np.random.Generator, place: tuple[int, ...]) -> Dialogue:
        """Two to four questions; every answer but the last may have been interrupted."""
        said = []
        for _ in range(int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))):
            one = self._exchange("answered", rng, place)
            said.append(one.cut(int(rng.integers(0, 5))) if rng.random() < _CUT else one)
        last = self._exchange("answered" if rng.random() < 0.5 else "heard", rng, place)
        return joined([*said, last])

    def _exchange(self, name: str, rng: np.random.Generator, place: tuple[int, ...]) -> Exchange:
        seed, index = place[0], int(place[1]) * 1000 + place[2]
        if name == "read":
            if rng.random() < 0.4:
                drawn = rng.choice(list(self.words.frames), int(rng.integers(1, 9))).tolist()
                return read(" ".join(drawn), self.words)
            return read(sentence(seed, index)[0], self.words)
        if name == "transcribed":
            return transcribed(self.heard[int(rng.integers(len(self.heard)))])
        known = rng.random() >= _UNKNOWN
        if name == "typed":
            about = str(rng.choice(list(_TYPED), p=list(_TYPED.values())))
            text = (question(seed, index, kind=about) if known else sentence(seed, index))[0]
            return answered(text, answer(text) or UNKNOWN, None)
        among = self._asked if known else self._others
        one = among[int(rng.integers(len(among)))]
        words = self.words if name == "answered" else None
        return answered(one.rows, answer(one.text) or UNKNOWN, words)


def dialogue_loss(model: Speaker, batch: DialogueBatch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens, and of codes and the words that they belong to."""
    lfm, voice = model.hearing.lfm, model.voice
    x = lfm.embed(batch.ids.clamp(min=0))
    x = torch.where(batch.hearing[..., None], batch.heard.to(x.dtype), x)
    spoken = bool(batch.framed.any())
    if spoken:
        x = torch.where(batch.framed[..., None], voice.frames(batch.codes).to(x.dtype), x)
    hidden = lfm(x, PlainWhole(*batch.ids.shape))[:, :-1]
    table = lfm.embed_tokens.weight
    written = (batch.ids != IGNORE) & batch.answered
    scores = F.linear(hidden[written[:, 1:]], table).float()
    wanted = batch.ids[written]
    total = F.cross_entropy(scores, wanted)
    right = float((scores.argmax(-1) == wanted).float().mean())
    if not spoken:
        return total, {"text": float(total.detach()), "text_right": right}
    parts = {"tokens": float(total.detach()), "tokens_right": right}
    rows, codes = hidden[batch.framed[:, 1:]], batch.codes[batch.framed]
    step = -(-len(codes) // _FRAMES)  # evenly, so that no part of an answer is left out for good
    first = int(batch.ids.sum()) % step
    rows, codes, names = (part[first::step] for part in (rows, codes, batch.words[batch.framed]))
    named = F.cross_entropy(F.linear(rows, table).float(), names, reduction="sum")
    words = named / (names != IGNORE).sum().clamp(min=1)
    logits = voice.depthformer(rows, codes).float()
    ended = codes[:, 0] == END_OF_AUDIO
    # what follows the end of speech in its frame is never drawn
    targets = torch.where(ended[:, None] & (torch.arange(codes.shape[1]) > 0), IGNORE, codes)
    losses = [F.cross_entropy(logits[:, k], targets[:, k]) for k in range(codes.shape[1])]
    weights = _WEIGHTS[: len(losses)]
    said = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert isinstance(said, Tensor)
    parts["code_0"], parts["codes"] = float(losses[0].detach()), float(said.detach())
    parts["words"] = float(words.detach())
    return total + said + 0.3 * words, parts


def train_answers(
    start: Speaker,
    folder: Path,
    data_folder: Path,
    *,
    steps: int = STEPS,
    seed: int = SEED,
    until: int | None = None,
    score_every: int = 1000,
    say: Callable[[str], None] = print,
) -> Speaker:
    """Teach what hears and reads aloud to answer, or go on with the folder's checkpoint.

    Args:
        start: What hears and speaks already.
        folder: Where checkpoints and logs go.
        data_folder: Where recordings are.
        steps: Length of the recipe.
        seed: Of the batches.
        until: Step to stop at.
        score_every: Steps between two scorings of what it still hears.
        say: Where progress goes.

    Returns:
        Averaged weights.
    """
    words = spoken_words(data_folder, say=say)
    model, hearing = start, start.hearing
    heard = encoded(data_folder, hearing.conformer, hearing.audio_adapter, words, say=say)
    lessons, sets = Lessons(heard, words), data(data_folder, say=say)

    def loss(batch: DialogueBatch) -> tuple[Tensor, dict[str, float]]:
        return dialogue_loss(model, batch)

    # steps are so small that casting to bf16 and back costs more than it saves
    schedule = Schedule(steps=steps, warmup=60, peak=1.2e-3)
    trainer = Trainer(model, loss, schedule, folder, autocast=False)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")

    def batches(stop: int) -> Iterator[DialogueBatch]:
        for step in range(trainer.step, stop):
            yield lessons.step(seed, step)

    end = min(until or steps, steps)
    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        trainer.run(batches(stop), save_every=min(100, score_every), say=say)
        scores = held_out_scores(averaged(trainer).hearing, sets, text=True, count=_SCORED)
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say("held out: " + " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    return averaged(trainer)
