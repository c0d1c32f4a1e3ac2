from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lfm2_audio.codec import Codec, CodecStream
from lfm2_audio.detokenizer import ENTRIES, Detokenizer, DetokenizerConfig, DetokenizerNet
from lfm2_audio.sliding import Sliding, SlidingState, Windowed
from lfm2_audio.streaming import DetokenizerStream
from lfm2_mm.errors import CheckpointError, InputError, ModelNotFound, TensorMismatch
from lfm2_mm.mixing import Mixing
from tests.audio import official
from tests.audio.codecs_tiny import KINDS, chunk_sizes, codes_of, in_chunks, tiny_detokenizer

# What the released file says, as far as it is known.
RELEASED: dict[str, Any] = {
    "architectures": ["Lfm2Model"],
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "conv_L_cache": 3,
    "hidden_size": 512,
    "intermediate_size": 3328,
    "layer_types": ["conv", "conv", *["sliding_attention", "conv"] * 3],
    "model_type": "lfm2",
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "output_size": 1282,
    "rope_theta": 1000000.0,
    "sliding_window": 30,
    "vocab_size": 65536,
}


def whole(codec: Detokenizer, codes: torch.Tensor) -> torch.Tensor:
    """All at once, by another path than the stream's."""
    made: torch.Tensor = codec.net(codes[None])[0]
    return made


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_released_config_makes_the_released_shapes() -> None:
    config = DetokenizerConfig.from_dict(RELEASED)
    with torch.device("meta"):
        net = DetokenizerNet(config)
    assert config.backbone.ffn_size == 2304  # the file says 3328
    assert sum(p.numel() for p in net.parameters()) == 44_976_578
    assert net.lfm.layers[2].is_attention and not net.lfm.layers[3].is_attention
    codec = Detokenizer(net)
    assert (codec.rate, codec.samples_per_frame, codec.codebooks) == (24000, 1920, 8)
    names = set(net.state_dict())
    assert {"emb.emb.weight", "lin.bias", "istft.window", "lfm.embedding_norm.weight"} <= names


def test_the_official_code_makes_the_same_samples() -> None:
    codec = Detokenizer.load(official.folder())
    made = official.golden("detokenizer")
    assert codec.net.config.window == 30 and codec.codebooks == 8
    close(codec.decode(made["codes"]), made["wave"])
    close(whole(codec, made["codes"]), made["wave"])
    close(torch.cat(in_chunks(codec.stream(), made["codes"], [1, 2, 0, 5])), made["wave"])


def test_the_width_of_the_released_weights_is_what_the_official_code_makes_of_3328() -> None:
    width = official.facts()["detokenizer_ffn_of_3328"]
    assert DetokenizerConfig.from_dict(RELEASED).backbone.ffn_size == width


def test_it_is_a_codec() -> None:
    codec = tiny_detokenizer()
    assert isinstance(codec, Codec)
    assert isinstance(codec.stream(), CodecStream)


def test_codes_are_averaged_over_codebooks_with_offsets_of_2048() -> None:
    codec = tiny_detokenizer()
    codes = codes_of(4, 3)
    table = codec.net.emb.emb.weight
    rows = torch.stack([table[codes[:, k] + 2048 * k] for k in range(3)]).sum(0) / 3
    embedded = codec.net.embed(codes)
    assert embedded.shape == (24, 32)
    torch.testing.assert_close(embedded[::6], rows)
    torch.testing.assert_close(embedded[5::6], rows)


@settings(max_examples=30)
@given(chunk_sizes, st.integers(0, 70), st.sampled_from([1, 7, 30]))
def test_streamed_in_any_chunks_equals_decoded_whole(
    sizes: list[int], frames: int, window: int
) -> None:
    codec = tiny_detokenizer(window=window)
    codes = codes_of(frames, 3, seed=frames)
    together = torch.cat(in_chunks(codec.stream(), codes, sizes))
    assert len(together) == frames * codec.samples_per_frame
    if frames:
        close(together, whole(codec, codes))
        close(codec.decode(codes), whole(codec, codes))


def test_only_the_overlap_is_held_back() -> None:
    codec = tiny_detokenizer(n_fft=1280)
    stream = codec.stream()
    codes = codes_of(5, 3)
    assert len(stream.push(codes[:1])) == 1920 - 480
    assert len(stream.push(codes[:0])) == 0
    assert len(stream.push(codes[1:4])) == 3 * 1920
    assert len(stream.flush()) == 480
    assert len(stream.flush()) == 0


def test_a_flushed_stream_begins_anew() -> None:
    codec = tiny_detokenizer()
    stream = codec.stream()
    first = torch.cat(in_chunks(stream, codes_of(9, 3), [2]))
    second = torch.cat(in_chunks(stream, codes_of(9, 3), [5]))
    close(first, second)


