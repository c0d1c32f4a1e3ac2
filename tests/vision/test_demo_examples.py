from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm2_vision.demo import EXAMPLES, Example, _three, drawn_sample, examples, make_examples


def test_the_shipped_pictures_are_what_the_generator_draws(tmp_path: Path) -> None:
    make_examples(tmp_path)
    for path, _, _ in examples():
        with Image.open(path) as shipped, Image.open(tmp_path / path.name) as drawn:
            assert shipped.size == drawn.size and shipped.format == drawn.format
            a, b = (np.asarray(image.convert("RGB"), dtype=int) for image in (shipped, drawn))
            worst = 0 if path.suffix == ".png" else 8  # JPEG decoders round differently
            assert np.abs(a - b).max() <= worst
    listed = json.loads((tmp_path / "examples.json").read_text())
    shipped_list = json.loads((path.parent / "examples.json").read_text())
    assert listed == shipped_list


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.file)
def test_the_shipped_answers_are_true(example: Example) -> None:
    things = example.sample().scene.things
    by_shape = {thing.shape: thing for thing in things}
    truth = {
        "What colour is the star?": by_shape["star"].colour if "star" in by_shape else None,
        "How many circles are there?": str(sum(t.shape == "circle" for t in things)),
        "What shape is yellow?": next((t.shape for t in things if t.colour == "yellow"), None),
    }
    assert truth[example.question] == example.answer


def test_the_three_pictures_differ_in_kind() -> None:
    sizes = {example.file: example.size for example in EXAMPLES}
    assert sizes == {"simple.png": (256, 256), "wide.png": (900, 600), "tall.jpg": (240, 480)}


@pytest.mark.parametrize("seed", [*range(30), 123_456_789, -1])
def test_every_seed_gives_three_questions(seed: int) -> None:
    sample = drawn_sample(seed)
    assert not sample.scene.has_held_out_pair
    asked = _three(sample, seed)
    assert len({qa.question for qa in asked}) == 3
