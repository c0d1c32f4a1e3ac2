"""What nano-audio learns to answer from: questions heard or typed, as rows of the model's inputs.

The encoder rests while answers are learnt, so what it makes of every recording is computed once and
kept. Knows how a dialogue is laid out, neither losses nor a schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.griffin_lim import GriffinLim
from lfm2_audio.nano_data import analyse, codec, data, spoken_recordings, tokenizer
from lfm2_audio.prompts import ASR, CONVERSATION, tts_prompt
from lfm2_audio.speech.augment import Augmentation, augment
from lfm2_audio.speech.manifest import Utterance, record
from lfm2_audio.speech.questions import NUMBERS, answer, question
from lfm2_audio.speech.sentences import stream
from lfm2_audio.speech.synthesis import RATE, resampled
from lfm2_audio.speech.voices import voice
from lfm2_audio.training import Features, normalised
from lfm2_mm.train.objectives import IGNORE

__all__ = [
    "Dialogue",
    "DialogueBatch",
    "Exchange",
    "Heard",
    "Words",
    "answered",
    "collate",
    "encoded",
    "joined",
    "read",
    "spoken_words",
    "transcribed",
]

N_TEXT, N_AUDIO = 6, 12  # of an interleaved answer, as the model's config has them

_SUMS, _QUESTIONS, _SENTENCES, _CHAINS, _OWN_CHAINS = _COUNTS = 400, 2000, 2000, 400, 300
_CHAIN = 9  # most words of a chain
_SEED = 20261124
_TEXT_END, _AUDIO_START, _END = "<|text_end|>", "<|audio_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Heard:
    """A recording as the backbone hears it.

    Attributes:
        text: What is said.
        rows: `[t, d]`.
        chain: Whether it is words behind each other, without sense.
    """

    text: str
    rows: Tensor
    chain: bool


@dataclass(frozen=True)
class Words:
    """How the assistant says each word: frames `[t, k]`, and the token behind a space, if one."""

    frames: dict[str, Tensor]

    def said(self, text: str) -> tuple[Tensor, list[int]]:
        """Frames of a text, the end of speech included, and the token of each frame's word."""
        parts, named = [], list[int]()
        for word in text.split():
            found = _ids(f" {word}")
            parts.append(self.frames[word])
            named += [found[0] if len(found) == 1 else IGNORE] * len(self.frames[word])
        end = torch.full((1, parts[0].shape[1]), END_OF_AUDIO)
        return torch.cat([*parts, end]), [*named, IGNORE]


Step = int | tuple[Tensor, int]
"""Of an answer: a token id, or a frame's codes with the token of its word."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, step by step.

    Attributes:
        before: Token ids before the user's words.
        user: Their token ids, or rows `[t, d]`.
        lead: Token ids between them and the answer.
        steps: The answer.
    """

    before: list[int]
    user: list[int] | Tensor
    lead: list[int]
    steps: list[Step]

    @property
    def size(self) -> int:
        """Positions in all."""
        return len(self.before) + len(self.user) + len(self.lead) + len(self.steps)

    def cut(self, rounds: int) -> Exchange:
        """With no more of the answer than so many rounds of frames, as `Conversation.cut` does."""
        frames = [place for place, step in enumerate(self.steps) if not isinstance(step, int)]
        if rounds * N_AUDIO >= len(frames):
            return self
        return replace(self, steps=self.steps[: frames[rounds * N_AUDIO - 1] + 1 if rounds else 0])


@dataclass(frozen=True)
class Dialogue:
    """One question with its answer, or several behind each other."""

    exchanges: tuple[Exchange, ...]

    @property
    def size(self) -> int:
        """Positions in all."""
        return sum(one.size for one in self.exchanges)


@dataclass(frozen=True)
class DialogueBatch:
    """Dialogues, padded behind their ends.

    Attributes:
        ids: Token ids `[b, n]`; `IGNORE` at frames, rows and padding.
        codes: Frames `[b, n, k]`; zero elsewhere.
        framed: Where frames are, `[b, n]`.
        heard: Rows `[b, n, d]`; zero elsewhere.
        hearing: Where rows are, `[b, n]`.
        words: Token of the word of each frame, `[b, n]`; `IGNORE` where there is none.
        answered: Where answers are, `[b, n]`.
    """

    ids: Tensor
    codes: Tensor
    framed: Tensor
    heard: Tensor
    hearing: Tensor
    words: Tensor
    answered: Tensor


