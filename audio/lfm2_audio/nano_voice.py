"""How nano-audio learns to speak: texts read aloud as frames of codes, in one voice.

Goes on from weights that hear; every few steps it hears again, so that it does not forget. The
encoder rests. Knows the recipe of the voice, and of hearing only what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.griffin_lim import GriffinLim
from lfm2_audio.losses import text_loss
from lfm2_audio.nano import Recogniser, Voice, build
from lfm2_audio.nano_data import assistant, codec, data, sound_classes, tokenizer
from lfm2_audio.nano_scores import held_out_scores
from lfm2_audio.prompts import DEFAULT_VOICE, tts_prompt
from lfm2_audio.quick import equal_rows
from lfm2_audio.speech.sentences import sentence
from lfm2_audio.training import END, Mix, SpeechBatch, SpeechEncoder
from lfm2_mm.train.attention import PlainWhole
from lfm2_mm.train.objectives import IGNORE
from lfm2_mm.train.trainer import Schedule, Trainer

__all__ = [
    "SEED",
    "STEPS",
    "Reading",
    "ReadingBatch",
    "Speaker",
    "read_loss",
    "speak",
    "train_voice",
]

STEPS = 2000
"""Length of the recipe of the voice."""
SEED = 20261123
"""Of its batches."""

START = "<|audio_start|>"

_BATCH, _LONGEST = 16, 36  # utterances of a step; frames of the longest
_HEAR_EVERY = 4
_CHAINS, _CHAIN = 0.4, 5  # share of steps with words in any order; most of them
_WEIGHTS = (1.0, 0.6, 0.4, 0.3)  # of the codebooks: the first holds most of what is heard


@dataclass(frozen=True)
class ReadingBatch:
    """Texts and how they sound, padded behind their ends.

    Attributes:
        ids: Token ids `[b, n]`; `IGNORE` at frames and padding.
        codes: Frames `[b, n, k]`; zero elsewhere.
        framed: Where frames are, `[b, n]`.
        words: Token id of the word that each frame belongs to, `[b, n]`; `IGNORE` where it is not
            known.
        starts: Where in each row the answer begins, `[b]`.
    """

    ids: Tensor
    codes: Tensor
    framed: Tensor
    words: Tensor
    starts: Tensor


class Speaker(nn.Module):
    """What hears and what speaks under one roof, for one optimizer."""

    def __init__(self, hearing: Recogniser | None = None, voice: Voice | None = None) -> None:
        super().__init__()
        self.hearing = build() if hearing is None else hearing
        self.voice = Voice() if voice is None else voice
        for part in (self.hearing.conformer, self.hearing.audio_adapter):
            part.requires_grad_(False)


class Reading:
    """Texts as prompts, and their frames.

    Sentences are read word by word: a model this small that hears them fluently learns what
    sentences are like, and says another one (docs/LOG.md).

    Args:
        texts: What is said.
        frames: How: codes `[t, k]` of each.
    """

    def __init__(self, texts: Sequence[str], frames: Sequence[Tensor]) -> None:
        kept = [i for i, codes in enumerate(frames) if len(codes) <= _LONGEST]
        self.texts = [texts[i] for i in kept]
        self.frames = [frames[i] for i in kept]
        self._words = {text: i for i, text in enumerate(self.texts) if " " not in text}

    def step(self, seed: int, step: int) -> ReadingBatch:
        """The batch of a step; half of the prompts name a voice."""
        rng = np.random.default_rng((seed, step, 1))
        if rng.random() < _CHAINS:
            count = int(rng.integers(1, _CHAIN + 1))
            words = list(self._words.values())
            drawn = [rng.choice(words, count).tolist() for _ in range(4 * _BATCH)]
        else:
            texts = [sentence(seed, 64 * step + i)[0].split() for i in range(4 * _BATCH)]
            drawn = [[self._words[word] for word in text] for text in texts]
        drawn.sort(key=lambda chain: sum(len(self.frames[i]) for i in chain))
        start = int(rng.integers(0, 4)) * _BATCH
        chosen = drawn[start : start + _BATCH]
        return self.batch(chosen, [bool(rng.random() < 0.5) for _ in chosen])

    def batch(self, chosen: Sequence[Sequence[int]], named: Sequence[bool]) -> ReadingBatch:
        """Rows of these texts, each one or several behind each other."""
        tok = tokenizer()
        rows = []
        end = torch.full((1, self.frames[0].shape[1]), END_OF_AUDIO)
        for chain, with_name in zip(chosen, named, strict=True):
            text = prompt(" ".join(self.texts[i] for i in chain), named=with_name)
            before = tok.encode(text, add_special_tokens=False).ids
            words = []
            for i in chain:
                found = tok.encode(f" {self.texts[i]}", add_special_tokens=False).ids
                known = found[0] if len(found) == 1 else IGNORE
                words += [known] * len(self.frames[i])
            codes = torch.cat([*(self.frames[i] for i in chain), end])
            rows.append((before, codes, [*words, IGNORE]))
        time = max(len(before) + len(said) + 2 for before, said, _ in rows)
        start_id, end_id = (tok.encode(t, add_special_tokens=False).ids[0] for t in (START, END))
        ids = torch.full((len(rows), time), IGNORE)
        framed = torch.zeros(len(rows), time, dtype=torch.bool)
        frames = torch.zeros(len(rows), time, rows[0][1].shape[1], dtype=torch.int64)
        words_at = torch.full_like(ids, IGNORE)
        for i, (before, said, spoken) in enumerate(rows):
            p, n = len(before), len(said)
            ids[i, : p + 1] = torch.tensor([*before, start_id])
            frames[i, p + 1 : p + 1 + n], framed[i, p + 1 : p + 1 + n] = said, True
            ids[i, p + 1 + n] = end_id
            words_at[i, p + 1 : p + 1 + n] = torch.tensor(spoken)
        starts = torch.tensor([len(before) for before, *_ in rows])
        return ReadingBatch(ids, frames, framed, words_at, starts)


def prompt(text: str, *, named: bool) -> str:
    """What stands before the speech."""
    system = tts_prompt(DEFAULT_VOICE) if named else tts_prompt(described=True)
    return (
        f"<|startoftext|><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def read_loss(model: Speaker, batch: ReadingBatch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the codes, weighted by codebook, and of the tokens around them."""
    lfm, voice = model.hearing.lfm, model.voice
    embedded = lfm.embed(batch.ids.clamp(min=0))
    x = torch.where(batch.framed[..., None], voice.frames(batch.codes), embedded)
    hidden = lfm(x, PlainWhole(*batch.ids.shape))[:, :-1]
    place = torch.arange(batch.ids.shape[1])
    answered = place >= batch.starts[:, None]
    next_token = (batch.ids != IGNORE) & answered
    scores = F.linear(hidden[next_token[:, 1:]], lfm.embed_tokens.weight).float()
    tokens = F.cross_entropy(scores, batch.ids[next_token])
    wanted = batch.codes[batch.framed]
    logits = voice.depthformer(hidden[batch.framed[:, 1:]], wanted).float()
    ended = wanted[:, 0] == END_OF_AUDIO
    # what follows the end of speech in its frame is never drawn
    targets = torch.where(ended[:, None] & (torch.arange(wanted.shape[1]) > 0), IGNORE, wanted)
    losses = [F.cross_entropy(logits[:, k], targets[:, k]) for k in range(wanted.shape[1])]
    weights = _WEIGHTS[: len(losses)]
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert isinstance(total, Tensor)
    right = (logits[:, 0].argmax(-1) == wanted[:, 0]).float().mean()
    parts = {f"code_{k}": float(loss.detach()) for k, loss in enumerate(losses)}
    # whoever knows which word is being said finds the next one in the text: so that is asked, too
    named = batch.words != IGNORE
    guesses = F.linear(hidden[named[:, 1:]], lfm.embed_tokens.weight).float()
    words = F.cross_entropy(guesses, batch.words[named], reduction="sum")
    words = words / named.sum().clamp(min=1)
    parts |= {"right_0": float(right), "tokens": float(tokens.detach())}
    parts["words"] = float(words.detach())
    return total + 0.1 * tokens + 0.5 * words, parts


