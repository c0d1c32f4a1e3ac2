"""nano-audio as a whole: exported in the official layout, loaded as any model, trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lfm2_mm
from lfm2_audio import nano, nano_answers, nano_judge, nano_voice
from lfm2_audio.config import END_OF_AUDIO
from lfm2_audio.griffin_lim import GriffinLim, GriffinLimConfig
from lfm2_audio.model import AudioModel
from lfm2_audio.nano_data import tokenizer
from lfm2_audio.nano_scores import heard
from lfm2_audio.recipes import RECIPES, train_nano_audio
from lfm2_audio.speech.sentences import lexicon
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import InputError
from lfm2_mm.train.objectives import IGNORE


def codec() -> GriffinLim:
    torch.manual_seed(0)
    config = GriffinLimConfig(iterations=2)
    books = torch.randn(nano.CONFIG.codebooks, 16, 8)
    return GriffinLim(config, books, torch.randn(640, 8) * 0.05, torch.full((640,), -4.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("nano") / "model"
    nano.export(nano.build(3), target, codec(), nano.Voice(4))
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[AudioModel]:
    loaded = lfm2_mm.load(str(folder), device="cpu", threads=1, dtype="float32")
    assert isinstance(loaded, AudioModel)
    yield loaded


def test_it_is_small_enough_to_ship(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 13_000_000


def test_the_official_layout(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Lfm2AudioForConditionalGeneration"]
    assert config["codebooks"] == 4 and config["encoder"]["n_layers"] == 5
    for name in ("tokenizer.json", "chat_template.jinja", "audio_griffin_lim/config.json"):
        assert (folder / name).is_file()


def test_a_loaded_model_hears_what_was_trained(model: AudioModel) -> None:
    from lfm2_audio.nano_data import analyse

    torch.manual_seed(1)
    wave = torch.randn(16000) * 0.1
    trained = nano.build(3).eval()
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    _, (wanted,) = heard(trained, [analyse(wave.numpy())], text=True, longest=4)
    found = model.transcribe(Audio(wave, 16000)).text
    assert wanted and found.startswith(wanted)


def test_it_has_a_voice(model: AudioModel) -> None:
    assert isinstance(model.codec, GriffinLim)
    model.codec.books = torch.randn(4, 2048, 8)  # untrained codes may be any
    made = model.speak("turn on the light", max_seconds=0.5, seed=1)
    assert made.rate == 24000 and made.duration <= 0.5


def test_embedded_weights_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "locate", lambda name: SimpleNamespace(folder=folder))
    hearing, voice = nano.embedded()
    wanted = nano.build(3).state_dict()
    for name, value in hearing.state_dict().items():
        if not name.startswith(("head.", "sounds.")):
            torch.testing.assert_close(value, wanted[name].bfloat16().float())
    spoken = nano.Voice(4).state_dict()
    for name, value in voice.state_dict().items():
        torch.testing.assert_close(value, spoken[name].bfloat16().float())


def test_going_on_starts_gently() -> None:
    plan = nano.recipe_more(100)
    assert plan.schedule.peak < nano.recipe().schedule.peak
    assert all(stage.text > 0 for stage in plan.stages)


# -- the voice ---------------------------------------------------------------------------------


def reading() -> nano_voice.Reading:
    frames = [torch.full((n, 4), 7) for n in (3, 5, 4, 90)]
    return nano_voice.Reading(["one two", "say cat", "red", "far too long"], frames)


def test_rows_of_a_text_read_aloud() -> None:
    batch = reading().batch([[0], [1]], [False, True])
    assert len(reading().texts) == 3
    for i, n in enumerate((3, 5)):
        frames = batch.codes[i][batch.framed[i]]
        assert frames.tolist() == [[7] * 4] * n + [[END_OF_AUDIO] * 4]
        start = int(batch.starts[i])
        assert batch.ids[i, start] == 128
        end = start + 1 + n + 1
        assert batch.ids[i, end] == 7
        assert (batch.ids[i, start + 1 : end] == IGNORE).all()
        assert not batch.framed[i, : start + 1].any()
        assert (batch.ids[i, end + 1 :] == IGNORE).all()


def every_word() -> nano_voice.Reading:
    words = lexicon()
    return nano_voice.Reading(
        words, [torch.full((len(word), 4), i) for i, word in enumerate(words)]
    )


def test_words_are_read_behind_each_other() -> None:
    frames = [torch.full((n, 4), n) for n in (3, 5)]
    batch = nano_voice.Reading(["red", "cat"], frames).batch([[1, 0]], [False])
    said = batch.codes[0][batch.framed[0]]
    assert said[:, 0].tolist() == [5] * 5 + [3] * 3 + [END_OF_AUDIO]
    prompt = tokenizer().decode(batch.ids[0, : int(batch.starts[0])].tolist())
    assert "cat red" in prompt
    words = batch.words[0][batch.framed[0]].tolist()
    named = [tokenizer().decode([word]) for word in words[:-1]]
    assert named == [" cat"] * 5 + [" red"] * 3 and words[-1] == IGNORE


def test_texts_are_sentences_and_words_in_any_order() -> None:
    reading = every_word()
    texts = [
        tokenizer().decode(row[row != IGNORE].tolist()).split("user\n")[-1]
        for i in range(4)
        for row in reading.step(1, i).ids
    ]
    assert any(" the " in text for text in texts)
    assert len(set(texts)) > 40


def test_steps_are_pure_functions() -> None:
    one, two = every_word().step(1, 5), every_word().step(1, 5)
    torch.testing.assert_close(one.ids, two.ids)
    torch.testing.assert_close(one.codes, two.codes)


def test_it_learns_to_say_one_thing() -> None:
    torch.manual_seed(0)
    model = nano_voice.Speaker()
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    batch = nano_voice.Reading(["red"], [codes]).batch([[0]], [False])
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    for _ in range(30):
        loss, parts = nano_voice.read_loss(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss.detach()) < 0.5
    assert set(parts) == {"code_0", "code_1", "code_2", "code_3", "right_0", "tokens", "words"}
    assert nano_voice.speak(model.eval(), "red", longest=6).tolist() == codes.tolist()


def test_the_encoder_rests() -> None:
    model = nano_voice.Speaker()
    resting = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert resting
    assert {name.split(".")[1] for name in resting} == {"conformer", "audio_adapter"}


# -- the recipe --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def train(plan: nano.Recipe, folder: Path, **params: Any) -> nano.Recogniser:
        made.append((plan, params))
        (folder / "trainer.safetensors").write_bytes(b"")
        return nano.build()

    monkeypatch.setattr(nano, "train", train)
    monkeypatch.setattr(nano, "codec", lambda folder, say: codec())
    return made


def test_a_recipe_is_run_and_exported(calls: list[Any], tmp_path: Path) -> None:
    model = train_nano_audio(tmp_path / "run", steps=40, until=10, say=lambda _: None)
    assert (model / "model.safetensors").is_file()
    (plan, params), *_ = calls
    assert plan.schedule.steps == 40 and params["until"] == 10 and params["start"] is None
    train_nano_audio(tmp_path / "run", say=lambda _: None)
    assert calls[1][0].schedule.steps == 40


def test_another_length_is_refused(calls: list[Any], tmp_path: Path) -> None:
    train_nano_audio(tmp_path, steps=40, say=lambda _: None)
    with pytest.raises(InputError, match="has steps 40, not 50; go on without --steps"):
        train_nano_audio(tmp_path, steps=50, say=lambda _: None)
    train_nano_audio(tmp_path, steps=50, fresh=True, say=lambda _: None)
    assert len(calls) == 2
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read .*; begin anew with --fresh"):
        train_nano_audio(tmp_path, say=lambda _: None)


def test_going_on_from_the_embedded_model(
    calls: list[Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano, "locate", lambda name: SimpleNamespace(folder=folder))
    RECIPES["nano-audio-more"](tmp_path, steps=30, say=lambda _: None)
    start = calls[0][1]["start"]
    assert isinstance(start, nano.Recogniser)
    names = ("", "-more", "-voice", "-answers", "-judge")
    assert set(RECIPES) == {f"nano-audio{name}" for name in names}


def test_answers_and_a_judge_are_recipes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def answers(start: nano_voice.Speaker, out: Path, data: Path, **params: Any) -> Any:
        made.append(params)
        return start

    def judging(out: Path, data: Path, **params: Any) -> nano_judge.Judge:
        made.append(params)
        return nano_judge.Judge()

    monkeypatch.setattr(nano, "locate", lambda name: SimpleNamespace(folder=folder))
    monkeypatch.setattr(nano, "codec", lambda folder, say: codec())
    monkeypatch.setattr(nano_answers, "train_answers", answers)
    monkeypatch.setattr(nano_judge, "train_judge", judging)
    model = RECIPES["nano-audio-answers"](tmp_path / "a", steps=3, say=lambda _: None)
    assert (model / "model.safetensors").is_file()
    kept = RECIPES["nano-audio-judge"](tmp_path / "b", seed=5, say=lambda _: None)
    assert kept == tmp_path / "b" / nano_judge.FILE and kept.is_file()
    seeds = [(params["steps"], params["seed"]) for params in made]
    assert seeds == [(3, nano_answers.SEED), (nano_judge.STEPS, 5)]
