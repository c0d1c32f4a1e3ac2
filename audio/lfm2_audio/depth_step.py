"""The depthformer's step through all layers as one native call, where its weights are packed.

The kernel is that of the backbone's decode step, for which a position is a codebook. It turns the
halves of a head against each other where the depthformer turns neighbours, so the rows of queries
and keys are put in another order, which changes no product of the two. Knows how a depthformer is
put together; nothing of how codes are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm2_mm.cache import SequenceCache
from lfm2_mm.config import BackboneConfig, LayerType
from lfm2_mm.kernels.forward import AttentionPart, DecodeStep, StepLayer
from lfm2_mm.kernels.linear import PackedWeight, Ready, prepare

if TYPE_CHECKING:
    from lfm2_audio.depthformer import DepthLayer

__all__ = ["DepthShape", "DepthSteps", "depth_steps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthShape:
    """What the weights of a depthformer do not say.

    Attributes:
        heads: Of queries.
        groups: Heads of keys and values.
        head_dim: Numbers of a head.
        theta: Base of the rotary angles.
        eps: Of the norms.
    """

    heads: int
    groups: int
    head_dim: int
    theta: float
    eps: float


class DepthSteps:
    """One step for each codebook: they share the layers, and differ in the norm behind them.

    Args:
        config: The layers as those of a backbone.
        layers: In order.
        norms: Weight of the norm in front of each codebook's classes.
    """

    def __init__(
        self,
        config: BackboneConfig,
        layers: Sequence[StepLayer],
        norms: Sequence[Float[Tensor, " d"]],
    ) -> None:
        self.config = config
        self._steps = [DecodeStep(config, layers, norm) for norm in norms]

    def begin(self, n: int) -> list[SequenceCache]:
        """What a frame of each of `n` sequences keeps from codebook to codebook."""
        books = len(self._steps)
        return [SequenceCache(self.config, capacity=books) for _ in range(n)]

    def __call__(
        self, book: int, x: Float[Tensor, "n d"], caches: Sequence[SequenceCache]
    ) -> Float[Tensor, "n d"]:
        """What a codebook's classes are scored with, its norm applied.

        Args:
            book: Number of the codebook; as many rows are in the caches.
            x: Input of each sequence.
            caches: From `begin`.
        """
        for cache in caches:
            cache.reserve(1)
        out = self._steps[book](x, caches)
        for cache in caches:
            cache.advance(1)
        return out


def depth_steps(
    layers: Sequence[DepthLayer], norms: Sequence[Float[Tensor, " d"]], shape: DepthShape
) -> DepthSteps | None:
    """The steps of a depthformer; None where a weight is not packed, or torch computes."""
    if not layers or norms[0].device.type != "cpu":
        return None
    made = [_layer(layer, shape) for layer in layers]
    parts = [one for one in made if one is not None]
    if len(parts) < len(made):
        return None
    attention: LayerType = "full_attention"
    config = BackboneConfig(
        vocab_size=1,
        hidden_size=len(norms[0]),
        ffn_size=layers[0].feed_forward.w1.out_features,
        layer_types=(attention,) * len(parts),
        n_heads=shape.heads,
        n_kv_heads=shape.groups,
        head_dim=shape.head_dim,
        rope_theta=shape.theta,
        norm_eps=shape.eps,
        max_positions=len(norms),
        eos_ids=(),
    )
    return DepthSteps(config, parts, norms) if DecodeStep.can_run(config, parts) else None


def _layer(layer: DepthLayer, shape: DepthShape) -> StepLayer | None:
    attention, forward = layer.operator, layer.feed_forward
    packed: Any = getattr(attention.qkv_proj.weight, "packed", None)
    out, w1, w3, w2 = (
        getattr(part.weight, "ready", None)
        for part in (attention.out_proj, forward.w1, forward.w3, forward.w2)
    )
    ready = [one for one in (out, w1, w3, w2) if isinstance(one, Ready)]
    if not isinstance(packed, PackedWeight) or len(ready) < 4:
        return None
    e = shape.head_dim
    halves = torch.cat([torch.arange(0, e, 2), torch.arange(1, e, 2)])
    sizes = [shape.heads, shape.groups, shape.groups]
    q, k, v = torch.split(torch.arange(packed.rows).view(-1, e), sizes)
    norms = attention.bounded_attention
    part = AttentionPart(
        prepare(_rows(packed, q[:, halves].flatten())),
        prepare(_rows(packed, k[:, halves].flatten())),
        prepare(_rows(packed, v.flatten())),
        ready[0],
        norms.q_layernorm.weight[halves],
        norms.k_layernorm.weight[halves],
    )
    before, behind = layer.operator_norm.weight, layer.ffn_norm.weight
    return StepLayer(before, part, behind, ready[1], ready[2], ready[3])


def _rows(packed: PackedWeight, rows: Int[Tensor, " n"]) -> PackedWeight:
    buffers = {name: buffer[rows] for name, buffer in packed.buffers.items()}
    return PackedWeight(packed.scheme, len(rows), packed.cols, buffers)
