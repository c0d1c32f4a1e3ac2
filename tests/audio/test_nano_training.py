"""Batches of speech, and what is learnt from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfm2_audio import nano
from lfm2_audio.losses import WordHead, collapsed, ctc_loss, row_loss, text_rows
from lfm2_audio.nano_data import MEL, SOUNDS, analyse, tokenizer, word_tokens
from lfm2_audio.nano_scores import heard, word_errors
from lfm2_audio.speech.manifest import record, training
from lfm2_audio.speech.sentences import lexicon
from lfm2_audio.speech.voices import Voice
from lfm2_audio.training import BLANK, Features, Mix, SpeechEncoder, normalised
from lfm2_mm.mixing import Whole
from lfm2_mm.train.attention import PlainWhole
from lfm2_mm.train.objectives import IGNORE


def hum(text: str, voice: Voice) -> NDArray[np.float32]:
    n = 1200 * len(text.split()) + 4000
    rng = np.random.default_rng(len(text))
    made = 0.3 * np.sin(np.arange(n) * 0.3) + 0.01 * rng.normal(size=n)
    return np.asarray(made, dtype=np.float32)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Features]:
    folder = tmp_path_factory.mktemp("speech")
    recordings = record(training(60), folder, speak=hum, say=lambda _: None)
    yield Features(recordings, folder, analyse)


@pytest.fixture(scope="module")
def encoder(features: Features) -> SpeechEncoder:
    sounds = {word: [1 + len(word) % 5, 2, 3] for word in lexicon()}
    return SpeechEncoder(features, tokenizer(), sounds)


def test_features_are_kept_and_read_again(features: Features, tmp_path: Path) -> None:
    recordings = record(training(4), tmp_path, speak=hum, say=lambda _: None)
    one = Features(recordings, tmp_path, analyse)
    two = Features(recordings, tmp_path, lambda wave: np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(one[3], two[3])
    wanted = analyse(recordings.wave(3))
    np.testing.assert_allclose(one[3], wanted, atol=0.01)
    assert one.frames(3) == len(wanted) == len(recordings.wave(3)) // MEL.hop


def test_normalised_as_inference_does() -> None:
    from lfm2_audio.mel import MelFrontend

    wave = hum("one two", Voice(accent="en", variant="f1"))
    wanted = MelFrontend(MEL)(torch.from_numpy(wave)).T.numpy()
    np.testing.assert_allclose(normalised(analyse(wave)), wanted, atol=2e-5)


def test_a_batch_of_chains(encoder: SpeechEncoder) -> None:
    batch = encoder.step(1, 0, Mix(chains=1.0, chain=3, batch=6))
    assert batch.mel.shape[:2] == (6, 64)
    assert batch.row_words.shape == (6, -(-batch.mel.shape[2] // 8))
    assert int(batch.word_counts.sum()) == len(batch.words)
    start = 0
    for i, count in enumerate(batch.word_counts.tolist()):
        words = batch.words[start : start + count].tolist()
        start += count
        rows = batch.row_words[i]
        assert set(rows[rows != BLANK].tolist()) == set(words)
        assert (batch.row_sounds[i][rows == BLANK] == 0).all()
        assert (batch.row_sounds[i][rows != BLANK] > 0).all()
        said = [lexicon()[word - 1] for word in words]
        ids = batch.after[i][batch.after[i] != IGNORE].tolist()
        assert tokenizer().decode(ids[batch.answers_from : -1]) == " ".join(said)
        assert ids[-1] == 7


def test_a_batch_of_sentences(encoder: SpeechEncoder) -> None:
    batch = encoder.step(1, 0, Mix(chains=0.0, batch=6))
    assert (batch.row_words == IGNORE).all()
    again = encoder.step(1, 0, Mix(chains=0.0, batch=6))
    torch.testing.assert_close(again.mel, batch.mel)
    other = encoder.step(1, 1, Mix(chains=0.0, batch=6))
    assert other.mel.shape != batch.mel.shape or not torch.equal(other.mel, batch.mel)


def test_words_are_scored_against_their_embeddings() -> None:
    head = WordHead(8, [5, 3])
    table = torch.zeros(6, 8)
    table[5, 0] = table[3, 1] = 1.0
    rows = torch.zeros(1, 3, 8)
    rows[0, 0, 0] = rows[0, 1, 1] = 2.0
    assert head(rows, table).argmax(-1).tolist()[0][:2] == [1, 2]


def test_best_paths() -> None:
    assert collapsed(torch.tensor([0, 3, 3, 0, 3, 5, 5, 0])) == [3, 3, 5]
    assert collapsed(torch.tensor([0, 0])) == []


def test_row_loss_counts_known_rows_only() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 2] = 9.0
    loss, right = row_loss(logits, torch.tensor([[IGNORE, 2, 1, BLANK]]))
    assert right == 0.5
    assert 0.7 < float(loss) < 0.8
    none, zero = row_loss(logits, torch.full((1, 4), IGNORE))
    assert float(none) == 0.0 and zero == 0.0


def test_ctc_prefers_what_was_said(encoder: SpeechEncoder) -> None:
    batch = encoder.step(2, 0, Mix(chains=1.0, chain=2, batch=4))
    good = torch.nn.functional.one_hot(batch.row_words, len(lexicon()) + 1).float() * 20
    blind = torch.zeros_like(good)
    assert float(ctc_loss(good, batch)) < 0.05 * float(ctc_loss(blind, batch))


def test_rows_and_text_stand_where_they_should() -> None:
    model = nano.build()
    rows = torch.randn(2, 5, 160)
    after = torch.tensor([[7, 9, 11], [7, 9, IGNORE]])
    before = torch.tensor([1, 6])
    x, ids = text_rows(model.lfm, rows, torch.tensor([3, 5]), before, after)
    blank = IGNORE
    assert ids.tolist() == [
        [1, 6, blank, blank, blank, 7, 9, 11, blank],
        [1, 6, blank, blank, blank, blank, blank, 7, 9],
    ]
    torch.testing.assert_close(x[0, 2:5], rows[0, :3])
    torch.testing.assert_close(x[1, 2:7], rows[1])
    torch.testing.assert_close(x[1, 8], model.lfm.embed_tokens.weight[9])


def test_causal_is_whole() -> None:
    model = nano.build().eval()
    x = torch.randn(2, 7, 160)
    with torch.no_grad():
        wanted = model.lfm(x, Whole(2, 7))
        found = model.lfm(x, PlainWhole(2, 7))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_it_learns_a_batch(encoder: SpeechEncoder) -> None:
    model = nano.build(1)
    stage = nano.Stage(until=1, mix=Mix(chains=1.0, chain=2, batch=4), text=0.5)
    batch = encoder.step(3, 0, stage.mix)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss, parts = nano.speech_loss(model, batch, stage)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert set(parts) == {"rows", "rows_right", "sounds_right", "ctc", "text"}


def test_normalisation_layers_rest_while_training() -> None:
    model = nano.build().train()
    norms = [m for m in model.modules() if type(m).__name__ == "BatchNorm"]
    assert len(norms) == 5 and not any(norm.training for norm in norms)
    assert model.lfm.training


def test_what_is_heard_is_words(features: Features) -> None:
    model = nano.build().eval()
    read, written = heard(model, [features[0], features[20]], text=True, longest=3)
    assert len(read) == len(written) == 2
    assert all(set(text.split()) <= set(lexicon()) for text in read)
    assert heard(model, [features[0]], text=False)[1] == [""]


@pytest.mark.parametrize(
    ("said", "found", "rate"),
    [
        (["a b c"], ["a b c"], 0.0),
        (["a b c"], ["a c"], 1 / 3),
        (["a b"], ["x a b y"], 1.0),
        (["a b", "c d"], ["a b", ""], 0.5),
    ],
)
def test_word_errors(said: list[str], found: list[str], rate: float) -> None:
    assert word_errors(said, found) == pytest.approx(rate)


def test_the_recipe_goes_from_words_to_text() -> None:
    plan = nano.recipe(1000)
    assert [stage.until for stage in plan.stages] == [110, 290, 580, 850, 1000]
    assert plan.stage(0).ctc == 0 and plan.stage(0).mix.chains == 1
    assert plan.stage(500).text == 0 and plan.stage(900).text == 1
    assert plan.stage(5000) is plan.stages[-1]


def test_every_word_has_a_place_in_both_vocabularies() -> None:
    assert len(word_tokens()) == len(lexicon()) < 300
    assert nano.build().sounds.out_features == SOUNDS
