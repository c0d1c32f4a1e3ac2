"""A bidirectional LFM2 for `transformers`: what a saved bidirectional retriever takes along.

Written into checkpoints as `modeling_lfm2_bidirectional.py`, to be run by sentence-transformers or
PyLate with `trust_remote_code=True`; this package never runs it. It needs torch and transformers
only (4.56 and newer), and computes each layer from the submodules of `Lfm2Model`: attention over
all real positions, convolutions centred and unmasked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.lfm2.modeling_lfm2 import Lfm2Model, apply_rotary_pos_emb

__all__ = ["Lfm2BidirectionalModel"]


class Lfm2BidirectionalModel(Lfm2Model):  # type: ignore[no-untyped-call]
    """`Lfm2Model` whose attention and short convolutions see both sides."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: `[b, t]`.
            attention_mask: 1 at positions that may be attended to, `[b, t]`.
            position_ids: 0, 1, 2, ... by default.
            inputs_embeds: `[b, t, d]`, instead of ids.
            kwargs: Further arguments of `Lfm2Model`, which make no difference here.
        """
        own: Any = self
        x = own.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        table = own.rotary_emb if hasattr(self, "rotary_emb") else own.pos_emb
        cos, sin = table(x, position_ids=position_ids)
        seen = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for layer in own.layers:
            h = layer.operator_norm(x)
            if hasattr(layer, "self_attn"):
                x = x + _attend(layer.self_attn, h, cos, sin, seen)
            else:
                x = x + _convolve(layer.conv, h)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return BaseModelOutputWithPast(last_hidden_state=own.embedding_norm(x))


def _attend(
    module: Any, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    heads = (*h.shape[:2], -1, module.head_dim)
    q = module.q_layernorm(module.q_proj(h).view(heads)).transpose(1, 2)
    k = module.k_layernorm(module.k_proj(h).view(heads)).transpose(1, 2)
    v = module.v_proj(h).view(heads).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    projected: torch.Tensor = module.out_proj(out.transpose(1, 2).flatten(2))
    return projected


def _convolve(module: Any, h: torch.Tensor) -> torch.Tensor:
    b, c, u = module.in_proj(h).transpose(1, 2).chunk(3, dim=1)
    weight = module.conv.weight
    taps = weight.shape[-1]
    padded = F.pad(b * u, (taps // 2, taps - 1 - taps // 2))
    y = F.conv1d(padded, weight, module.conv.bias, groups=weight.shape[0])
    projected: torch.Tensor = module.out_proj((c * y).transpose(1, 2))
    return projected
