"""`config.json` of LFM2-Audio: read, written, refused."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2_audio.config import AudioConfig, ConformerConfig, DepthformerConfig, MelConfig, is_audio
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import CheckpointError, UnsupportedArchitecture
from tests.audio import official


def released(**changes: Any) -> dict[str, Any]:
    """A config as released: no model_type, loss multipliers null, legacy FFN keys."""
    return {
        "architectures": ["Lfm2AudioForConditionalGeneration"],
        "codebooks": 8,
        "tie_audio_embeddings": False,
        "semantic_codebook_factor": 100,
        "codebook_weight": "log",
        "text_loss_multiplier": None,
        "audio_loss_multiplier": None,
        "interleaved_n_text": 6,
        "interleaved_n_audio": 12,
        "preprocessor": {
            "sample_rate": 16000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 128,
            "n_fft": 512,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-05,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "encoder": {
            "feat_in": 128,
            "feat_out": -1,
            "n_layers": 17,
            "d_model": 512,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 256,
            "causal_downsampling": False,
            "reduction": None,
            "reduction_position": None,
            "reduction_factor": 1,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": 8,
            "att_context_size": [-1, -1],
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": 9,
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
            "dropout": 0.1,
        },
        "lfm": {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "block_ff_dim": 12288,
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "conv_L_cache": 3,
            "rope_theta": 1000000.0,
        },
        "depthformer": {"layers": 6, "dim": 1024, "tie": True},
        **changes,
    }


def test_the_released_config() -> None:
    config = AudioConfig.from_dict(released())
    assert config.preprocessor == MelConfig(n_mels=128, n_fft=512, window=400, hop=160)
    assert config.encoder == ConformerConfig(
        n_mels=128, hidden_size=512, ffn_size=2048, n_layers=17, n_heads=8, kernel=9, channels=256
    )
    assert config.backbone.ffn_size == 8192  # not the 12288 of the file
    assert config.backbone.attention_layers == (2, 5, 8, 10, 12, 14)
    assert config.backbone.tied
    assert config.depthformer == DepthformerConfig(layers=6, dim=1024, tie=True)
    assert (config.codebooks, config.audio_vocab) == (8, 2049)
    assert (config.interleaved_n_text, config.interleaved_n_audio) == (6, 12)


def test_the_width_of_the_released_detokenizer() -> None:
    """Trap 4: 3328 in its config, 2304 in its weights, as the official code builds it."""
    raw = {**official.DETOKENIZER_CONFIG, "block_ff_dim": 3328, "block_multiple_of": 256}
    raw["layer_types"] = ["conv", "full_attention", "conv", "full_attention"]
    width = BackboneConfig.from_dict(raw).ffn_size
    assert width == official.facts()["detokenizer_ffn_of_3328"] == 2304


def test_integers_come_from_the_file() -> None:
    raw = released(codebooks=4, interleaved_n_text=3, interleaved_n_audio=5)
    raw["depthformer"] = {"layers": 2, "dim": 64, "tie": False}
    raw["encoder"] |= {"n_layers": 2, "d_model": 32, "n_heads": 4, "feat_in": 16}
    raw["encoder"] |= {"subsampling_conv_channels": -1, "conv_kernel_size": 5}
    raw["preprocessor"] |= {"features": 16, "sample_rate": 8000, "n_fft": 256}
    config = AudioConfig.from_dict(raw)
    assert config.codebooks == 4
    assert (config.interleaved_n_text, config.interleaved_n_audio) == (3, 5)
    assert config.depthformer == DepthformerConfig(layers=2, dim=64, tie=False)
    assert (config.encoder.n_layers, config.encoder.hidden_size) == (2, 32)
    assert (config.encoder.ffn_size, config.encoder.channels, config.encoder.kernel) == (128, 32, 5)
    assert (config.preprocessor.window, config.preprocessor.hop) == (200, 80)


def test_claimed_by_architecture_or_model_type() -> None:
    assert is_audio(released())
    assert is_audio({"model_type": "lfm2_audio"})
    assert not is_audio({"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"]})
    assert not is_audio({"architectures": None})


def test_what_is_written_reads_back() -> None:
    config = AudioConfig.from_dict(released())
    written = config.to_dict()
    assert AudioConfig.from_dict(written) == config
    raw = released()
    assert {k: written["preprocessor"][k] for k in raw["preprocessor"]} == raw["preprocessor"]
    assert {k: written["encoder"][k] for k in raw["encoder"]} == raw["encoder"]
    assert "model_type" not in written


@pytest.mark.parametrize("window", [397, 551, 1103])
def test_no_sample_of_the_window_is_lost_in_seconds(window: int) -> None:
    config = MelConfig(rate=22050, window=window, hop=window // 2, n_fft=2048)
    assert MelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("preprocessor", {"normalize": "all_features"}, "normalize 'all_features'"),
        ("preprocessor", {"features": 80}, "80 mel features, but its encoder takes 128"),
        ("encoder", {"subsampling": "vggnet"}, "subsampling 'vggnet'"),
        ("encoder", {"att_context_size": [70, 13]}, r"att_context_size \[70, 13\]"),
        ("encoder", {"conv_norm_type": "layer_norm"}, "conv_norm_type 'layer_norm'"),
        ("encoder", {"n_heads": 7}, "width 512 over 7 heads"),
        ("encoder", {"conv_kernel_size": 8}, "conv_kernel_size 8; it must be odd"),
        ("encoder", {"subsampling_factor": 6}, "subsampling_factor 6; it must be a power"),
        ("encoder", {"n_layers": 0}, "every one must be at least 1"),
        ("encoder", {"n_layers": "many"}, "value of the wrong kind"),
        ("depthformer", {"layers": 0}, "a depthformer of 0 layers"),
    ],
)
def test_refused(section: str, change: dict[str, Any], message: str) -> None:
    raw = released()
    raw[section] = {**raw[section], **change}
    with pytest.raises(CheckpointError, match=message):
        AudioConfig.from_dict(raw)


def test_a_section_is_missing() -> None:
    raw = released()
    del raw["encoder"]
    with pytest.raises(CheckpointError, match="no section 'encoder'"):
        AudioConfig.from_dict(raw)


def test_no_codebooks() -> None:
    with pytest.raises(CheckpointError, match="codebooks = 0"):
        AudioConfig.from_dict(released(codebooks=0))


def test_another_architecture() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"\['Lfm2ForCausalLM'\]"):
        AudioConfig.from_dict(released(architectures=["Lfm2ForCausalLM"]))
