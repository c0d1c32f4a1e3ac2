"""`config.json` of every LFM2 generation, dense or sparse, as one `BackboneConfig`.

Knows the aliases and legacy keys; knows nothing of torch, weights or modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lfm2_mm.errors import CheckpointError, UnsupportedArchitecture

__all__ = ["DENSE", "SPARSE", "BackboneConfig", "LayerType", "text_section"]

LayerType = Literal["conv", "full_attention"]

DENSE, SPARSE = "lfm2", "lfm2_moe"
_DEFAULT_THETA = 1_000_000.0

# Keys of old and new files that say nothing the backbone needs: training-time values, values that
# restate others, and transformers' own bookkeeping.
_IGNORED = frozenset(
    """
    _name_or_path architectures auto_map block_dim block_mlp_init_scale block_norm_eps
    block_out_init_scale block_use_swiglu block_use_xavier_init chunk_size_feed_forward
    conv_dim conv_dim_out conv_use_xavier_init dtype id2label initializer_range is_encoder_decoder
    label2id model_type num_heads output_attentions output_hidden_states output_router_logits
    problem_type quantization_config return_dict theta tie_embedding tie_word_embeddings torch_dtype
    transformers_version use_cache use_pos_enc
    attention_bias attention_dropout hidden_act mlp_bias pretraining_tp
    """.split()
)

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "ffn_size",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "conv_taps",
    "max_positions",
)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the backbone: `text_config`, or the whole."""
    for key in ("text_config", "lfm"):
        if isinstance(section := config.get(key), Mapping):
            return section
    return config


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Shapes and constants of one LFM2 backbone, all rules already applied.

    Source of the rules: `configuration_lfm2.py` and `modeling_lfm2.py` of transformers 5.23.

    Attributes:
        ffn_size: The real width of the dense SwiGLU, after the 2/3 rule and rounding.
        conv_taps: Number of taps of the short convolution (`conv_L_cache`).
        n_experts: 0 for a dense model; else layers from `n_dense_layers` on are sparse.
        eos_ids: Every id that ends a turn.
        causal: False for the bidirectional encoders (attention and convolutions see both sides).
        unknown: Keys of the file that nothing here understands.
    """

    vocab_size: int = 65536
    hidden_size: int = 2560
    ffn_size: int = 12288
    layer_types: tuple[LayerType, ...] = ()
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 80
    conv_taps: int = 3
    conv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = _DEFAULT_THETA
    max_positions: int = 128_000
    tied: bool = True
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = 0
    n_experts: int = 0
    n_experts_per_token: int = 0
    expert_size: int = 0
    n_dense_layers: int = 0
    use_expert_bias: bool = True
    normalise_routing: bool = True
    routing_scale: float = 1.0
    causal: bool = True
    unknown: tuple[str, ...] = ()

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Indices of the short-convolution layers, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "conv")

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.n_experts > 0 and layer >= self.n_dense_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, causal: bool | None = None) -> BackboneConfig:
        """Read the backbone's part of a `config.json`, flat or nested under `text_config`.

        Args:
            config: The file as a dict.
            causal: Overrides what the file says (retrieval checkpoints are bidirectional).

        Raises:
            UnsupportedArchitecture: if `model_type` is not an LFM2.
            CheckpointError: if a value makes no sense.
        """
        kind = text_section(config).get("model_type", DENSE)
        if kind not in (DENSE, SPARSE):
            raise UnsupportedArchitecture(
                f"the config says model_type {kind!r}, but this backbone runs only "
                f"{DENSE!r} and {SPARSE!r}; use a checkpoint of the LFM2 family"
            )
        try:
            built = cls._read(config, sparse=kind == SPARSE, causal=causal)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the config holds a value of the wrong kind ({error}); "
                "download the checkpoint again"
            ) from error
        built._check()
        return built

    @classmethod
    def _read(
        cls, config: Mapping[str, Any], *, sparse: bool, causal: bool | None
    ) -> BackboneConfig:
        section = text_section(config)
        raw = dict(section)
        take = raw.pop
        hidden = int(take("hidden_size", 2048 if sparse else 2560))
        heads = int(take("num_attention_heads", 32))
        n_layers = int(take("num_hidden_layers", 32))
        # the top level decides, as in transformers, whatever a text section says (see `weights`)
        tied = bool(config.get("tie_embedding", config.get("tie_word_embeddings", True)))
        rope = take("rope_parameters", None) or {}
        scaling = take("rope_scaling", None)
        theta = float(rope.get("rope_theta", take("rope_theta", _DEFAULT_THETA)))
        raw.pop("rope_theta", None)
        stretch = scaling or rope
        rope_type = stretch.get("rope_type", stretch.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedArchitecture(
                f"the config asks for rotary scaling {rope_type!r}, which no LFM2 uses; "
                "remove rope_scaling or use an official checkpoint"
            )
        eos = take("eos_token_id", 2)
        bidirectional = not take("is_causal", True)
        return cls(
            vocab_size=int(take("vocab_size", 65536)),
            hidden_size=hidden,
            ffn_size=_ffn_width(raw, sparse=sparse),
            layer_types=_layer_types(raw, n_layers),
            n_heads=heads,
            n_kv_heads=int(take("num_key_value_heads", 8)),
            head_dim=int(take("head_dim", None) or hidden // max(heads, 1)),
            conv_taps=int(take("conv_L_cache", 3)),
            conv_bias=bool(take("conv_bias", False)),
            norm_eps=float(take("norm_eps", 1e-5)),
            rope_theta=theta,
            max_positions=int(take("max_position_embeddings", 128_000)),
            tied=tied,
            bos_id=take("bos_token_id", 1),
            eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            pad_id=take("pad_token_id", 0),
            n_experts=int(take("num_experts", 32)) if sparse else 0,
            n_experts_per_token=int(take("num_experts_per_tok", 4)) if sparse else 0,
            expert_size=int(take("moe_intermediate_size", 1792)) if sparse else 0,
            n_dense_layers=int(take("num_dense_layers", 2)) if sparse else 0,
            use_expert_bias=bool(take("use_expert_bias", True)),
            normalise_routing=bool(take("norm_topk_prob", True)),
            routing_scale=float(take("routed_scaling_factor", 1.0)),
            causal=(not bidirectional) if causal is None else causal,
            unknown=tuple(sorted(key for key in raw if key not in _IGNORED)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The official form: what `Lfm2Config` or `Lfm2MoeConfig` of transformers reads."""
        common: dict[str, Any] = {
            "model_type": SPARSE if self.n_experts else DENSE,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.n_layers,
            "layer_types": list(self.layer_types),
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "conv_L_cache": self.conv_taps,
            "conv_bias": self.conv_bias,
            "norm_eps": self.norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        if self.head_dim * self.n_heads != self.hidden_size:
            common["head_dim"] = self.head_dim
        if not self.causal:
            common["is_causal"] = False
        if not self.n_experts:
            return common | {"block_auto_adjust_ff_dim": False}
        return common | {
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.n_experts_per_token,
            "moe_intermediate_size": self.expert_size,
            "num_dense_layers": self.n_dense_layers,
            "use_expert_bias": self.use_expert_bias,
            "norm_topk_prob": self.normalise_routing,
            "routed_scaling_factor": self.routing_scale,
        }

    def _check(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"the config gives {name} = {getattr(self, name)}; it must be at least 1"
                )
        if self.head_dim % 2:
            raise CheckpointError(
                f"the config gives head_dim = {self.head_dim}; rotary positions need an even one"
            )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"the config gives {self.n_heads} query heads over {self.n_kv_heads} key/value "
                "heads; the first must be a multiple of the second"
            )
        if self.n_experts and not 0 < self.n_experts_per_token <= self.n_experts:
            raise CheckpointError(
                f"the config chooses {self.n_experts_per_token} of {self.n_experts} experts per "
                "token; choose between 1 and all of them"
            )


