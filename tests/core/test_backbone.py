"""The backbone against transformers 5.23: every variant, its names, and bf16 beside fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from lfm2_mm.backbone import Backbone
from lfm2_mm.chat import Prompt
from lfm2_mm.mixing import Whole
from tests import oracle


@pytest.mark.parametrize("name", oracle.TEXT_VARIANTS)
def test_logits_equal_transformers(name: str) -> None:
    prompt = Prompt.from_ids(oracle.ids(37, seed=1))
    mine = oracle.shared(name).logits(prompt.ids)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, oracle.their_logits(name, prompt), atol=oracle.CLOSE, rtol=0)
    assert mine.std() > 0.1  # the weights say something


@pytest.mark.parametrize("name", oracle.TEXT_VARIANTS)
def test_parameter_names_are_those_on_disk(name: str) -> None:
    with safe_open(oracle.folder(name) / "model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    stored = {key.removeprefix("model."): shape for key, shape in shapes.items()}
    stored.pop("lm_head.weight", None)
    mine = {key: list(t.shape) for key, t in oracle.shared(name).backbone.state_dict().items()}
    assert mine == stored


def test_a_rectangle_has_rows_that_do_not_meet() -> None:
    model = oracle.shared("dense")
    rows = torch.stack([oracle.ids(12, seed=i) for i in range(3)])
    with torch.no_grad():
        both = model.backbone(model.backbone.embed(rows), Whole(3, 12))
        for i in range(3):
            one = model.backbone(model.backbone.embed(rows[i : i + 1]), Whole(1, 12))
            torch.testing.assert_close(both[i], one[0], atol=1e-5, rtol=0)


def test_nothing_looks_ahead() -> None:
    model = oracle.shared("odd")
    ids = oracle.ids(20)
    changed = ids.clone()
    changed[11] = (changed[11] + 1) % 200 + 30
    before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[:11], after[:11])
    assert not torch.allclose(before[11:], after[11:], atol=1e-2)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_bf16_stays_close(name: str) -> None:
    half = oracle.ours(name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    ids = oracle.ids(37, seed=1)
    mine, exact = half.logits(ids), oracle.shared(name).logits(ids)
    assert mine.dtype == torch.float32
    assert F.cosine_similarity(mine.flatten(), exact.flatten(), dim=0) > 0.99
    assert not torch.equal(mine, exact)


def test_built_by_the_layers_it_is_told() -> None:
    config = oracle.shared("moe").backbone.config
    kinds = [block.is_attention for block in Backbone(config).layers]
    assert kinds == [kind == "full_attention" for kind in oracle.LAYERS]
    sparse = [hasattr(block.feed_forward, "experts") for block in Backbone(config).layers]
    assert sparse == [False, False, True, True, True, True]
