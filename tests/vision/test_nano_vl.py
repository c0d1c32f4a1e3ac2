"""The embedded model means something: it is small, official in form, and answers rightly."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import Lfm2VlForConditionalGeneration

import lfm2_mm
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.locate import locate
from lfm2_mm.model import Model
from lfm2_vision.demo import drawn_sample, examples, same_answer
from lfm2_vision.scenes import CORE_KINDS, for_evaluation, stream


@cache
def model() -> Model:
    loaded = lfm2_mm.load("nano-vl")
    assert isinstance(loaded, Model)
    return loaded


def test_it_is_small_and_in_the_official_form() -> None:
    folder = locate("nano-vl").folder
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 9_000_000
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config["model_type"] == "lfm2_vl"
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {torch.bfloat16}
    assert checkpoint.nbytes / 2 <= 4_000_000


def test_transformers_gives_the_same_scores() -> None:
    folder = locate("nano-vl").folder
    read: Any = Lfm2VlForConditionalGeneration.from_pretrained
    theirs, info = read(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    path, question, _ = next(examples())
    content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
    prompt = model().prompt([{"role": "user", "content": content}])
    tensors = prompt.slots[0].prepared.tensors
    patches = tensors["patches"][None]
    with torch.no_grad():
        scores = theirs(
            input_ids=prompt.ids[None],
            pixel_values=patches,
            spatial_shapes=tensors["shapes"],
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32),
        ).logits[0]
    torch.testing.assert_close(model().engine.logits(prompt), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("row", list(examples()), ids=lambda row: row[0].name)
def test_the_shipped_pictures_are_answered_rightly(row: tuple[object, str, str]) -> None:
    path, question, answer = row
    assert same_answer(model().ask(question, images=[path]), answer)


def test_most_questions_about_new_scenes_of_known_things_are_answered_rightly() -> None:
    right = total = 0
    for seed in range(1000, 1024):
        sample = drawn_sample(seed)
        rng = stream(seed, 0, "held_out", "test")
        for qa in for_evaluation(sample.scene, rng, CORE_KINDS):
            total += 1
            right += same_answer(model().ask(qa.question, images=[sample.image]), qa.answer)
    assert total >= 80
    assert right / total >= 0.9
