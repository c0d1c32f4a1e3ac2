"""The `InputEncoder` of speech: forms of parts, positions, keys, batches; and bad input."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lfm2_audio.adapter import Adapter
from lfm2_audio.checkpoint import ADAPTER, CONFORMER, part_tensors
from lfm2_audio.config import AudioConfig
from lfm2_audio.conformer import Conformer
from lfm2_audio.encoder import AudioEncoder
from lfm2_audio.waveform import Audio
from lfm2_mm.chat import build_prompt
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import AudioError
from lfm2_mm.features import FeatureCache
from lfm2_mm.frontends import InputEncoder
from lfm2_mm.tokenizer import Tokenizer
from lfm2_mm.weights import load_weights
from tests.audio import official

CONFIG = AudioConfig.from_dict(official.CONFIG)


def build(**options: Any) -> AudioEncoder:
    checkpoint = Checkpoint.open(official.folder())
    conformer = Conformer(CONFIG.encoder).eval()
    adapter = Adapter(CONFIG.encoder.hidden_size, CONFIG.backbone.hidden_size).eval()
    for net, part in ((conformer, CONFORMER), (adapter, ADAPTER)):
        tensors = part_tensors(checkpoint, part)
        load_weights(net, tensors, dtype=torch.float32, device="cpu", where="official")
    return AudioEncoder(
        conformer,
        adapter,
        CONFIG.preprocessor,
        **{"token_id": 0, "identity": "tiny", **options},
    )


@cache
def encoder() -> AudioEncoder:
    return build()


def recording(name: str = "second", n: int = 16000) -> Audio:
    return Audio(official.signal(name, n), 16000)


def test_it_is_an_input_encoder() -> None:
    assert isinstance(encoder(), InputEncoder)
    assert encoder().placeholder == ""


@pytest.mark.parametrize("name", ["second", "odd"])
def test_parity_from_samples_to_embeddings(name: str) -> None:
    """Trap 1: all T + 1 frames go in, as the official ChatState feeds them."""
    made = encoder().prepare({"type": "audio", "audio": Audio(official.signals()[name], 16000)})
    wanted = official.golden("encoder")[f"{name}.adapter"]
    assert made.n_positions == len(wanted) == -(-made.tensors["mel"].shape[1] // 8)
    (rows,) = encoder().encode([made])
    torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("seconds", "positions"), [(0.1, 2), (0.63, 8), (0.64, 9), (1, 13), (4, 51)]
)
def test_twelve_and_a_half_positions_a_second(seconds: float, positions: int) -> None:
    made = encoder().prepare({"type": "audio", "audio": recording(n=round(seconds * 16000))})
    assert made.n_positions == positions
    assert made.text == ""
    assert made.info["seconds"] == seconds


def parts(path: Path) -> dict[str, Mapping[str, Any]]:
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    return {
        "path": {"type": "audio", "audio": str(path)},
        "Path": {"type": "audio", "path": path},
        "bytes": {"type": "audio", "audio": data},
        "url": {"type": "audio", "url": f"data:audio/wav;base64,{text}"},
        "array": {"type": "audio", "audio": (recording().samples.numpy(), 16000)},
        "openai": {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        "openai data url": {
            "type": "input_audio",
            "input_audio": {"data": f"data:audio/wav;base64,{text}"},
        },
        "audio_url": {
            "type": "audio_url",
            "audio_url": {"url": f"data:audio/wav;base64,{text}"},
        },
    }


FORMS = ["path", "Path", "bytes", "url", "array", "openai", "openai data url", "audio_url"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_part(form: str, tmp_path: Path) -> None:
    path = tmp_path / "spoken.wav"
    recording().save(path)
    made = encoder().prepare(parts(path)[form])
    wanted = encoder().prepare({"type": "audio", "audio": recording()})
    assert made.n_positions == wanted.n_positions
    (rows,), (same,) = encoder().encode([made]), encoder().encode([wanted])
    torch.testing.assert_close(rows, same, atol=0.02, rtol=0)  # 16 bits a sample


def test_other_rates_are_resampled() -> None:
    audio = recording().resampled(44100)
    made = encoder().prepare({"type": "audio", "audio": audio})
    assert made.n_positions == 13


def test_equal_sound_has_an_equal_key() -> None:
    one, same = (encoder().prepare({"type": "audio", "audio": recording()}) for _ in range(2))
    other = encoder().prepare({"type": "audio", "audio": recording("odd")})
    elsewhere = build(identity="another model").prepare({"type": "audio", "audio": recording()})
    assert one.key == same.key
    assert len({one.key, other.key, elsewhere.key}) == 3


def test_a_batch_equals_each_alone_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        encoder().prepare({"type": "audio", "audio": recording(f"batch {n}", n)})
        for n in (16000, 4000, 20000, 4000, 31000)
    ]
    alone = [encoder().encode([part])[0] for part in made]
    for limit in (12_000, 150):
        monkeypatch.setattr("lfm2_audio.encoder._FRAMES_AT_ONCE", limit)
        for rows, wanted in zip(encoder().encode(made), alone, strict=True):
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=0)


def test_a_prompt_has_positions_and_nothing_around_them() -> None:
    tokenizer = Tokenizer.load(official.folder())
    prompt = build_prompt(
        [{"role": "user", "content": [{"type": "audio", "audio": recording()}]}],
        tokenizer=tokenizer,
        encoders=[encoder()],
    )
    (slot,) = prompt.slots
    before = tokenizer.encode("<|startoftext|><|im_start|>user\n")
    after = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    first, last = int(slot.positions[0]), int(slot.positions[-1])
    assert prompt.ids[:first].tolist() == list(before)
    assert prompt.ids[last + 1 :].tolist() == list(after)
    assert last + 1 - first == len(slot.positions) == 13
    assert len(set(prompt.identity[slot.positions].tolist())) == 13
    assert (prompt.identity[slot.positions] < 0).all()


def test_heard_once() -> None:
    net, cache_ = build(), FeatureCache()
    part = net.prepare({"type": "audio", "audio": recording()})
    for _ in range(3):
        cache_.get(net, [part])
    assert net.seconds_encoded == pytest.approx(1.01)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("question.wav", True),
        ("talk.FLAC", True),
        ("https://example.org/a.mp3?key=1", True),
        ("data:audio/wav;base64,AAAA", True),
        ("-", True),
        ("scene.png", False),
        ("notes.txt", False),
        ("what is this?", False),
    ],
)
def test_accepts(source: str, wanted: bool) -> None:
    assert encoder().accepts(source) is wanted


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio"}, r"none of 'audio', .* only \['type'\]; name the recording"),
        (
            {"type": "input_audio", "input_audio": {"data": "/etc/hostname"}},
            "no base64",
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "data:audio/wav;base64,%%"}},
            "no base64",
        ),
        ({"type": "audio", "audio": recording(n=160)}, "0.01 seconds long, too short"),
        ({"type": "audio", "audio": recording(n=0)}, "holds no samples"),
        ({"type": "audio", "audio": 7}, "cannot be read from a value of type int"),
    ],
)
def test_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(AudioError, match=message):
        encoder().prepare(part)


def test_too_long() -> None:
    with pytest.raises(AudioError, match="over the limit"):
        build(max_seconds=0.5).prepare({"type": "audio", "audio": recording()})
