"""How nano-audio is watched while it learns: what it hears, and word error rates for the log.

The evaluation proper is in the evals. Knows neither losses nor a schedule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lfm2_audio.losses import collapsed, text_rows
from lfm2_audio.nano_data import tokenizer
from lfm2_audio.speech.manifest import EVAL_SETS
from lfm2_audio.speech.sentences import lexicon
from lfm2_audio.training import ANSWER, END, PROMPT, Features, normalised
from lfm2_mm.train.attention import PlainWhole

if TYPE_CHECKING:
    from lfm2_audio.nano import Recogniser

__all__ = ["heard", "held_out_scores", "word_errors"]


@torch.no_grad()
def heard(
    model: Recogniser, mels: Sequence[NDArray[np.float32]], *, text: bool, longest: int = 24
) -> tuple[list[str], list[str]]:
    """What the head reads in each recording, and what the backbone writes about it, greedily.

    Args:
        model: The recogniser.
        mels: Features before normalisation.
        text: Whether the backbone is asked; otherwise its answers are empty.
        longest: Most tokens of an answer.
    """
    rows = model.conformer([torch.from_numpy(normalised(mel).T) for mel in mels])
    rows = [model.audio_adapter(part) for part in rows]
    words = lexicon()
    read = []
    for part in rows:
        classes = model.head(part[None], model.lfm.embed_tokens.weight)[0].argmax(-1)
        read.append(" ".join(words[i - 1] for i in collapsed(classes)))
    if not text:
        return read, [""] * len(mels)
    counts = torch.tensor([len(part) for part in rows])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    tok = tokenizer()
    before, lead, end = (
        torch.tensor(tok.encode(part, add_special_tokens=False).ids)
        for part in (PROMPT, ANSWER, END)
    )
    after = lead.expand(len(rows), -1)
    done = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(longest):
        x, ids = text_rows(model.lfm, padded, counts, before, after)
        hidden = model.lfm(x, PlainWhole(*ids.shape))
        last = len(before) + counts + after.shape[1] - 1
        scores = hidden[torch.arange(len(rows)), last] @ model.lfm.embed_tokens.weight.T
        token = torch.where(done, end[0], scores.argmax(-1))
        after = torch.cat([after, token[:, None]], 1)
        done = done | (token == end[0])
        if done.all():
            break
    answers = [tok.decode(row[len(lead) :].tolist(), skip_special_tokens=True) for row in after]
    return read, [re.sub(r"\s+", " ", answer).strip() for answer in answers]


def word_errors(said: Sequence[str], found: Sequence[str]) -> float:
    """Word error rate: substitutions, deletions and insertions for each word that was said."""
    wrong = sum(_distance(a.split(), b.split()) for a, b in zip(said, found, strict=True))
    return wrong / max(1, sum(len(a.split()) for a in said))


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def held_out_scores(
    model: Recogniser, sets: dict[str, Features], *, text: bool, count: int = 60
) -> dict[str, float]:
    """Quick word error rates for the log; the evaluation proper is in the evals."""
    scores = {}
    for name in EVAL_SETS:
        features = sets[name]
        said = [one.text for one in features.utterances[:count]]
        read, written = heard(model, [features[i] for i in range(count)], text=text)
        scores[f"{name}_ctc"] = round(word_errors(said, read), 4)
        if text:
            scores[f"{name}_text"] = round(word_errors(said, written), 4)
    return scores
