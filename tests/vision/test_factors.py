"""Shape and colour as directions among rows, and steps that exchange one of them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from tokenizers import Tokenizer

from lfm2_mm.train.objectives import IGNORE
from lfm2_vision import nano, nano_recipe
from lfm2_vision.factors import Exchange, Factors
from lfm2_vision.losses import scene_hidden
from lfm2_vision.scenes import ALL_COLOURS, ALL_SHAPES, generate
from lfm2_vision.training import SceneEncoder


def test_factors_are_told_apart_and_exchanged_one_at_a_time() -> None:
    torch.manual_seed(0)
    shapes, colours = 8, 12
    factors = Factors(16, shapes, colours)
    true_shape, true_colour = torch.randn(shapes, 16) * 9, torch.randn(colours, 16) * 9
    shape = torch.randint(1, shapes + 1, (400,))
    colour = torch.randint(1, colours + 1, (400,))
    share = torch.rand(400)
    rows = share[:, None] * (true_shape[shape - 1] + true_colour[colour - 1])
    for _ in range(300):  # older rows, of another scale, are forgotten
        factors.watch(3 * rows, share, shape, colour)
    for _ in range(300):
        factors.watch(rows, share, shape, colour)
    differences = factors.table("shape") - factors.table("shape")[:1]
    torch.testing.assert_close(differences, true_shape - true_shape[:1], atol=0.5, rtol=0)

    to_first = torch.zeros(shapes, shapes)
    to_first[:, 0] = 1
    shape[:5] = IGNORE  # a shape without a name stays what it is
    shape[5:10] = 0
    with torch.no_grad():
        out = factors.exchanged(rows, share, shape, colour, Exchange("shape", to_first))
    wanted = share[:, None] * (true_shape[:1] + true_colour[colour - 1])
    torch.testing.assert_close(out[10:], wanted[10:], atol=0.5, rtol=0)
    assert torch.equal(out[:10], rows[:10])


def test_exchanged_steps_ask_nothing_about_what_is_exchanged() -> None:
    tokenizer = nano.tokenizer_files()["tokenizer.json"]
    plan = nano_recipe.recipe_more(100)
    few = tuple(replace(stage, batch=2, exchanged=1.0) for stage in plan.stages)
    plan = replace(plan, stages=few)
    data = nano_recipe.Batches(plan, tokenizer, nano.IMAGES)
    tower_only = data[2]
    assert tower_only.exchange is None
    decoder, seen = Tokenizer.from_str(tokenizer), set()
    for step in (step for step in range(20, 40) if step % 8):
        batch = data[step]
        if batch.exchange is None:  # scenes without names of shapes or colours
            continue
        factor = batch.exchange.factor
        seen.add(factor)
        assert set(batch.kinds) <= {"count", "exist"}
        mixture = batch.exchange.mixture
        torch.testing.assert_close(mixture.sum(1), torch.ones(len(mixture)))
        names = ALL_SHAPES if factor == "shape" else ALL_COLOURS
        assert len(mixture) == len(names)
        for start, length in batch.branches:
            words = decoder.decode(batch.ids[start : start + length].tolist()).lower()
            assert not any(name in words for name in names), words
    assert seen == {"shape", "colour"}


def test_the_connector_learns_nothing_from_exchanged_rows() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    sample = generate(3, 1, profile=nano_recipe.NEAR)
    model, factors = nano.build(), Factors(nano.BACKBONE.hidden_size, 8, 12)
    connector = next(model.multi_modal_projector.parameters())
    batch = encoder.batch([sample])
    torch.autograd.backward(scene_hidden(model, batch, factors=factors).last.sum())
    assert connector.grad is not None
    connector.grad = None
    exchanged = replace(batch, exchange=Exchange.drawn("shape", 8, Random(0)))
    torch.autograd.backward(scene_hidden(model, exchanged, factors=factors).last.sum())
    assert connector.grad is None
    assert any(p.grad is not None for p in model.language_model.parameters())
