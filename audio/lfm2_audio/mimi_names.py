"""Mimi as Kyutai stores it becomes the MimiModel of transformers: names, shapes, rotary order.

Both spellings of the attention weights are known: `in_proj_weight` of the released file and
`in_projs.0.weight` of newer code. Knows names and shapes only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.errors import CheckpointError

__all__ = ["config_of", "to_transformers"]

_QUANTIZERS = {"rvq_first": "semantic", "rvq_rest": "acoustic"}
_PARTS = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
    "layer_scale_1": "self_attn_layer_scale",
    "layer_scale_2": "mlp_layer_scale",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn.out_projs.0": "self_attn.o_proj",
}
_CODEBOOK = {
    "_initialized": "initialized",
    "cluster_usage": "cluster_usage",
    "embedding_sum": "embed_sum",
}
_NET = re.compile(
    r"(encoder|decoder)\.model\.(\d+(?:\.block\.\d+)?)\.(?:conv\.conv|convtr\.convtr)\.(\w+)"
)
_LAYER = re.compile(r"(encoder|decoder)_transformer\.transformer\.layers\.(\d+)\.(.+)\.(\w+)")
_FUSED = re.compile(
    r"(encoder|decoder)_transformer\.transformer\.layers\.(\d+)\.self_attn\.in_proj"
    r"(?:_weight|s\.0\.weight)"
)
_CODES = re.compile(r"quantizer\.(rvq_\w+)\.vq\.layers\.(\d+)\._codebook\.(\w+)")
_PROJECTION = re.compile(r"quantizer\.(rvq_\w+)\.((?:in|out)put_proj)\.weight")
_RATES = {
    "downsample.conv.conv.conv.weight": "encoder.downsample.conv.weight",
    "upsample.convtr.convtr.convtr.weight": "decoder.upsample.conv.weight",
}


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keyword arguments for `MimiConfig`, as far as the shapes of the stored tensors tell.

    Heads, attention windows and sample rate are not among them.

    Raises:
        CheckpointError: if a tensor that tells is not there, or is of another kind.
    """
    try:
        last = max(
            int(m[2])
            for m in map(_NET.fullmatch, shapes)
            if m and m[1] == "decoder" and "." not in m[2]
        )
        ups = [
            shapes[f"decoder.model.{i}.convtr.convtr.weight"]
            for i in range(2, last, 3)
            if i + 1 < last
        ]
        hidden = shapes["decoder.model.0.conv.conv.weight"][1]
        first = shapes["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"]
        count = sum(1 for name in shapes if _CODES.fullmatch(name) and name.endswith("_sum"))
        layers = {int(m[2]) for m in map(_LAYER.fullmatch, shapes) if m and m[1] == "decoder"}
        semantic = sum(
            1 for n in shapes if n.startswith("quantizer.rvq_first.vq.") and n.endswith("_sum")
        )
        return {
            "hidden_size": hidden,
            "num_filters": shapes[f"decoder.model.{last}.conv.conv.weight"][1],
            "upsampling_ratios": [shape[2] // 2 for shape in ups],
            "kernel_size": shapes["decoder.model.0.conv.conv.weight"][2],
            "last_kernel_size": shapes[f"decoder.model.{last}.conv.conv.weight"][2],
            "residual_kernel_size": shapes["decoder.model.3.block.1.conv.conv.weight"][2],
            "codebook_size": first[0],
            "codebook_dim": first[1],
            "vector_quantization_hidden_dimension": first[1],
            "num_quantizers": count,
            "num_semantic_quantizers": semantic,
            "num_hidden_layers": len(layers),
            "intermediate_size": shapes["decoder_transformer.transformer.layers.0.linear1.weight"][
                0
            ],
            "upsample_groups": hidden // shapes["upsample.convtr.convtr.convtr.weight"][1],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the file holds no Mimi as Kyutai stores it ({error} is not there or has another "
            "shape); use the tokenizer-….safetensors of an LFM2-Audio checkpoint"
        ) from None


def to_transformers(state: Mapping[str, Tensor], heads: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of `MimiModel` (transformers 5.23), and the names nobody knows.

    Args:
        state: Stored name -> tensor.
        heads: Attention heads, which decide how rotary pairs are laid out.
    """
    made: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if m := _FUSED.fullmatch(name):
            stem = f"{m[1]}.{m[1]}_transformer.layers.{m[2]}.self_attn"
            q, k, v = tensor.chunk(3)
            made[f"{stem}.q_proj.weight"] = _half_split(q, heads)
            made[f"{stem}.k_proj.weight"] = _half_split(k, heads)
            made[f"{stem}.v_proj.weight"] = v.contiguous()
        elif (own := _own_name(name)) is not None:
            made[own] = tensor
        else:
            unknown.append(name)
    return made, unknown


def _own_name(name: str) -> str | None:
    if name in _RATES:
        return _RATES[name]
    if m := _NET.fullmatch(name):
        return f"{m[1]}.{m[1]}_seanet.layers.{m[2]}.conv.{m[3]}"
    if (m := _LAYER.fullmatch(name)) and m[3] in _PARTS:
        return f"{m[1]}.{m[1]}_transformer.layers.{m[2]}.{_PARTS[m[3]]}.{m[4]}"
    if (m := _CODES.fullmatch(name)) and m[1] in _QUANTIZERS and m[3] in _CODEBOOK:
        part = f"{_QUANTIZERS[m[1]]}_residual_vector_quantizer"
        return f"quantizer.{part}.layers.{m[2]}.codebook.{_CODEBOOK[m[3]]}"
    if (m := _PROJECTION.fullmatch(name)) and m[1] in _QUANTIZERS:
        return f"quantizer.{_QUANTIZERS[m[1]]}_residual_vector_quantizer.{m[2]}.weight"
    return None


def _half_split(weight: Float[Tensor, "m d"], heads: int) -> Float[Tensor, "m d"]:
    """Rows of rotary pairs (2i, 2i+1) of each head become rows (i, i + e/2)."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).flatten(0, 1)
