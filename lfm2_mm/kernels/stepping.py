"""The native call through a backbone whose weights are packed.

Knows how a `Backbone` is put together, and of packed layers only that `layer.weight.ready` is what
`matmul` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm2_mm.kernels.forward import (
    AttentionPart,
    ConvolutionPart,
    DecodeStep,
    SparsePart,
    StepLayer,
)
from lfm2_mm.kernels.linear import Ready
from lfm2_mm.moe import SparseMoe
from lfm2_mm.operators import SwiGLU

if TYPE_CHECKING:
    from lfm2_mm.backbone import Backbone, Block

__all__ = ["decode_step"]


def decode_step(backbone: Backbone) -> DecodeStep | None:
    """The call; None where a layer is not packed, or torch computes.

    Weights that were not laid out yet are laid out now, but for experts: those when they are
    chosen for the first time.
    """
    config = backbone.config
    if not config.causal or backbone.embedding_norm.weight.device.type != "cpu":
        return None
    _ready(backbone.embed_tokens)  # the largest first: its two layouts are in memory together
    layers = []
    for block in backbone.layers:
        layer = _layer(block)  # type: ignore[arg-type]
        if layer is None:
            return None
        layers.append(layer)
    if not DecodeStep.can_run(config, layers):
        return None
    return DecodeStep(config, layers, backbone.embedding_norm.weight)


def _layer(block: Block) -> StepLayer | None:
    part: ConvolutionPart | AttentionPart
    if block.is_attention:
        attention = block.self_attn
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        found = [_ready(getattr(attention, name)) for name in names]
        q, k, v, out = found
        if q is None or k is None or v is None or out is None:
            return None
        norms = attention.q_layernorm.weight, attention.k_layernorm.weight
        part = AttentionPart(q, k, v, out, *norms)
    else:
        conv = block.conv
        first, last = _ready(conv.in_proj), _ready(conv.out_proj)
        if first is None or last is None:
            return None
        biases = conv.in_proj.bias, conv.conv.bias, conv.out_proj.bias
        part = ConvolutionPart(first, last, conv.conv.weight[:, 0], *biases)
    norms = block.operator_norm.weight, block.ffn_norm.weight
    forward = block.feed_forward
    if isinstance(forward, SparseMoe):
        sparse = _sparse(forward)
        if sparse is None:
            return None
        return StepLayer(norms[0], part, norms[1], None, None, None, sparse)
    if not isinstance(forward, SwiGLU):
        return None
    w1, w3, w2 = (_ready(getattr(forward, name)) for name in _NAMES)
    if w1 is None or w3 is None or w2 is None:
        return None
    return StepLayer(norms[0], part, norms[1], w1, w3, w2)


_NAMES = ("w1", "w3", "w2")


def _sparse(forward: SparseMoe) -> SparsePart | None:
    """The experts, none of which is laid out for it."""
    found = [[getattr(expert, name).weight for name in _NAMES] for expert in forward.experts]
    # asking one for `ready` would lay it out
    kinds = {tuple(getattr(weight, "scheme", None) for weight in weights) for weights in found}
    if None in {kind for three in kinds for kind in three}:
        return None

    def ready(number: int) -> tuple[Ready, Ready, Ready]:
        w1, w3, w2 = (weight.ready for weight in found[number])
        return w1, w3, w2

    uniform = len(kinds) == 1 and all(w1 == w3 for w1, w3, _ in kinds)
    bias = forward.expert_bias if forward.use_bias else None
    router = forward.gate.weight
    if not hasattr(router, "detach"):
        return None
    return SparsePart(router, bias, len(found), uniform, ready)


def _ready(layer: Any) -> Ready | None:
    """What a packed layer multiplies with; None for a layer that is not packed."""
    ready = getattr(layer.weight, "ready", None)
    return ready if isinstance(ready, Ready) else None