def _ffn_width(raw: dict[str, Any], *, sparse: bool) -> int:
    """Width of the dense SwiGLU; pops the keys it reads. `block_ff_dim` wins when present."""
    width = int(raw.pop("intermediate_size", 7168 if sparse else 12288))
    legacy = int(raw.pop("block_ff_dim", width))
    width = width if sparse else legacy
    adjust = bool(raw.pop("block_auto_adjust_ff_dim", True)) and not sparse
    multiplier = raw.pop("block_ffn_dim_multiplier", 1.0)
    multiple = int(raw.pop("block_multiple_of", 256))
    if not adjust:
        return width
    width = int(2 * width / 3)
    if multiplier is None:
        return width
    return multiple * math.ceil(int(multiplier * width) / multiple)


def _layer_types(raw: dict[str, Any], n_layers: int) -> tuple[LayerType, ...]:
    """Layer kinds from `layer_types`, else from `full_attn_idxs`, else all attention."""
    kinds, indices = raw.pop("layer_types", None), raw.pop("full_attn_idxs", None)
    if kinds is None:
        chosen = set(range(n_layers)) if indices is None else set(indices)
        return tuple("full_attention" if i in chosen else "conv" for i in range(n_layers))
    if len(kinds) < n_layers or any(kind not in ("conv", "full_attention") for kind in kinds):
        raise CheckpointError(
            f"the config lists layer_types {kinds!r} for {n_layers} layers; every layer must be "
            "'conv' or 'full_attention'"
        )
    return tuple(kinds[:n_layers])
