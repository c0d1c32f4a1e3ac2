"""The layers of a tower as one native call, where their weights are packed in 8 bits a row.

Knows how a `Siglip2Tower` is put together, and of packed layers only that `layer.weight.ready` is
what kernels take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from lfm2_mm.kernels.encoder import EncoderLayer, EncoderStack
from lfm2_mm.kernels.linear import Ready

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm2_vision.encoder import Siglip2Tower

__all__ = ["tower_stack"]


def tower_stack(tower: Siglip2Tower) -> EncoderStack | None:
    """The stack; None where a layer is not packed so, or this CPU computes layer by layer.

    Weights that were not laid out yet are laid out now.
    """
    config = tower.config
    layers = []
    for layer in tower.encoder.layers:
        found = _layer(layer)
        if found is None:
            return None
        layers.append(found)
    if not EncoderStack.can_run(layers, config.n_heads):
        return None
    return EncoderStack(layers, config.n_heads, config.norm_eps)


def _layer(layer: Any) -> EncoderLayer | None:
    attention, mlp = layer.self_attn, layer.mlp
    four = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    parts = (*four, mlp.fc1, mlp.fc2)
    ready = [getattr(part.weight, "ready", None) for part in parts]
    laid_out = [one for one in ready if isinstance(one, Ready)]
    if len(laid_out) < len(parts) or attention.attend is not F.scaled_dot_product_attention:
        return None
    q, k, v, out, up, down = laid_out
    biases = (four[0].bias, four[1].bias, four[2].bias, four[3].bias)
    return EncoderLayer(
        norm1=_norm(layer.layer_norm1),
        query=q,
        key=k,
        value=v,
        out=out,
        attention_biases=biases,
        norm2=_norm(layer.layer_norm2),
        up=up,
        down=down,
        biases=(mlp.fc1.bias, mlp.fc2.bias),
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias
