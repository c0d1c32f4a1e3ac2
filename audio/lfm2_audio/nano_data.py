"""What nano-audio learns from: recordings by espeak-ng, their features, tokenizer and codec.

Everything is made once below one folder and read from there afterwards. Knows no recipe and no
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfm2_audio.config import MelConfig
from lfm2_audio.griffin_lim import GriffinLim, GriffinLimConfig, fit_codebooks
from lfm2_audio.mel import MelFrontend
from lfm2_audio.speech.manifest import (
    EVAL_SETS,
    Recordings,
    Utterance,
    evaluation,
    record,
    training,
)
from lfm2_audio.speech.questions import NUMBERS, answer_words
from lfm2_audio.speech.sentences import lexicon, sentence
from lfm2_audio.speech.synthesis import phonemes, synthesise
from lfm2_audio.speech.tokenizer import tokenizer_files
from lfm2_audio.speech.voices import ASSISTANT
from lfm2_audio.training import Features

__all__ = [
    "CARD",
    "MEL",
    "SOUNDS",
    "UTTERANCES",
    "analyse",
    "assistant",
    "codec",
    "data",
    "files",
    "foreign_accents",
    "sound_classes",
    "spoken_recordings",
    "tokenizer",
    "word_tokens",
]

MEL = MelConfig(n_mels=64)
"""Features of nano-audio."""

SOUNDS = 64
"""Classes of the head that names sounds; the lexicon has fewer."""

UTTERANCES = 20_000
"""Recordings that it learns from."""

BOOKS, ENTRIES = 4, 512
"""Codebooks of its codec, and how many of the codes of each are in use."""

CARD = """\
# nano-audio

A tiny LFM2-Audio in the official layout, trained by `lfm2-mm train nano-audio` on speech that the
program espeak-ng made: 279 English words, a grammar of everyday sentences, several dozen synthetic
voices. A demonstration and a test object; it does not understand people.

It writes down what is said (`lfm2-mm transcribe`), reads such sentences aloud in one voice, word by
word (`lfm2-mm speak`), and answers short spoken questions in text and speech (`lfm2-mm talk`):

- what two digits add up to, their difference or product ("what is seven plus eight");
- capitals of fourteen countries ("is oslo the capital of norway");
- how one of 25 nouns is spelled ("please spell the word mouse");
- saying three words after one ("say dog cat hat");
- one to twelve in German, French and Spanish ("what is three in german").