def _ids(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return found


def _framing(system: str) -> tuple[list[int], list[int]]:
    before = f"<|startoftext|><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    return _ids(before), _ids("<|im_end|>\n<|im_start|>assistant\n")


def answered(user: str | Tensor, text: str, words: Words | None) -> Exchange:
    """A question, typed or heard, answered in text and, with `words`, in interleaved speech.

    Rounds of 6 tokens and 12 frames, until the text ends; then speech to its end.
    """
    before, lead = _framing(CONVERSATION)
    given = _ids(user) if isinstance(user, str) else user
    tokens = [*_ids(text), *_ids(_TEXT_END)]
    if words is None:
        return Exchange(before, given, lead, [*tokens])
    codes, named = words.said(text)
    frames = list(zip(codes, named, strict=True))
    steps: list[Step] = []
    while len(tokens) > N_TEXT:
        steps += [*tokens[:N_TEXT], *frames[:N_AUDIO]]
        tokens, frames = tokens[N_TEXT:], frames[N_AUDIO:]
    return Exchange(before, given, lead, [*steps, *tokens, *frames, *_ids(_END)])


def transcribed(heard: Heard) -> Exchange:
    """A recording, written down."""
    return Exchange(*_user(ASR, heard.rows), [*_ids(heard.text), *_ids(_END)])


def read(text: str, words: Words) -> Exchange:
    """A text, read aloud."""
    codes, named = words.said(text)
    frames = list(zip(codes, named, strict=True))
    steps: list[Step] = [*_ids(_AUDIO_START), *frames, *_ids(_END)]
    return Exchange(*_user(tts_prompt(described=True), _ids(text)), steps)


def joined(exchanges: Sequence[Exchange]) -> Dialogue:
    """Exchanges of one conversation; the system prompt stands before the first only."""
    end, made = _ids(_END), list(exchanges[:1])
    for last, one in pairwise(exchanges):
        whole = last.steps[-1:] == end
        before = _ids(f"{'' if whole else _END}\n<|im_start|>user\n")
        made.append(replace(one, before=before))
    return Dialogue(tuple(made))


def _user(
    system: str, given: list[int] | Tensor
) -> tuple[list[int], list[int] | Tensor, list[int]]:
    before, lead = _framing(system)
    return before, given, lead


def collate(dialogues: Sequence[Dialogue], *, width: int, books: int) -> DialogueBatch:
    """Dialogues as one batch; rows have `width` columns, frames `books` codes."""
    shape = len(dialogues), max(one.size for one in dialogues)
    ids, words = torch.full(shape, IGNORE), torch.full(shape, IGNORE)
    codes, heard = torch.zeros(*shape, books, dtype=torch.int64), torch.zeros(*shape, width)
    framed, hearing, answered = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for i, one in enumerate(dialogues):
        start = 0
        for part in one.exchanges:
            user = slice(start + len(part.before), start + len(part.before) + len(part.user))
            ids[i, start : user.start] = torch.tensor(part.before)
            if isinstance(part.user, Tensor):
                heard[i, user], hearing[i, user] = part.user.float(), True
            else:
                ids[i, user] = torch.tensor(part.user)
            at, start = user.stop + len(part.lead), start + part.size
            ids[i, user.stop : at] = torch.tensor(part.lead)
            answered[i, at:start] = True
            for place, step in enumerate(part.steps, at):
                if isinstance(step, int):
                    ids[i, place] = step
                else:
                    codes[i, place], words[i, place] = step
                    framed[i, place] = True
    return DialogueBatch(ids, codes, framed, heard, hearing, words, answered)


# -- made once -----------------------------------------------------------------------------------


def spoken_words(folder: Path, *, say: Callable[[str], None] = print) -> Words:
    """Every word that the assistant says, as codes."""
    found, frames = codec(folder, say=say), dict[str, Tensor]()
    for recordings, _ in spoken_recordings(folder, say=say):
        for i, one in enumerate(recordings.utterances):
            frames[one.text] = found.encode(torch.from_numpy(recordings.wave(i)))
    return Words(frames)


@torch.no_grad()
def encoded(
    folder: Path,
    conformer: nn.Module,
    adapter: nn.Module,
    words: Words,
    *,
    say: Callable[[str], None] = print,
) -> list[Heard]:
    """Questions, sentences and chains of words as rows; kept until anything about them changes."""
    parts = [p for module in (conformer, adapter) for p in module.state_dict().values()]
    known = [str((_SEED, _COUNTS)).encode(), *(p.float().numpy().tobytes() for p in parts)]
    known += [frames.numpy().tobytes() for frames in words.frames.values()]
    digest = hashlib.sha256(b"".join(known)).hexdigest()
    path = folder / "rows.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            if facts.get("made") == digest:
                rows = file.get_tensor("rows").split(file.get_tensor("counts").tolist())
                texts = facts["texts"].split("\n")
                chains = file.get_tensor("chains").tolist()
                return [Heard(*one) for one in zip(texts, rows, chains, strict=True)]
    say("encoding what answers are learnt from")
    mels = list(_mels(folder, words, say))
    order = sorted(range(len(mels)), key=lambda i: len(mels[i][1]))
    made: dict[int, Tensor] = {}
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        found = conformer([torch.from_numpy(normalised(mels[i][1]).T) for i in chosen])
        for i, part in zip(chosen, found, strict=True):
            made[i] = adapter(part).half()
    heard = [Heard(mels[i][0], made[i], mels[i][2]) for i in range(len(mels))]
    tensors = {
        "rows": torch.cat([one.rows for one in heard]),
        "counts": torch.tensor([len(one.rows) for one in heard]),
        "chains": torch.tensor([one.chain for one in heard]),
    }
    texts_kept = "\n".join(one.text for one in heard)
    save_file(tensors, path, metadata={"made": digest, "texts": texts_kept})
    return heard


def _mels(
    folder: Path, words: Words, say: Callable[[str], None]
) -> list[tuple[str, NDArray[np.float32], bool]]:
    """Text, features before normalisation, and whether it is a chain; every other one disturbed."""
    utterances = []
    for i in range(_SUMS):  # the other recordings hold few sums of single digits
        text, kind = question(_SEED, i, kind="arithmetic")
        who = voice(stream("voice", _SEED, i, "train"))
        utterances.append(Utterance(text=text, kind=kind, voice=who))
    recordings = record(utterances, folder / "sums", say=say)
    sums, train = Features(recordings, folder / "sums", analyse), data(folder, say=say)["train"]
    rng = np.random.default_rng(_SEED)
    found = [(one.text, sums[i], False) for i, one in enumerate(sums.utterances)]
    single, asked, others = list[int](), list[int](), list[int]()
    for i, spoken in enumerate(train.utterances):
        is_asked = answer(spoken.text) is not None
        (single if spoken.kind == "word" else asked if is_asked else others).append(i)
    for among, count in ((asked, _QUESTIONS), (others, _SENTENCES)):
        for i in rng.choice(among, count, replace=False).tolist():
            found.append((train.utterances[i].text, train[i], False))
    for _ in range(_CHAINS):
        drawn = rng.choice(single, int(rng.integers(2, _CHAIN + 1))).tolist()
        text = " ".join(train.utterances[i].text for i in drawn)
        found.append((text, _chained([train[i] for i in drawn], rng), True))
    own = _own(words, codec(folder, say=say))
    names = list(own)
    for _ in range(_OWN_CHAINS):
        chosen = rng.choice(names, int(rng.integers(1, _CHAIN + 1))).tolist()
        found.append((" ".join(chosen), _chained([own[word] for word in chosen], rng), True))
    how = Augmentation()
    return [
        (text, augment(mel, rng, how) if i % 2 else mel, chain)
        for i, (text, mel, chain) in enumerate(found)
    ]


def _own(words: Words, found: GriffinLim) -> dict[str, NDArray[np.float32]]:
    """Features of the words that can be written down, as the codec lets the assistant say them."""
    foreign = {word for numbers in NUMBERS.values() for word in numbers} - {"six"}
    made = {}
    for word, frames in words.frames.items():
        if word not in foreign:
            wave = found.decode(frames).numpy().astype(np.float32)
            made[word] = analyse(resampled(wave, found.rate, RATE))
    return made


def _chained(mels: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> NDArray[np.float32]:
    """Words behind each other, at different distances."""
    parts = [mel[int(rng.integers(0, 10)) : len(mel) - int(rng.integers(0, 10))] for mel in mels]
    return np.concatenate(parts)
