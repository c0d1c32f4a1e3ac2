"""The second recogniser: what it hears with, what it learns, how it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lfm2_audio import nano_judge
from lfm2_audio.nano import initialise
from lfm2_audio.nano_data import analyse, tokenizer
from lfm2_audio.nano_judge import (
    SAME_SOUND,
    Chosen,
    Judge,
    alike,
    judge_loss,
    load_judge,
    save_judge,
    steady,
    words,
)
from lfm2_audio.speech.manifest import record, training
from lfm2_audio.speech.sentences import lexicon
from lfm2_audio.training import Features, Mix, SpeechEncoder
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import ModelNotFound
from tests.audio.test_nano_training import hum


def judge() -> Judge:
    torch.manual_seed(2)
    made = Judge()
    initialise(made)
    return made.eval()


def encoder(folder: Path) -> SpeechEncoder:
    recordings = record(training(12), folder, speak=hum, say=lambda _: None)
    features = Features(recordings, folder, analyse)
    sounds = {word: [1 + len(word) % 5, 2] for word in lexicon()}
    chosen = Chosen([(features, i) for i in range(3)])
    assert len(chosen) == 3 and chosen.frames(1) == len(chosen[1])
    return SpeechEncoder(chosen, tokenizer(), sounds, words=words())


def test_it_learns_words(tmp_path: Path) -> None:
    made = judge().train()
    batch = encoder(tmp_path).step(1, 0, Mix(chains=1.0, chain=2, batch=4))
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, parts = judge_loss(made, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert set(parts) == {"rows", "rows_right", "sounds_right"}


def test_it_hears_words_only() -> None:
    wave = np.random.default_rng(0).normal(size=24000).astype(np.float32) * 0.1
    found = judge().transcribe(Audio(torch.from_numpy(wave), 24000)).text
    assert set(found.split()) <= set(words())
    assert judge().transcribe(Audio(torch.zeros(100), 16000)).text == ""


def test_words_of_one_sound_are_one() -> None:
    for pair in SAME_SOUND:
        assert set(pair) <= set(words())
    assert alike("you know two tea") == "u no two t" == alike(alike("you know to t"))
    made = judge()
    with torch.no_grad():  # half of the belief each, and a little more for another word
        made.words.weight.zero_()
        made.words.bias.zero_()
        known = words()
        for word, belief in (("two", 5.0), ("to", 5.0), ("now", 5.3)):
            made.words.bias[1 + known.index(word)] = belief
    assert made.heard([np.zeros((64, nano_judge.SHAPE.n_mels), np.float32)]) == ["two"]


def test_what_flickers_up_is_no_word() -> None:
    scores = torch.full((9, 4), -6.0)
    scores[:4, 1], scores[4:, 2] = 0.0, 0.0
    scores[2, 1], scores[2, 3] = -2.0, 0.0  # for one row another is likelier
    assert scores.argmax(-1).tolist() == [1, 1, 3, 1, 2, 2, 2, 2, 2]
    assert steady(scores, 3.0).tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert steady(scores, 0.0).tolist() == scores.argmax(-1).tolist()
    assert steady(torch.zeros(0, 4), 3.0).tolist() == []


def test_it_is_kept_and_found_again(tmp_path: Path) -> None:
    one = judge()
    path = save_judge(one, tmp_path)
    assert path == tmp_path / nano_judge.FILE and path.stat().st_size < 2_000_000
    two = load_judge(tmp_path)
    for name, value in two.words.state_dict().items():
        torch.testing.assert_close(value, one.words.state_dict()[name].bfloat16().float())
    mel = np.random.default_rng(1).normal(size=(80, 64)).astype(np.float32)
    for parameter in one.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert two.heard([mel]) == one.heard([mel])


def test_without_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no judge/model.safetensors"):
        load_judge(tmp_path)
