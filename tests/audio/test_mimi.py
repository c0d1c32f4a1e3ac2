from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm2_audio.codec import Codec, CodecStream
from lfm2_audio.mimi import Mimi
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    InputError,
    ModelNotFound,
    TensorMismatch,
)
from tests.audio import official
from tests.audio.codecs_tiny import chunk_sizes, codes_of, in_chunks

EXTRA = {name: official.MIMI_CONFIG[name] for name in ("num_attention_heads", "sliding_window")}
EXTRA["num_key_value_heads"] = EXTRA["num_attention_heads"]


@cache
def file() -> Path:
    path = official.workplace() / "mimi" / official.MIMI_FILE
    path.parent.mkdir()
    save_file(official.state("mimi"), path)
    return path


@cache
def mimi() -> Mimi:
    return Mimi.load(file(), config=EXTRA)


def whole(codes: torch.Tensor) -> torch.Tensor:
    """All at once, by transformers' own forward."""
    with torch.no_grad():
        samples: torch.Tensor = mimi().net.decode(codes.T[None]).audio_values[0, 0]
    return samples


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_it_is_a_codec() -> None:
    codec = mimi()
    assert isinstance(codec, Codec) and isinstance(codec.stream(), CodecStream)
    assert (codec.rate, codec.samples_per_frame, codec.codebooks) == (24000, 1920, 8)


def test_the_official_code_makes_the_same_samples() -> None:
    made = official.golden("mimi")
    close(mimi().decode(made["codes"]), made["wave"])
    close(whole(made["codes"]), made["wave"])
    close(torch.cat(in_chunks(mimi().stream(), made["codes"], [1, 3, 0, 2])), made["wave"])


def test_the_official_code_makes_the_same_codes() -> None:
    source = Audio(official.signal("mimi source", 24000), 24000)
    assert torch.equal(mimi().encode(source), official.golden("mimi")["encoded"])


def test_a_recording_of_another_rate_is_resampled_before_it_is_encoded() -> None:
    source = Audio(official.signal("mimi source", 24000), 24000)
    codes = mimi().encode(source.resampled(48000))
    assert codes.shape == (13, 8)
    assert (codes == official.golden("mimi")["encoded"])[:, 0].float().mean() > 0.5


@settings(max_examples=25)
@given(chunk_sizes, st.integers(0, 70))
def test_streamed_in_any_chunks_equals_decoded_whole(sizes: list[int], frames: int) -> None:
    codes = codes_of(frames, 8, seed=frames)
    together = torch.cat(in_chunks(mimi().stream(), codes, sizes))
    assert len(together) == frames * 1920
    if frames:
        close(together, whole(codes))


def test_nothing_is_held_back_and_a_flushed_stream_begins_anew() -> None:
    stream = mimi().stream()
    codes = codes_of(6, 8)
    for _ in range(2):
        assert len(stream.push(codes[:1])) == 1920
        assert len(stream.push(codes[:0])) == 0
        assert len(stream.push(codes[1:])) == 5 * 1920
        assert len(stream.flush()) == 0
    close(stream.push(codes), whole(codes))


def test_the_state_does_not_grow() -> None:
    stream = mimi().stream()
    sizes = []
    for _ in range(20):
        stream.push(codes_of(2, 8))
        state = stream._state
        kept = [*stream._kept.values(), *state.keys.values(), *state.values.values()]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))
    assert len(set(sizes[8:])) == 1


def test_bad_codes_are_refused() -> None:
    codes = codes_of(3, 8)
    codes[1, 0] = 2048
    with pytest.raises(InputError, match="the code 2048 stands for no sound"):
        mimi().decode(codes)
    with pytest.raises(InputError, match="the frames have 3 codes, but this codec decodes 8"):
        mimi().decode(codes_of(3, 3))


def test_both_spellings_of_attention_are_read_and_fewer_codebooks_too(tmp_path: Path) -> None:
    older = {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.", "out_proj."): t
        for name, t in official.state("mimi").items()
    }
    assert set(older) != set(official.state("mimi"))
    save_file(older, tmp_path / official.MIMI_FILE)
    codes = codes_of(4, 8)
    again = Mimi.load(tmp_path, config=EXTRA)
    torch.testing.assert_close(again.decode(codes), mimi().decode(codes))
    fewer = Mimi.load(tmp_path, codebooks=4, config=EXTRA)
    assert fewer.decode(codes[:, :4]).shape == (4 * 1920,)
    source = Audio(official.signal("mimi source", 24000), 24000)
    assert torch.equal(fewer.encode(source), official.golden("mimi")["encoded"][:, :4])


def test_what_is_no_mimi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no Mimi file"):
        Mimi.load(tmp_path / "none.safetensors")
    with pytest.raises(ModelNotFound, match=r"holds 0 files tokenizer-\*.safetensors, not one"):
        Mimi.load(tmp_path)
    path = tmp_path / official.MIMI_FILE
    path.write_bytes(b"no")
    with pytest.raises(CorruptWeights, match="cannot be read as safetensors"):
        Mimi.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no Mimi as Kyutai stores it"):
        Mimi.load(path)
    with pytest.raises(CheckpointError, match="holds 8 codebooks, but 9 are asked for"):
        Mimi.load(file(), codebooks=9, config=EXTRA)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"odd.weight": torch.zeros(1)}, r"holds tensors that no Mimi has \(odd.weight\)"),
        ({"decoder.model.0.conv.conv.bias": None}, "1 tensor is missing"),
        ({"decoder.model.0.conv.conv.bias": torch.zeros(2)}, "1 tensor has another shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, torch.Tensor | None], text: str, tmp_path: Path
) -> None:
    path = tmp_path / official.MIMI_FILE
    state = {**official.state("mimi"), **change}
    save_file({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises(TensorMismatch, match=text):
        Mimi.load(path, config=EXTRA)
