"""`config.json` of every generation: the same shapes as transformers builds, or one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Lfm2Config, Lfm2MoeConfig
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from lfm2_mm.config import BackboneConfig, text_section
from lfm2_mm.errors import CheckpointError, UnsupportedArchitecture

READ = BackboneConfig.from_dict

# name, the keys that decide, real width of the feed-forward
RELEASED: dict[str, tuple[dict[str, Any], int]] = {
    "350M": ({"hidden_size": 1024, "block_ff_dim": 6656, "intermediate_size": 6656}, 4608),
    "700M": ({"hidden_size": 1536, "block_ff_dim": 10240}, 6912),
    "1.2B": ({"hidden_size": 2048, "block_ff_dim": 12288}, 8192),
    "2.6B": ({"hidden_size": 2048, "intermediate_size": 10752}, 10752),
    "8B-A1B": ({"model_type": "lfm2_moe", "intermediate_size": 7168}, 7168),
}


@pytest.mark.parametrize("name", RELEASED)
def test_widths_of_released_models(name: str) -> None:
    keys, width = RELEASED[name]
    adjust: dict[str, Any] = {"block_auto_adjust_ff_dim": False} if name == "2.6B" else {}
    assert READ({"model_type": "lfm2", **keys, **adjust}).ffn_size == width


@settings(max_examples=30)
@given(
    width=st.integers(1, 4000),
    legacy=st.none() | st.integers(1, 4000),
    adjust=st.booleans(),
    multiplier=st.sampled_from([0.5, 1.0, 1.3, 2]),
    multiple=st.sampled_from([1, 16, 256]),
)
def test_widths_follow_transformers(
    width: int, legacy: int | None, adjust: bool, multiplier: float, multiple: int
) -> None:
    raw: dict[str, Any] = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": width,
        "block_auto_adjust_ff_dim": adjust,
        "block_ffn_dim_multiplier": multiplier,
        "block_multiple_of": multiple,
    }
    if legacy is not None:
        raw["block_ff_dim"] = legacy
    with torch.device("meta"):
        built = Lfm2MLP(Lfm2Config(**raw)).w1.out_features
    if built:
        assert READ(raw).ffn_size == built
    else:
        with pytest.raises(CheckpointError, match="ffn_size = 0; it must be at least 1"):
            READ(raw)


def test_without_a_multiplier_nothing_is_rounded() -> None:
    raw = {"intermediate_size": 100, "block_ffn_dim_multiplier": None}
    assert READ(raw).ffn_size == 66


def test_layer_types_from_either_key() -> None:
    indices = READ({"num_hidden_layers": 4, "full_attn_idxs": [1, 3]})
    assert indices.layer_types == ("conv", "full_attention", "conv", "full_attention")
    assert (indices.attention_layers, indices.conv_layers) == ((1, 3), (0, 2))
    assert READ({"num_hidden_layers": 2}).layer_types == ("full_attention",) * 2
    named = READ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]})
    assert named.layer_types == ("conv", "full_attention")


def test_rotary_base_of_both_generations() -> None:
    assert READ({}).rope_theta == 1e6
    assert READ({"rope_theta": 5e4}).rope_theta == 5e4
    assert READ({"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}).rope_theta == 7e4
    both = READ({"rope_theta": 5e4, "rope_parameters": {"rope_theta": 7e4}})
    assert (both.rope_theta, both.unknown) == (7e4, ())


@pytest.mark.parametrize(
    ("raw", "tied"),
    [
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_embedding": False}, False),
        ({"tie_embedding": True, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_tying_is_said_at_the_top(raw: dict[str, Any], tied: bool) -> None:
    assert READ(raw).tied is tied
    if "text_config" not in raw:
        assert Lfm2Config(**raw).tie_word_embeddings is tied


def test_defaults_are_those_of_transformers() -> None:
    dense, sparse = Lfm2Config(), Lfm2MoeConfig()
    mine = READ({"model_type": "lfm2"})
    assert (mine.hidden_size, mine.n_layers, mine.eos_ids) == (2560, 32, (2,))
    assert (mine.vocab_size, mine.conv_taps) == (dense.vocab_size, dense.conv_L_cache)
    moe = READ({"model_type": "lfm2_moe"})
    assert moe.hidden_size == sparse.hidden_size
    assert moe.ffn_size == sparse.intermediate_size
    assert (moe.n_experts, moe.n_experts_per_token) == (32, 4)
    assert (moe.expert_size, moe.n_dense_layers) == (sparse.moe_intermediate_size, 2)
    assert not moe.is_sparse(1)
    assert moe.is_sparse(2)
    assert not mine.is_sparse(31)


def test_legacy_keys_are_neither_used_nor_unknown() -> None:
    raw = {"block_norm_eps": 0.5, "conv_dim": 9, "use_pos_enc": True, "block_use_swiglu": True}
    config = READ({**raw, "num_heads": 3, "surprise": 1, "another": 2})
    assert config.norm_eps == 1e-5
    assert config.unknown == ("another", "surprise")


def test_ends_may_be_one_several_or_none() -> None:
    assert READ({"eos_token_id": 7}).eos_ids == (7,)
    assert READ({"eos_token_id": [7, 2]}).eos_ids == (7, 2)
    assert READ({"eos_token_id": None}).eos_ids == ()


def test_causality() -> None:
    assert READ({}).causal
    assert not READ({"is_causal": False}).causal
    assert not READ({}, causal=False).causal
    assert READ({"is_causal": False}, causal=True).causal


def test_the_text_part_of_nested_files() -> None:
    assert text_section({"text_config": {"a": 1}, "b": 2}) == {"a": 1}
    assert text_section({"lfm": {"a": 1}}) == {"a": 1}
    assert text_section({"b": 2}) == {"b": 2}


ODD = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "conv_L_cache": 4,
    "conv_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": [7, 9],
    "rope_theta": 5e5,
}
SPARSE = {
    **ODD,
    "model_type": "lfm2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_dense_layers": 1,
    "use_expert_bias": False,
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.0,
}


@pytest.mark.parametrize(
    "raw", [{"num_hidden_layers": 2}, ODD, SPARSE, {**ODD, "is_causal": False}]
)
def test_what_is_written_reads_back(raw: dict[str, Any]) -> None:
    config = READ(raw)
    assert READ(config.to_dict()) == config
    theirs = (Lfm2MoeConfig if config.n_experts else Lfm2Config)(**config.to_dict())
    assert READ(theirs.to_dict(), causal=config.causal) == config


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"hidden_size": 0}, "hidden_size = 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "n_heads = 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "n_layers = 0; it must be at least 1"),
        ({"conv_L_cache": 0}, "conv_taps = 0; it must be at least 1"),
        ({"head_dim": 7}, "head_dim = 7; rotary positions need an even one"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "4 query heads over 3 key/value heads; the first must be a multiple of the second",
        ),
        (
            {"model_type": "lfm2_moe", "num_experts": 2, "num_experts_per_tok": 3},
            "chooses 3 of 2 experts per token; choose between 1 and all of them",
        ),
        (
            {"num_hidden_layers": 2, "layer_types": ["conv", "mamba"]},
            r"\['conv', 'mamba'\] for 2 layers; every layer must be 'conv' or 'full_attention'",
        ),
        ({"num_hidden_layers": 3, "layer_types": ["conv"]}, "for 3 layers"),
        ({"hidden_size": "wide"}, "a value of the wrong kind .*'wide'.*; download"),
        ({"hidden_size": None}, "a value of the wrong kind"),
        ({"layer_types": 5}, "a value of the wrong kind"),
    ],
)
def test_nonsense_is_refused(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        READ(raw)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="model_type 'llama', but .* LFM2 family"):
        READ({"model_type": "llama"})
    with pytest.raises(UnsupportedArchitecture, match="model_type 'qwen2'"):
        READ({"model_type": "lfm2_vl", "text_config": {"model_type": "qwen2"}})


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}},
    ],
)
def test_stretched_rotary_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="rotary scaling 'yarn', which no LFM2 uses"):
        READ(raw)
    assert READ({"rope_scaling": None}).rope_theta == 1e6