def test_streams_do_not_know_each_other() -> None:
    codec = tiny_detokenizer()
    inputs = [codes_of(30, 3, seed=i) for i in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        results[i] = torch.cat(in_chunks(codec.stream(), inputs[i], [1] * 30))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, codes in enumerate(inputs):
        close(results[i], whole(codec, codes))


def test_the_state_does_not_grow() -> None:
    codec = tiny_detokenizer()
    stream = codec.stream()
    sizes = []
    for _ in range(30):
        stream.push(codes_of(3, 3))
        sizes.append(state_bytes(stream))
    assert len(set(sizes[4:])) == 1
    stream.push(codes_of(200, 3))
    assert state_bytes(stream) == sizes[-1]


def state_bytes(stream: DetokenizerStream) -> int:
    state = stream._state
    kept = [*state.conv.values(), *state.keys.values(), *state.values.values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.parametrize("code", [2048, -1, 5000])
def test_a_code_that_is_no_sound_is_refused_and_changes_nothing(code: int) -> None:
    codec = tiny_detokenizer()
    codes = codes_of(6, 3)
    stream = codec.stream()
    begin = stream.push(codes[:3])
    bad = codes.clone()
    bad[4, 1] = code
    with pytest.raises(InputError, match=rf"the code {code} stands for no sound .* 0 to 2047"):
        stream.push(bad[3:])
    with pytest.raises(InputError, match="leave out the frame that ends speech"):
        codec.decode(bad)
    rest = torch.cat([begin, stream.push(codes[3:]), stream.flush()])
    close(rest, whole(codec, codes))


def test_frames_of_another_width_are_refused() -> None:
    with pytest.raises(InputError, match="the frames have 8 codes, but this codec decodes 3"):
        tiny_detokenizer().decode(codes_of(4, 8))


def test_samples_are_plain_tensors_that_may_be_changed() -> None:
    samples = tiny_detokenizer().decode(codes_of(2, 3))
    samples *= 0.5
    assert samples.dtype == torch.float32 and not samples.requires_grad


def test_training_reaches_every_weight() -> None:
    codec = tiny_detokenizer()
    codec.net.requires_grad_(True)
    codec.net(codes_of(4, 3)[None].expand(2, -1, -1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.net.parameters())


def test_windowed_attention_forgets_what_is_out_of_reach() -> None:
    q = torch.randn(1, 20, 2, 4)
    k, v = torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)
    mixing = Windowed(1, 20, 5)
    before = mixing.attend(0, q, k, v)
    k[:, 3], v[:, 3] = 9.0, 9.0
    after = mixing.attend(0, q, k, v)
    changed = [bool((before[0, t] != after[0, t]).any()) for t in range(20)]
    assert changed == [3 <= t < 8 for t in range(20)]
    assert isinstance(mixing, Mixing) and isinstance(Sliding(SlidingState(), 3, 5), Mixing)


def test_windowed_attention_with_padding_equals_each_alone() -> None:
    codec = tiny_detokenizer(window=4)
    x = codec.net.embed(codes_of(3, 3))[None]
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, 18:] = False
    padded = torch.cat([x, torch.randn(1, 6, x.shape[2])], dim=1)
    alone = codec.net.spectrum(x, Windowed(1, 18, 4))
    beside = codec.net.spectrum(padded, Windowed(1, 24, 4, mask=mask))
    torch.testing.assert_close(beside[:, :18], alone, atol=1e-5, rtol=1e-5)


def test_what_is_saved_loads_again_in_the_official_layout(tmp_path: Path) -> None:
    codec = tiny_detokenizer()
    codec.save(tmp_path / "m" / "audio_detokenizer")
    stored = load_file(tmp_path / "m" / "audio_detokenizer" / "model.safetensors")
    assert stored["lfm.embed_tokens.weight"].shape == (1, 32)  # the official class wants one
    assert stored["emb.emb.weight"].shape == (3 * ENTRIES, 32)
    config = json.loads((tmp_path / "m" / "audio_detokenizer" / "config.json").read_text())
    assert config["layer_types"][2] == "sliding_attention" and config["sliding_window"] == 30
    codes = codes_of(7, 3)
    for folder in (tmp_path / "m", tmp_path / "m" / "audio_detokenizer"):
        again = Detokenizer.load(folder)
        assert again.net.config == codec.net.config
        torch.testing.assert_close(again.decode(codes), codec.decode(codes))


def test_the_3328_rule_holds_for_stored_weights(tmp_path: Path) -> None:
    codec = tiny_detokenizer()
    codec.save(tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = json.loads(path.read_text())
    config |= {"intermediate_size": 64, "block_auto_adjust_ff_dim": True, "block_multiple_of": 48}
    path.write_text(json.dumps(config))
    assert Detokenizer.load(tmp_path / "d").net.config.backbone.ffn_size == 48


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lfm.layers.9.x": torch.zeros(1)}, r"1 tensor is unknown \(lfm.layers.9.x\)"),
        ({"lin.bias": None}, r"1 tensor is missing \(lin.bias\)"),
        ({"emb.emb.weight": None}, "stores no tensor 'emb.emb.weight'"),
        ({"lin.bias": torch.zeros(3)}, r"lin.bias is \[3\], the model needs \[66\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, torch.Tensor | None], text: str, tmp_path: Path
) -> None:
    tiny_detokenizer().save(tmp_path / "d")
    file = tmp_path / "d" / "model.safetensors"
    state = {**load_file(file), **change}
    save_file({k: v for k, v in state.items() if v is not None}, file)
    with pytest.raises(TensorMismatch, match=text):
        Detokenizer.load(tmp_path / "d")


def test_odd_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Detokenizer.load(tmp_path / "none")
    tiny_detokenizer().save(tmp_path / "d")
    file = tmp_path / "d" / "model.safetensors"
    save_file({**load_file(file), "emb.emb.weight": torch.zeros(5, 32)}, file)
    with pytest.raises(CheckpointError, match="have 5 entries in all, which is no multiple"):
        Detokenizer.load(tmp_path / "d")
    with pytest.raises(CheckpointError, match="gives sliding_window -1 and output_size 1282"):
        DetokenizerConfig.from_dict({**RELEASED, "sliding_window": -1})
    with pytest.raises(CheckpointError, match="holds a value of the wrong kind"):
        DetokenizerConfig.from_dict({**RELEASED, "output_size": "wide"})


def test_the_tiny_detokenizer_has_both_kinds_of_layers() -> None:
    assert {"conv", "full_attention"} == set(KINDS)