def hear_loss(model: Speaker, batch: SpeechBatch) -> tuple[Tensor, dict[str, float]]:
    """What the backbone writes about sound, the encoder at rest."""
    hearing = model.hearing
    with torch.no_grad():
        encoded = equal_rows(hearing.conformer, batch.mel)
        rows = hearing.audio_adapter(encoded.flatten(0, 1)).view(*batch.row_words.shape, -1)
    counts = torch.full((len(rows),), rows.shape[1])
    loss = text_loss(hearing.lfm, rows, counts, batch)
    return loss, {"text": float(loss.detach())}


@torch.no_grad()
def speak(model: Speaker, text: str, *, longest: int = 50, named: bool = False) -> Tensor:
    """Frames of a text read aloud, `[t, k]`, the likeliest code each time."""
    lfm, voice = model.hearing.lfm, model.voice
    tok = tokenizer()
    ids = tok.encode(prompt(text, named=named) + START, add_special_tokens=False).ids
    rows = [lfm.embed(torch.tensor(ids))]
    said: list[Tensor] = []
    for _ in range(longest):
        x = torch.cat(rows)[None]
        hidden = lfm(x, PlainWhole(1, x.shape[1]))[0, -1:]
        frame = voice.depthformer.frames(hidden, lambda _, scores: scores.argmax(-1))
        if int(frame[0, 0]) == END_OF_AUDIO:
            break
        said.append(frame)
        rows.append(voice.frames(frame))
    return torch.cat(said) if said else torch.zeros(0, voice.frames.codebooks, dtype=torch.int64)