One question may follow the other, also one whose answer was interrupted. To anything else it has
learnt to say that it does not know. How often it is right says
`lfm2-mm eval speech`; a second recogniser that shares no weight with it, in `judge/`, hears whether
the right answer was said. Its codec, `audio_griffin_lim/`, is residual vector quantisation with
Griffin-Lim phases; the official code knows neither folder. Weights only: nothing of espeak-ng
(GPL-3.0-or-later) is part of it.
"""
"""What travels with the weights."""

_ASSISTANT_SENTENCES, _CODEC_SENTENCES, _ASSISTANT_SEED = 5000, 500, 20261122
_CODEC_WORD, _CODEC_RARE = 5, 40  # times that the codec is fitted to a word, and to a rare one
_LETTERS_OF_SENTENCES = "ai"  # words of sentences, too, so no `answer_words`
_NATIVE = {"german": "de", "french": "fr-fr", "spanish": "es"}


@cache
def files() -> dict[str, str]:
    """Names and contents of nano-audio's tokenizer files."""
    return tokenizer_files()


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer."""
    return Tokenizer.from_str(files()["tokenizer.json"])


def word_tokens() -> list[int]:
    """The token of each word of the lexicon behind a space."""
    found = [tokenizer().encode(f" {word}", add_special_tokens=False).ids for word in lexicon()]
    assert all(len(ids) == 1 for ids in found), "every word is one token"
    return [ids[0] for ids in found]


def analyse(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel features `[t, m]` before normalisation."""
    frontend, samples = _frontend(), torch.from_numpy(wave)
    mel = frontend.unnormalised(samples[None], torch.tensor([len(wave)]))[0]
    result: NDArray[np.float32] = mel[:, : len(wave) // frontend.config.hop].T.numpy()
    return result


@cache
def _frontend() -> MelFrontend:
    return MelFrontend(MEL)


def data(folder: Path, *, say: Callable[[str], None] = print) -> dict[str, Features]:
    """Recordings and features of training and of the held-out sets, made if they are not there."""
    found = {}
    for name in EVAL_SETS:
        recordings = record(evaluation(name, 300), folder / name, say=say)
        found[name] = Features(recordings, folder / name, analyse)
    recordings = record(training(UTTERANCES), folder / "train", say=say)
    found["train"] = Features(recordings, folder / "train", analyse)
    return found


def sound_classes(folder: Path) -> dict[str, list[int]]:
    """The sounds of each word of the lexicon as numbers from 1; asked of espeak-ng once."""
    path = folder / "sounds.json"
    if not path.exists():
        spoken = {word: phonemes(word) for word in lexicon()}
        known = sorted({sound for sounds in spoken.values() for sound in sounds})
        classes = {word: [known.index(s) + 1 for s in sounds] for word, sounds in spoken.items()}
        path.write_text(json.dumps(classes), encoding="utf-8")
    found: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    assert max(max(sounds) for sounds in found.values()) < SOUNDS
    return found


def assistant(folder: Path, *, say: Callable[[str], None] = print) -> tuple[Recordings, ...]:
    """Recordings of the assistant's voice at the codec's rate: sentences, then every word."""
    said = (sentence(_ASSISTANT_SEED, i) for i in range(_ASSISTANT_SENTENCES))
    parts = {"assistant": list(said), "assistant-words": [(word, "word") for word in lexicon()]}
    speak = partial(synthesise, rate=GriffinLimConfig().rate)
    made = []
    for name, texts in parts.items():
        utterances = [Utterance(text=text, kind=kind, voice=ASSISTANT) for text, kind in texts]
        made.append(record(utterances, folder / name, speak=speak, say=say))
    return tuple(made)


def foreign_accents() -> dict[str, str]:
    """The accent of espeak-ng that says each foreign number as its speakers do."""
    return {word: _NATIVE[name] for name, numbers in NUMBERS.items() for word in numbers}


def spoken_recordings(
    folder: Path, *, say: Callable[[str], None] = print
) -> list[tuple[Recordings, str]]:
    """Every word as the assistant says it, foreign numbers as their speakers do, and the folders.

    At the codec's rate.
    """
    native, utterances = foreign_accents(), []
    for word in answer_words():
        accent = native.get(word, ASSISTANT.accent)
        utterances.append(
            Utterance(text=word, kind="word", voice=replace(ASSISTANT, accent=accent))
        )
    speak = partial(synthesise, rate=GriffinLimConfig().rate)
    more = record(utterances, folder / "assistant-answers", speak=speak, say=say)
    return [(assistant(folder, say=say)[1], "assistant-words"), (more, "assistant-answers")]


def codec(folder: Path, *, say: Callable[[str], None] = print) -> GriffinLim:
    """The codec of the assistant's voice, fitted to recordings of it if it is not there.

    Letters and foreign numbers, a few frames each, count as often as whole sentences do: fitted to
    sentences alone, it makes an e sound like a b (docs/LOG.md).
    """
    target = folder / "codec"
    if not (target / "model.safetensors").exists():
        config = GriffinLimConfig()
        size = config.stack * config.n_mels
        blank = GriffinLim(config, torch.zeros(1, 1, 1), torch.zeros(size, 1), torch.zeros(size))
        waves = assistant(folder, say=say)[0]
        frames = [blank.stacked(torch.from_numpy(waves.wave(i))) for i in range(_CODEC_SENTENCES)]
        rare = {*answer_words(), *_LETTERS_OF_SENTENCES}
        for recordings, _ in spoken_recordings(folder, say=say):
            for i, one in enumerate(recordings.utterances):
                word = blank.stacked(torch.from_numpy(recordings.wave(i)))
                frames += [word] * (_CODEC_RARE if one.text in rare else _CODEC_WORD)
        torch.manual_seed(_ASSISTANT_SEED)
        fitted = fit_codebooks(torch.cat(frames), books=BOOKS, entries=ENTRIES)
        GriffinLim(config, *fitted).save(target)
    return GriffinLim.load(target)
