"""The forward passes of training compute what the model's own modules do."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from lfm2_vision import nano
from lfm2_vision.losses import scene_hidden
from lfm2_vision.quick import Quick
from lfm2_vision.scenes import Profile, generate
from lfm2_vision.training import SceneBatch, SceneEncoder

NEAR = Profile(canvas=(128, 200), things=(2, 4))


def batch() -> SceneBatch:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    return encoder.batch([generate(3, i, profile=NEAR, questions=8) for i in range(3)])


def test_rows_and_states_equal_those_of_the_modules() -> None:
    model, given = nano.embedded(), batch()
    with torch.no_grad():
        hidden = scene_hidden(model, given)
        rows = model.vision_tower(given.patches, given.shapes)
        cells = model.multi_modal_projector(rows, given.shapes)
        backbone = model.language_model
        x = backbone.embed(given.ids).index_copy(0, given.image_positions, cells)
        last = backbone(x, given.mixing)
    torch.testing.assert_close(hidden.rows, rows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.cells, cells, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.last, last, atol=1e-5, rtol=1e-4)
    assert len(hidden.words) == len(given.named) > 0
    assert len(hidden.asked) == len(given.asked) > 0


def test_states_are_those_after_each_layer() -> None:
    model, given = nano.embedded(), batch()
    backbone, seen = model.language_model, []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out))
        for block in backbone.layers
    ]
    with torch.no_grad():
        x = backbone.embed(given.ids)
        states = Quick(model.vision_tower, backbone, compiled=False).read(x, given.mixing)
        backbone(x, given.mixing)
    for hook in hooks:
        hook.remove()
    assert len(states) == len(seen) == backbone.config.n_layers
    for state, wanted in zip(states[:-1], seen[:-1], strict=True):
        torch.testing.assert_close(state, wanted, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    model, given = nano.embedded(), batch()
    hidden = scene_hidden(model, given)
    total = hidden.last.square().mean() + hidden.rows.square().mean()
    torch.autograd.backward(total)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