def readings(folder: Path, found: GriffinLim, *, say: Callable[[str], None] = print) -> Reading:
    """Every word as it was recorded in the assistant's voice, as codes."""
    recordings = assistant(folder, say=say)[1]
    texts = [one.text for one in recordings.utterances]
    waves = (torch.from_numpy(recordings.wave(i)) for i in range(len(recordings)))
    return Reading(texts, [found.encode(wave) for wave in waves])


def train_voice(
    start: Speaker,
    folder: Path,
    data_folder: Path,
    *,
    steps: int = STEPS,
    seed: int = SEED,
    until: int | None = None,
    score_every: int = 500,
    say: Callable[[str], None] = print,
) -> Speaker:
    """Teach what hears to speak, or go on with the folder's checkpoint; averaged weights.

    Args:
        start: What hears already, and what shall speak.
        folder: Where checkpoints and logs go.
        data_folder: Where recordings are.
        steps: Length of the recipe.
        seed: Of the batches.
        until: Step to stop at.
        score_every: Steps between two scorings of what it still hears.
        say: Where progress goes.
    """
    sets = data(data_folder, say=say)
    reading = readings(data_folder, codec(data_folder, say=say), say=say)
    encoder = SpeechEncoder(sets["train"], tokenizer(), sound_classes(data_folder))
    model = start

    def loss(batch: SpeechBatch | ReadingBatch) -> tuple[Tensor, dict[str, float]]:
        if isinstance(batch, ReadingBatch):
            return read_loss(model, batch)
        return hear_loss(model, batch)

    trainer = Trainer(model, loss, Schedule(steps=steps, warmup=100, peak=1.2e-3), folder)
    if trainer.resume():
        say(f"resumed at step {trainer.step}")

    def batches(stop: int) -> Iterator[SpeechBatch | ReadingBatch]:
        for step in range(trainer.step, stop):
            if step % _HEAR_EVERY == 0:
                yield encoder.step(seed, step, Mix(chains=0.1, chain=5, batch=16))
            else:
                yield reading.step(seed, step)

    end = min(until or steps, steps)
    while trainer.step < end:
        stop = min(end, (trainer.step // score_every + 1) * score_every)
        trainer.run(batches(stop), save_every=score_every, say=say)
        scores = held_out_scores(averaged(trainer).hearing, sets, text=True)
        with (folder / "scores.jsonl").open("a") as log:
            log.write(json.dumps({"step": trainer.step, **scores}) + "\n")
        say("held out: " + " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    return averaged(trainer)


def averaged(trainer: Trainer) -> Speaker:
    """A copy of the model that holds the averaged weights."""
    copy = Speaker()
    state = {name: value.detach().float().cpu() for name, value in trainer.averaged().items()}
    copy.load_state_dict(state, strict=False)
    return copy.eval()
