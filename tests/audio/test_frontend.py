"""`lfm2_mm.load` of an LFM2-Audio: claimed, assembled, equal to the official code end to end."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import lfm2_mm
from lfm2_audio.detokenizer import Detokenizer
from lfm2_audio.frontend import frontend, open_codec
from lfm2_audio.mimi import Mimi
from lfm2_audio.model import AudioModel
from lfm2_audio.speech_head import Speech
from lfm2_audio.waveform import Audio
from lfm2_mm.chat import Prompt, Slot
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import CheckpointError, SettingError, TensorMismatch
from lfm2_mm.events import AudioFrame, Error, TextDelta
from lfm2_mm.frontends import Frontend, frontends
from lfm2_mm.request import Request
from lfm2_mm.sampling import Sampling
from tests.audio import official

Mode = Literal["sequential", "interleaved"]
GREEDY = Sampling(temperature=0.0)
QUICK = (7, 1)  # an answer in each mode; test_speech_head has all of them


def load(folder: Path, **options: Any) -> AudioModel:
    model = lfm2_mm.load(folder, threads=1, **{"dtype": "float32", **options})
    assert isinstance(model, AudioModel)
    return model


@cache
def model() -> AudioModel:
    return load(official.folder())


def prompt(which: int, hears: AudioModel | None = None) -> Prompt:
    """A golden prompt: five tokens, a recording, five tokens."""
    encoder = (hears or model()).encoders["audio"]
    wave = official.signal(f"prompt {which}", 12000)
    prepared = encoder.prepare({"type": "audio", "audio": Audio(wave, official.RATE)})
    text, n = official.prompt_text(which), prepared.n_positions
    ids = torch.cat([text[:5], torch.full((n,), encoder.token_id), text[5:]])
    identity = ids.clone()
    identity[5 : 5 + n] = -1 - 1000 * which - torch.arange(n)
    slot = Slot(encoder=encoder, prepared=prepared, positions=torch.arange(5, 5 + n), end=5 + n)
    return Prompt(ids=ids, identity=identity, slots=(slot,))


def heard(hears: AudioModel) -> Tensor:
    """Embeddings of a recording."""
    (slot,) = prompt(0, hears).slots
    with torch.inference_mode():
        return slot.encoder.encode([slot.prepared])[0].float()


def events(which: int, mode: Mode) -> list[int | list[int]]:
    """Every token and frame of a greedy answer, in order."""
    speech = Speech(head=model().speech, mode=mode, text=GREEDY, audio=GREEDY)
    handle = model().engine.submit(
        Request(prompt=prompt(which), generation=speech, max_tokens=200, reuse=False)
    )
    found: list[int | list[int]] = []
    for event in handle:
        assert not isinstance(event, Error), event
        if isinstance(event, TextDelta):
            found += list(event.ids)
        elif isinstance(event, AudioFrame):
            found.append(event.codes.tolist())
    return found


def test_it_is_a_frontend_and_found_by_entry_point() -> None:
    assert isinstance(frontend, Frontend)
    assert frontend in frontends()


def test_claims_by_architecture_without_model_type() -> None:
    """Trap 8."""
    checkpoint = Checkpoint.open(official.folder())
    assert "model_type" not in checkpoint.config
    assert frontend.claims(checkpoint)


def test_null_loss_multipliers_do_no_harm(tmp_path: Path) -> None:
    """Trap 8."""
    folder = official.write(
        tmp_path / "null", config={"text_loss_multiplier": None, "audio_loss_multiplier": None}
    )
    assert load(folder).audio_config == model().audio_config


def test_embeddings_of_a_prompt() -> None:
    given = prompt(0)
    rows = model().backbone.embed_tokens(given.ids)
    (slot,) = given.slots
    with torch.inference_mode():
        rows[slot.positions] = slot.encoder.encode([slot.prepared])[0]
    wanted = official.golden("encoder")["prefill"]
    torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


ANSWERS = [
    pytest.param(mode, which, marks=[] if which in QUICK else [pytest.mark.slow])
    for mode, chosen in official.CHOSEN.items()
    for which in chosen
]


@pytest.mark.parametrize(("mode", "which"), ANSWERS)
def test_greedy_answers_are_those_of_the_official_code(mode: Mode, which: int) -> None:
    wanted = official.facts()["generation"][mode][str(which)]
    made = events(which, mode)
    first = next((i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), None)
    assert first is None, f"step {first} is {made[first or 0]}, not {wanted[first or 0]}"
    # trap 7: one of the two official loops hands out the token that ends the turn; neither of ours
    ended = mode == "sequential" and wanted[-1] == official.IM_END
    assert made == wanted[: len(wanted) - ended]


def test_bfloat16_hears_nearly_the_same() -> None:
    half = load(official.folder(), dtype="bfloat16")
    wanted = heard(model())
    for _ in range(3):  # weights are laid out anew meanwhile
        assert torch.cosine_similarity(heard(half), wanted).min() > 0.99


def test_saved_and_loaded_again_it_says_the_same(tmp_path: Path) -> None:
    model().save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == model().config == official.CONFIG
    for mine, wanted in zip(
        (again.backbone, *again.parts.values()),
        (model().backbone, *model().parts.values()),
        strict=True,
    ):
        state = wanted.state_dict()
        for name, tensor in mine.state_dict().items():
            torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)


def test_the_detokenizer_is_preferred_and_mimi_can_be_asked_for(tmp_path: Path) -> None:
    folder = official.write(tmp_path / "both", detokenizer=True, mimi=True)
    assert isinstance(load(folder).codec, Detokenizer)
    assert isinstance(load(folder, codec="mimi").codec, Mimi)
    (folder / "audio_detokenizer" / "model.safetensors").unlink()
    (folder / "audio_detokenizer" / "config.json").unlink()
    (folder / "audio_detokenizer").rmdir()
    assert isinstance(load(folder).codec, Mimi)


def test_the_codec_is_opened_only_when_it_is_needed(tmp_path: Path) -> None:
    silent = load(official.write(tmp_path / "silent"))
    with pytest.raises(
        CheckpointError,
        match=r"silent has no folder audio_detokenizer and no file tokenizer-\*\.safetensors, so "
        "its speech cannot be made audible",
    ):
        _ = silent.codec


def test_a_codec_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = official.write(tmp_path / "other", detokenizer=True)
    checkpoint = Checkpoint.open(folder)
    config = load(folder).audio_config
    object.__setattr__(config, "codebooks", 4)
    with pytest.raises(CheckpointError, match="has 8 codebooks, its model 4"):
        open_codec(checkpoint, config, "auto", "cpu")


def test_a_codec_that_is_none() -> None:
    with pytest.raises(SettingError, match="the codec is 'opus'; use one of auto, detokenizer"):
        load(official.folder(), codec="opus")


def test_a_missing_tensor_is_named_with_its_part(tmp_path: Path) -> None:
    folder = official.write(tmp_path / "torn", tensors={"conformer.layers.1.norm_out.bias": None})
    with pytest.raises(
        TensorMismatch,
        match=r"the weights of the conformer of .*torn do not fit: 1 tensor is missing "
        r"\(layers\.1\.norm_out\.bias\)",
    ):
        load(folder)


def test_packed_weights_hear_nearly_the_same_and_are_saved(tmp_path: Path) -> None:
    packed = load(official.folder(), quantize="int8")
    features = heard(packed)
    assert torch.cosine_similarity(features, heard(model())).min() > 0.99
    packed.save(tmp_path / "packed")
    stored = Checkpoint.open(tmp_path / "packed").names
    assert "conformer.layers.1.conv.pointwise_conv1.weight.codes" in stored
    assert "depthformer.layers.0.operator.qkv_proj.weight.codes" in stored
    torch.testing.assert_close(heard(load(tmp_path / "packed")), features, atol=0, rtol=0)
