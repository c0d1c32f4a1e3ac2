"""The sparse feed-forward: routing against its definition, the sum against a plain loop."""

from __future__ import annotations

import pytest
import torch

from lfm2_mm.config import BackboneConfig
from lfm2_mm.moe import SparseMoe
from tests import oracle


def layer(**changes: object) -> SparseMoe:
    raw = {
        "model_type": "lfm2_moe",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
    built: SparseMoe = oracle.randomized(SparseMoe(BackboneConfig.from_dict({**raw, **changes})))
    return built


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_a_token_is_the_weighted_sum_of_its_experts(bias: bool, normalise: bool) -> None:
    moe = layer(use_expert_bias=bias, norm_topk_prob=normalise, routed_scaling_factor=1.5)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    got = moe(x)
    for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(7)).tolist():
        scores = moe.gate(x[b, t]).sigmoid()
        best = (scores + moe.expert_bias if bias else scores).topk(2).indices
        weights = scores[best]
        if normalise:
            weights = weights / (weights.sum() + 1e-6)
        terms = [w * 1.5 * moe.experts[e](x[b, t]) for w, e in zip(weights, best, strict=True)]
        torch.testing.assert_close(got[b, t], torch.stack(terms).sum(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_bias_selects_but_does_not_weigh() -> None:
    moe = layer()
    moe.expert_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0]))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    weights, chosen = moe.route(x)
    assert all(set(row) == {1, 3} for row in chosen.tolist())
    scores = moe.gate(x).sigmoid().gather(-1, chosen)
    assert torch.allclose(weights, scores / (scores.sum(-1, keepdim=True) + 1e-6))


@torch.no_grad()
def test_only_chosen_experts_are_computed() -> None:
    moe = layer()
    moe.expert_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0]))
    for e in (0, 2, 4):
        for p in moe.experts[e].parameters():
            p.fill_(torch.nan)
    assert moe(torch.ones(4, 16)).isfinite().all()


def test_the_bias_stays_fp32_in_bf16() -> None:
    model = oracle.ours("moe", dtype=torch.bfloat16)
    moe = model.backbone.layers[3].feed_forward
    assert isinstance(moe, SparseMoe)
    assert (moe.expert_bias.dtype, moe.gate.weight.dtype) == (torch.float32, torch.bfloat16)
    assert moe.expert_bias.abs().sum() > 0


def test_without_bias_there_is_no_buffer() -> None:
    assert "expert_bias" not in layer(use_expert_bias=False).state_dict()
