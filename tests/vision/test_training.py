"""Scenes as training rows: labels lie where the things are, words point at what they name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lfm2_mm.errors import SettingError
from lfm2_mm.locate import locate
from lfm2_mm.train.objectives import IGNORE
from lfm2_vision import nano, nano_recipe
from lfm2_vision.losses import Auxiliary, counting_loss, lift_words
from lfm2_vision.pointing import counted_things, named_things
from lfm2_vision.scenes import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    HELD_OUT_PAIRS,
    QA,
    UNNAMED,
    Ground,
    Profile,
    Sample,
    Scene,
    Thing,
    generate,
    generate_scene,
    label_map,
    render,
)
from lfm2_vision.scenes.outlines import nearest_shape, radii
from lfm2_vision.scenes.world import ANCHORS, OUTLINES, REACH, nearest_colour
from lfm2_vision.training import SceneEncoder
from lfm2_vision.unseen import level_loss, unseen_pairs

WIDE = Profile(canvas=(128, 320), max_aspect=4.0, shapes=ALL_SHAPES, colours=ALL_COLOURS)


def test_further_colours_occur_in_training_and_no_held_out_pair_does() -> None:
    pairs = {t.pair for i in range(400) for t in generate_scene(1, i, profile=WIDE).things}
    assert {colour for _, colour in pairs} == set(ALL_COLOURS)
    assert not pairs & HELD_OUT_PAIRS


def test_questions_about_core_scenes_never_name_a_further_colour() -> None:
    for i in range(60):
        for qa in generate(1, i, questions=8).questions:
            named = {qa.args.get(key) for key in ("colour", "a_colour", "b_colour")} - {None}
            assert named <= set(COLOURS)


def test_fills_of_any_colour_avoid_what_is_withheld_and_questions_name_none() -> None:
    free = replace(WIDE, any_colour=1.0)
    things: list[Thing] = []
    kinds: set[str] = set()
    for i in range(150):
        sample = generate(2, i, profile=free, questions=8)
        assert sample.scene.colours == ()
        things += sample.scene.things
        for qa in sample.questions:
            kinds.add(qa.kind)
            if qa.kind == "shape":
                key = {"left": "cx", "right": "cx", "top": "cy", "bottom": "cy"}[qa.args["place"]]
                most = max if qa.args["place"] in ("right", "bottom") else min
                thing = most(sample.scene.things, key=lambda t: getattr(t, key))
                assert qa.answer == thing.shape and qa.args["place"] in qa.question
            assert not {"colour", "a_colour", "b_colour"} & set(qa.args)
    assert kinds == {"exist", "count", "relation", "shape", "where", "sign"}
    assert not {(t.shape, nearest_colour(t.rgb)) for t in things} & HELD_OUT_PAIRS
    named = [min(math.dist(t.rgb, a) for c in ANCHORS.values() for a in c) for t in things]
    assert sum(distance > 40 for distance in named) > len(named) / 3


def test_stripes_are_of_two_colours_and_have_no_name() -> None:
    free = replace(WIDE, size=(200, 200), any_colour=1.0, striped=1.0)
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    for i in range(12):
        sample = generate(4, i, profile=free)
        for number, thing in enumerate(sample.scene.things, 1):
            assert thing.second is not None
            mean = [(a + b) // 2 for a, b in zip(thing.rgb, thing.second, strict=True)]
            near = nearest_colour((mean[0], mean[1], mean[2]))
            assert near == thing.colour and thing.pair not in HELD_OUT_PAIRS
            pixels = np.asarray(sample.image)[label_map(sample.scene) == number].tolist()
            for fill in (thing.rgb, thing.second):
                assert 0.15 < pixels.count(list(fill)) / len(pixels) < 0.85
        batch = encoder.batch([sample])
        assert (batch.patch_shape > 0).any()
        assert (batch.patch_colour == IGNORE).all() and (batch.cell_colour == IGNORE).all()


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_shape_is_nearest_to_itself(shape: str) -> None:
    named, off = nearest_shape(radii(OUTLINES[shape]))
    assert named == shape and off < 1e-9
    if shape == "circle":
        assert radii(OUTLINES[shape]) == pytest.approx([1.0] * 72, abs=1e-3)


def test_blobs_are_like_no_shape_and_teach_colours_only() -> None:
    shapeless = replace(WIDE, size=(200, 200), any_shape=1.0)
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    kinds: set[str] = set()
    for i in range(60):
        sample = generate(5, i, profile=shapeless, questions=8)
        assert sample.scene.shapes == ()
        for thing in sample.scene.things:
            assert thing.shape == UNNAMED and thing.outline is not None
            assert max(math.hypot(x, y) for x, y in thing.outline) <= REACH[UNNAMED] + 1e-9
            shape, off = nearest_shape(radii(thing.outline))
            assert off > 0.07 and (shape, thing.colour) not in HELD_OUT_PAIRS
        for qa in sample.questions:
            kinds.add(qa.kind)
            assert not {"shape", "a_shape", "b_shape"} & set(qa.args)
    assert kinds == {"exist", "count", "relation", "where", "sign"}
    batch = encoder.batch([sample])
    things = batch.patch_shape == IGNORE
    assert things.any() and ((batch.patch_shape == 0) | things).all()
    heads = Auxiliary(4, 4)
    rows, cells = torch.randn(len(things), 4), torch.randn(len(batch.cell_shape), 4)
    total, shares = heads.seen(rows, cells, batch)
    assert shares == {}
    torch.autograd.backward(total)
    for head in (heads.patch_shape, heads.cell_shape):
        assert head.weight.grad is not None
        assert head.weight.grad[0].any() and not head.weight.grad[1:].any()
    assert heads.patch_colour.weight.grad is not None and heads.patch_colour.weight.grad.any()


@pytest.mark.parametrize("colour", ALL_COLOURS)
def test_the_nearest_colour_of_an_anchor_is_its_own(colour: str) -> None:
    assert {nearest_colour(anchor) for anchor in ANCHORS[colour]} == {colour}


def test_unnamed_fills_teach_no_colour() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    batch = encoder.batch([generate(2, 3, profile=replace(WIDE, any_colour=1.0))])
    things = batch.patch_shape != 0
    assert things.any() and (batch.patch_colour[things] < 0).all()
    heads = Auxiliary(4, 4)
    total, _ = heads.seen(torch.randn(len(things), 4), torch.randn(len(batch.cell_shape), 4), batch)
    torch.autograd.backward(total)
    for head in (heads.patch_colour, heads.cell_colour):
        assert head.weight.grad is not None and not head.weight.grad.any()
    assert heads.patch_shape.weight.grad is not None and heads.patch_shape.weight.grad.any()


def test_the_tokenizer_is_that_of_the_embedded_model() -> None:
    folder = locate("nano-vl").folder
    assert nano.tokenizer_files()["tokenizer.json"] == (folder / "tokenizer.json").read_text()


def test_the_way_asked_about_leads_from_the_first_thing_to_the_second() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    star = Thing(shape="star", colour="red", rgb=(220, 40, 40), cx=30, cy=100, r=20)
    disc = Thing(shape="circle", colour="blue", rgb=(50, 80, 220), cx=94, cy=36, r=20)
    ground = Ground(kind="plain", low=(240, 242, 245), high=(240, 242, 245))
    scene = Scene(width=128, height=128, things=(star, disc), sign=None, ground=ground)
    args = {"a_shape": "star", "b_shape": "circle", "side": "left"}
    qa = QA(kind="relation", question="Is the star left of the circle?", answer="yes", args=args)
    batch = encoder.batch([Sample(scene=scene, image=render(scene), questions=(qa,))])
    torch.testing.assert_close(batch.asked_way, torch.tensor([[0.5, -0.5]]))
    assert batch.targets[batch.asked].tolist() == [encoder.tokenizer.token_to_id("yes")]


@pytest.mark.parametrize(
    "question, args, noun, number",
    [
        ("How many blue stars are there?", {"shape": "star", "colour": "blue"}, "blue star", 0),
        ("Count the squares.", {"shape": "square"}, "square", 2),
        ("is there a red thing", {"colour": "red"}, "red", 1),
        ("How many objects do you see?", {}, "object", 2),
    ],
)
def test_what_is_counted_is_named_with_its_number(
    question: str, args: dict[str, str], noun: str, number: int
) -> None:
    things = tuple(
        Thing(shape="square", colour=colour, rgb=ANCHORS[colour][0], cx=x, cy=64, r=20)
        for colour, x in (("red", 30), ("green", 90))
    )
    ground = Ground(kind="plain", low=(240, 242, 245), high=(240, 242, 245))
    scene = Scene(width=128, height=128, things=things, sign=None, ground=ground)
    kind = "exist" if "is there" in question else "count"
    qa = QA(kind=kind, question=question, answer=str(number), args=args)
    found = counted_things(scene, qa)
    assert found == (question.index(noun) + len(noun) - 1, number)
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    batch = encoder.batch([Sample(scene=scene, image=render(scene), questions=(qa,))])
    assert batch.counted_number.tolist() == [number]
    word = encoder.tokenizer.decode([int(batch.ids[batch.counted[0]])])
    assert word.strip() and word.strip() in question
    assert batch.targets[batch.counted_last[0]] >= 0


def test_withheld_answers_are_lifted_to_the_other_wrong_ones() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    disc = Thing(shape="square", colour="blue", rgb=(50, 80, 220), cx=64, cy=64, r=30)
    ground = Ground(kind="plain", low=(240, 242, 245), high=(240, 242, 245))
    scene = Scene(width=128, height=128, things=(disc,), sign=None, ground=ground)
    qas = (
        QA(kind="shape", question="What shape is blue?", answer="square", args={"colour": "blue"}),
        QA(kind="exist", question="Is there a star?", answer="no", args={"shape": "star"}),
    )
    batch = encoder.batch([Sample(scene=scene, image=render(scene), questions=qas)])
    assert batch.targets[batch.shape_asked].tolist() == [
        int(batch.shape_words[ALL_SHAPES.index("square")])
    ]
    head = torch.eye(1024)
    last = torch.zeros(len(batch.ids), 1024)
    star, disc_word = (int(batch.shape_words[ALL_SHAPES.index(n)]) for n in ("star", "circle"))
    row = int(batch.shape_asked[0])
    last[row, star], last[row, disc_word] = -9.0, -9.0  # both are withheld in blue
    last.requires_grad_()
    loss = lift_words(last, head, batch)
    torch.autograd.backward(loss)
    assert float(loss.detach()) > 0.5 and last.grad is not None
    pulled = last.grad.nonzero().tolist()
    assert sorted(pulled) == sorted([[row, star], [row, disc_word]])
    assert (last.grad[row, [star, disc_word]] < 0).all()
    with torch.no_grad():
        last[row, [star, disc_word]] = 9.0
        assert float(lift_words(last, head, batch)) == 0  # what rises is not held


def test_an_unknown_colour_of_a_profile_is_refused() -> None:
    with pytest.raises(SettingError, match=r"Profile.colours is \('mauve',\); choose from red, "):
        Profile(colours=("mauve",))


@pytest.mark.parametrize(
    "question, args, kind, words",
    [
        ("Is the star left of the blue circle?", "star,-,circle,blue", "relation", "star,circle"),
        ("what colour is the star", "star,-", "colour", "star"),
        ("What shape is blue?", "-,blue", "shape", "blue"),
        (
            "Is the blue object over or under the star?",
            "-,blue,star,-",
            "where",
            "blue,star",
        ),
    ],
)
def test_words_point_at_the_things_they_name(
    question: str, args: str, kind: str, words: str
) -> None:
    star, circle = (
        Thing(shape=shape, colour=colour, rgb=(9, 9, 9), cx=x, cy=50, r=20)
        for shape, colour, x in (("star", "red", 40), ("circle", "blue", 120))
    )
    ground = Ground(kind="plain", low=(255, 255, 255), high=(255, 255, 255))
    scene = Scene(width=160, height=100, things=(star, circle), sign=None, ground=ground)
    values = [None if value == "-" else value for value in args.split(",")]
    keys = ["shape", "colour"]
    if len(values) == 4:
        keys = ["a_shape", "a_colour", "b_shape", "b_colour"]
    named = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
    found = named_things(scene, QA(kind=kind, question=question, answer="", args=named))
    assert len(found) == len(words.split(","))
    for (at, thing), word in zip(found, words.split(","), strict=True):
        assert question[: at + 1].endswith(word)
        assert thing is (star if word == "star" else circle)


def test_labels_of_named_words_and_positions_agree_with_the_scene() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    samples = [generate(5, i, profile=Profile(size=(200, 260)), questions=8) for i in range(4)]
    batch = encoder.batch(samples)
    flat = batch.ids.flatten()
    assert len(batch.named) > 8
    for at, shape, colour in zip(
        batch.named.tolist(), batch.named_shape.tolist(), batch.named_colour.tolist(), strict=True
    ):
        said = encoder.tokenizer.decode([int(flat[at])])
        assert ALL_SHAPES[shape - 1] in said or ALL_COLOURS[colour - 1] in said
    # the position next to a thing's centre says what it is
    rows, cols = batch.shapes[0][0] // 2, batch.shapes[0][1] // 2
    place = batch.cell_place[: rows * cols]
    for thing in samples[0].scene.things:
        target = torch.tensor([thing.cx / 200, thing.cy / 260])
        nearest = int((place - target).abs().sum(-1).argmin())
        assert batch.cell_shape[nearest] == ALL_SHAPES.index(thing.shape) + 1


def one_thing(size: tuple[int, int], seed: int) -> Sample:
    return generate(seed, 0, profile=Profile(size=size, things=(1, 1)), questions=2)


@pytest.mark.parametrize("seed", range(6))
def test_a_thing_counts_as_one_however_its_centre_lies(seed: int) -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    sample = one_thing((200, 260), seed)
    batch = encoder.batch([sample])
    shown = batch.cell_share > 0
    assert 1 <= shown.sum() <= 4 and (batch.cell_shape[shown] > 0).all()
    assert not batch.cell_shape[~shown].any()
    assert batch.cell_share.sum() == pytest.approx(1)
    # where its shares balance is its centre
    thing = sample.scene.things[0]
    middle = (batch.cell_share[:, None] * batch.cell_place).sum(0)
    assert middle.tolist() == pytest.approx([thing.cx / 200, thing.cy / 260], abs=1e-4)


def test_the_counting_loss_is_least_where_beliefs_add_up_to_one() -> None:
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    batch = encoder.batch([one_thing((200, 260), 1)])
    kind = int(batch.cell_shape.max())

    def loss(share: torch.Tensor) -> float:
        beliefs = torch.zeros(len(share), 10)
        beliefs[:, kind] = 9.0
        beliefs[:, 0] = (1 - share).logit(eps=1e-6)
        return float(counting_loss(beliefs, batch))

    right = batch.cell_share
    whole = (right == right.max()).float()
    assert loss(right) < loss(0.5 * right) and loss(right) < loss(whole)
    assert loss(right) < loss((1.5 * right).clamp(max=0.99))


def test_an_unknown_thing_is_still_no_ground() -> None:
    """What decides whether something is there is not which name is likely."""
    encoder = SceneEncoder(
        Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"]), nano.IMAGES
    )
    batch = encoder.batch([one_thing((200, 260), 1)])
    logits = torch.zeros(len(batch.cell_shape), 10, requires_grad=True)
    torch.autograd.backward(counting_loss(logits, batch))
    ground = logits.grad[:, 0].clone()  # type: ignore[index]
    unsure = torch.randn(len(batch.cell_shape), 10)
    unsure[:, 0] = 0
    unsure.requires_grad_()
    torch.autograd.backward(counting_loss(unsure, batch))
    torch.testing.assert_close(unsure.grad[:, 0], ground)  # type: ignore[index]


def test_the_auxiliary_loss_leaves_withheld_names_alone() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_str(nano.tokenizer_files()["tokenizer.json"])
    blue = next(
        sample
        for i in range(500)
        if len((sample := generate(9, i, profile=Profile(size=(128, 128)))).scene.things) == 1
        and sample.scene.things[0].colour == "blue"
    )
    batch = SceneEncoder(tokenizer, nano.IMAGES).batch([blue])
    heads = Auxiliary(8, 12)
    cells = torch.randn(len(batch.cell_shape), 12)
    loss, _ = heads.seen(torch.randn(len(batch.patch_shape), 8), cells, batch)
    torch.autograd.backward(loss)
    only = batch.cell_shape != 0
    assert 1 <= int(only.sum()) <= 4 and len(set(batch.cell_shape[only].tolist())) == 1
    # ground positions still teach every class; the blue thing's own positions teach none of them
    logits = torch.zeros(int(only.sum()), 10, requires_grad=True)
    opened = unseen_pairs()[batch.cell_colour[only]]
    torch.autograd.backward(
        torch.nn.functional.cross_entropy(logits.masked_fill(opened, -1e4), batch.cell_shape[only])
    )
    assert logits.grad is not None
    star, circle = ALL_SHAPES.index("star") + 1, ALL_SHAPES.index("circle") + 1
    assert not logits.grad[:, [star, circle]].any() and logits.grad[:, 0].all()


def test_levelling_pulls_withheld_names_and_the_other_wrong_ones_together() -> None:
    logits = torch.tensor([[3.0, -4.0, 1.0, -1.0], [2.0, 0.0, 0.0, 5.0]], requires_grad=True)
    unseen = torch.tensor([[False, True, False, False], [False] * 4])
    loss = level_loss(logits, unseen, torch.tensor([0, 3]))
    assert float(loss.detach()) == pytest.approx(3.5)  # |-4 - mean(1, -1)| - 0.5
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, -1.0, 0.5, 0.5] and not logits.grad[1].any()


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_where_everything_is_shown_nobody_is_asked_whether_it_is(free: float) -> None:
    profile = Profile(size=(256, 256), things=(4, 5), shapes=("circle", "star"), any_colour=free)
    for i in range(60):
        sample = generate(3, i, profile=replace(profile, colours=("green", "purple")))
        shown = {thing.shape for thing in sample.scene.things}
        pairs = {thing.pair for thing in sample.scene.things}
        kinds = [qa.kind for qa in sample.questions]
        if free and len(shown) == 2:
            assert "exist" not in kinds
        if not free and len(pairs) == 4:
            assert "exist" not in kinds
        for qa in sample.questions:
            if qa.kind == "exist" and not free and "colour" in qa.args and "shape" in qa.args:
                pair = (qa.args["shape"], qa.args["colour"])
                assert (qa.answer == "yes") is (pair in pairs)


def test_repeated_scenes_have_more_of_a_kind() -> None:
    tokenizer = nano.tokenizer_files()["tokenizer.json"]
    plan = nano_recipe.recipe_more(100)
    counting = replace(plan.stages[-1], weights=(("count", 1.0),), questions=6, exchanged=0.0)
    wide, narrow = (
        nano_recipe.Batches(
            replace(plan, stages=(replace(counting, repeated=share),)), tokenizer, nano.IMAGES
        )
        for share in (0.0, 1.0)
    )
    steps = [step for step in range(40, 52) if step % 8]  # no tiled ones, which take long
    most = [
        sum(int((data[step].counted_number >= 3).sum()) for step in steps)
        for data in (wide, narrow)
    ]
    assert most[1] > 1.2 * most[0] > 0
