"""The sparse feed-forward of LFM2-8B-A1B: a sigmoid router over SwiGLU experts.

The router selects with a bias and weighs without it; the bias stays fp32. Each expert keeps its
own tensors, exactly as on disk, so that only the chosen experts' weights are ever read. Source:
`modular_lfm2_moe.py` of transformers 5.23. Knows nothing of time or caches.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_mm.config import BackboneConfig
from lfm2_mm.operators import SwiGLU

__all__ = ["SparseMoe"]


class SparseMoe(nn.Module):
    """Mixture of experts; a token runs through `n_experts_per_token` of them."""

    expert_bias: Float[Tensor, " experts"]

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.top_k = config.n_experts_per_token
        self.normalise = config.normalise_routing
        self.scale = config.routing_scale
        self.gate = nn.Linear(config.hidden_size, config.n_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(config.hidden_size, config.expert_size) for _ in range(config.n_experts)
        )
        self.use_bias = config.use_expert_bias
        if self.use_bias:
            self.register_buffer("expert_bias", torch.zeros(config.n_experts))

    def route(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n top"], Int[Tensor, "n top"]]:
        """Weight and index of the chosen experts of each token."""
        scores = self.gate(x).sigmoid()
        ranked = scores + self.expert_bias if self.use_bias else scores
        chosen = ranked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return weights * self.scale, chosen

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Run every token through its experts and add up their weighted outputs."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        out = torch.zeros_like(rows)
        for expert in torch.unique(chosen).tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            y = self.experts[expert](rows[token]) * weights[token, place, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out.view_as(x)
