"""The LFM2 backbone: embeddings in, hidden states out.

Dense, sparse (MoE) and bidirectional models are this one stack with another config. It neither
tokenizes nor samples, and it does not know whether its rows are a training batch or the next
tokens of many conversations: a `Mixing` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_mm import fused
from lfm2_mm.config import BackboneConfig
from lfm2_mm.kernels.forward import DecodeStep
from lfm2_mm.kernels.stepping import decode_step
from lfm2_mm.mixing import Mixing, Ragged
from lfm2_mm.moe import SparseMoe
from lfm2_mm.operators import Attention, RMSNorm, Rotary, ShortConv, SwiGLU

__all__ = ["Backbone", "Block"]


class Block(nn.Module):
    """`x += operator(norm(x)); x += ffn(norm(x))`, the operator a short conv or attention."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.is_attention = config.layer_types[layer] == "full_attention"
        self.operator_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if self.is_attention:
            self.self_attn = Attention(config)
        else:
            self.conv = ShortConv(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward: nn.Module = (
            SparseMoe(config)
            if config.is_sparse(layer)
            else SwiGLU(config.hidden_size, config.ffn_size)
        )

    def forward(
        self,
        x: Float[Tensor, "*n d"],
        mixing: Mixing,
        rotary: tuple[Float[Tensor, "*n 1 e"], Float[Tensor, "*n 1 e"]],
    ) -> Float[Tensor, "*n d"]:
        """One block over `[b, t, d]` or packed rows `[n, d]`."""
        h = self.operator_norm(x)
        if self.is_attention:
            x = x + self.self_attn(h, mixing, self.layer, rotary)
        else:
            x = x + self.conv(h, mixing, self.layer)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out

    def weights(self) -> tuple[object, ...]:
        """What holds some of its weights; other objects once they are packed anew."""
        first: Any = self.self_attn.q_proj if self.is_attention else self.conv.in_proj
        last: Any = self.feed_forward
        if isinstance(last, SparseMoe):
            last = last.experts[-1]
        return getattr(first, "weight", None), getattr(last.w2, "weight", None)

    def pack(self) -> None:
        """Lay out the weights for inference where that helps (see `fused.pack`).

        Experts stay as they are on disk, so that only those chosen are ever read.
        """
        parts = [child for child in self.children() if not isinstance(child, SparseMoe)]
        fused.pack(layer for part in parts for layer in part.modules())


class Backbone(nn.Module):
    """The stack of blocks between the token embedding and the final norm."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self._step: tuple[tuple[object, ...], DecodeStep | None] | None = None

    def embed(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Token embeddings."""
        rows: Tensor = self.embed_tokens(ids)
        return rows

    def forward(self, x: Float[Tensor, "*n d"], mixing: Mixing) -> Float[Tensor, "*n d"]:
        """Hidden states after the final norm, of the same shape as `x`.

        Args:
            x: Embeddings: `[b, t, d]` with `Whole`, packed rows `[n, d]` with `Ragged`.
            mixing: How these positions see each other, and where they stand.
        """
        if isinstance(mixing, Ragged) and mixing.plain and not torch.is_grad_enabled():
            if (step := self._native_step()) is not None:
                caches, counts = zip(*mixing.runs, strict=True)
                hidden, states = step.run(x, caches, counts, mixing.marks)
                mixing.keep(states)
                return hidden
        rotary = self.rotary(mixing.positions, x.dtype)
        for block in self.layers:
            x = block(x, mixing, rotary)
        out: Tensor = self.embedding_norm(x)
        return out

    def _native_step(self) -> DecodeStep | None:
        """One call through all layers, where their weights are quantised.

        Looked for anew when the first or the last block has other weights than before.
        """
        ends = (self.layers[0], self.layers[-1]) if len(self.layers) else ()
        now = tuple(part for block in ends for part in cast(Block, block).weights())
        if (
            self._step is None
            or len(now) != len(self._step[0])
            or any(a is not b for a, b in zip(now, self._step[0], strict=True))
        ):
            self._step = now, decode_step(self)
        return self._step[1]

    def pack(self) -> Iterator[None]:
        """Pack one block with each item; see `Block.pack`."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.pack()
            yield
