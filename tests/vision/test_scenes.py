"""The scene world: purity, what is held out, geometry, balance of answers, and the tokenizer."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2_mm.errors import SettingError
from lfm2_vision import scenes
from lfm2_vision.scenes import (
    CORE,
    EXTRA,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    QA,
    WORDS,
    Profile,
    Scene,
    Thing,
    ask_all,
    build_tokenizer,
    describe,
    for_evaluation,
    generate,
    generate_scene,
    label_map,
    pick,
    render,
    stream,
    wordings,
    world,
)
from lfm2_vision.scenes import text as scene_text


@cache
def _scenes(split: world.Split, number: int, profile: Profile = CORE) -> tuple[Scene, ...]:
    return tuple(generate_scene(3, i, split=split, profile=profile) for i in range(number))


# --- purity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_sample_is_a_pure_function_of_its_arguments(split: world.Split) -> None:
    first = generate(7, 4, split=split, profile=EXTRA)
    again = generate(7, 4, split=split, profile=EXTRA)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.scene, first.questions) == (again.scene, again.questions)
    assert first.image.size == (first.scene.width, first.scene.height)
    for other in (generate(7, 5, split=split, profile=EXTRA), generate(8, 4, split=split)):
        assert other.scene != first.scene


def test_a_sample_is_the_same_in_another_process() -> None:
    code = (
        "from lfm2_vision.scenes import *; import hashlib; s = generate(7, 4, profile=EXTRA);"
        "print(hashlib.sha256(s.image.tobytes() + repr(s.questions).encode()).hexdigest())"
    )
    here = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(here) == 1


def test_importing_the_scenes_imports_no_torch() -> None:
    code = "import sys, lfm2_vision.scenes; print('torch' in sys.modules, len(sys.modules) > 0)"
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


# --- what is held out -----------------------------------------------------------------------------


def test_the_held_out_pairs_are_spread_as_promised() -> None:
    core = [pair for pair in HELD_OUT_PAIRS if pair[0] in world.CORE_SHAPES]
    assert (len(HELD_OUT_PAIRS), len(core)) == (12, 8)
    assert set(Counter(shape for shape, _ in core).values()) == {2}
    assert max(Counter(colour for _, colour in core).values()) <= 2
    assert {colour for _, colour in core} == set(world.COLOURS)
    assert {s for s, _ in HELD_OUT_PAIRS} == set(world.ALL_SHAPES)


def test_the_words_are_disjoint_short_and_spelled_with_trained_letters() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 150
    assert len(set(HELD_OUT_WORDS)) == len(HELD_OUT_WORDS) == 30
    assert not set(WORDS) & set(HELD_OUT_WORDS)
    assert all(re.fullmatch("[A-Z]{2,6}", word) for word in WORDS + HELD_OUT_WORDS)
    assert set("".join(HELD_OUT_WORDS)) <= set("".join(WORDS))


def test_training_shows_and_names_nothing_held_out() -> None:
    held_out_wording = {
        kind: "|".join(re.sub(r"\\\{.*?\\\}", ".+", re.escape(t)) for t in templates)
        for kind, templates in wordings.HELD_OUT.items()
    }
    for i, scene in enumerate(_scenes("train", 300, EXTRA)):
        assert not scene.has_held_out_pair
        assert scene.sign is None or scene.sign.word in WORDS
        for qa in pick(scene, stream(3, i, "train", "pick"), 6):
            assert (qa.args.get("shape"), qa.args.get("colour")) not in HELD_OUT_PAIRS
            assert qa.wording_seen
            assert not re.fullmatch(held_out_wording[qa.kind], qa.question)


def test_the_held_out_split_shows_everything_and_held_out_pairs_in_half_of_its_scenes() -> None:
    scenes_ = _scenes("held_out", 600, EXTRA)
    assert 0.45 < sum(s.has_held_out_pair for s in scenes_) / len(scenes_) < 0.55
    seen = {thing.pair for s in scenes_ for thing in s.things}
    assert seen == {(shape, colour) for shape in world.ALL_SHAPES for colour in world.COLOURS}
    words = {s.sign.word for s in scenes_ if s.sign is not None}
    assert words & set(WORDS) and words & set(HELD_OUT_WORDS)


def test_held_out_wordings_are_marked_and_differ_from_those_of_training() -> None:
    scene = _scenes("held_out", 8, EXTRA)[7]
    for kind in scenes.KINDS:
        assert 4 <= len(set(wordings.SEEN[kind])) <= 8
        assert 1 <= len(wordings.HELD_OUT[kind]) <= 3
        assert not set(wordings.SEEN[kind]) & set(wordings.HELD_OUT[kind])
    for choice, marks in (("seen", {True}), ("held_out", {False}), ("any", {True, False})):
        asked = ask_all(scene, stream(0, 0, "held_out", choice), choice)  # type: ignore[arg-type]
        assert {qa.wording_seen for qa in asked} == marks


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [CORE, EXTRA, Profile(canvas=(128, 180))])
def test_things_keep_their_sizes_margins_and_contrast(profile: Profile) -> None:
    shares = []
    for scene in _scenes("train", 200, profile):
        short = min(scene.width, scene.height)
        assert profile.canvas[0] <= short and max(scene.width, scene.height) <= profile.canvas[1]
        assert 1 <= len(scene.things) <= 5
        for i, thing in enumerate(scene.things):
            least = 1 / 10 if profile.small_probability else 1 / 6
            assert least - 1e-9 <= 2 * thing.r / short <= 1 / 2.2 + 1e-9
            shares.append(2 * thing.r / short)
            left, top, right, bottom = thing.bounds()
            assert left >= 0 and top >= 0 and right <= scene.width and bottom <= scene.height
            for tone in scene.ground.tones():
                assert world.contrast(thing.rgb, tone) >= 60
            for other in scene.things[:i]:
                gap = math.dist((thing.cx, thing.cy), (other.cx, other.cy))
                gap -= thing.r * world.REACH[thing.shape] + other.r * world.REACH[other.shape]
                assert gap >= 2
    assert min(shares) < 0.18 and max(shares) > 0.42


def test_max_aspect_bounds_the_canvas_and_free_canvases_reach_far() -> None:
    ratios = [max(s.width, s.height) / min(s.width, s.height) for s in _scenes("train", 300)]
    assert max(ratios) > 4
    for scene in _scenes("train", 100, Profile(max_aspect=1.5)):
        assert max(scene.width, scene.height) / min(scene.width, scene.height) <= 1.51


def test_the_pixels_of_each_label_have_the_colour_of_their_thing() -> None:
    for scene in _scenes("held_out", 40, EXTRA):
        labels, pixels = label_map(scene), np.asarray(render(scene), dtype=np.float64)
        assert labels.shape == (scene.height, scene.width) and labels.dtype == np.uint8
        ground = np.median(pixels[labels == 0], axis=0)
        for i, thing in enumerate(scene.things):
            mine = labels == i + 1
            assert np.abs(np.median(pixels[mine], axis=0) - thing.rgb).max() <= 1
            assert np.abs(np.median(pixels[mine], axis=0) - ground).max() >= 55
            assert abs(mine.sum() / _area(thing) - 1) < 0.1
            rows, columns = np.nonzero(mine)
            left, top, right, bottom = thing.bounds()
            got = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.subtract(got, (left, top, right, bottom))).max() <= 2.5
        assert (scene.sign is not None) == bool((labels == scenes.SIGN_LABEL).any())


def _area(thing: Thing) -> float:
    corners = thing.corners()
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs)) / 2


def test_shapes_have_comparable_areas() -> None:
    areas = {
        shape: _area(Thing(shape=shape, colour="red", rgb=(0, 0, 0), cx=0, cy=0, r=1))
        for shape in world.ALL_SHAPES
    }
    assert max(areas.values()) / min(areas.values()) < 2


def test_colours_stay_apart_and_every_ground_is_drawn() -> None:
    rgbs: dict[str, list[world.Rgb]] = defaultdict(list)
    grounds = set()
    for scene in _scenes("train", 400):
        grounds.add(scene.ground.kind)
        for thing in scene.things:
            rgbs[thing.colour].append(thing.rgb)
    assert grounds == set(world.GROUND_KINDS)
    for one in world.COLOURS:
        for other in world.COLOURS:
            if one < other:
                assert min(world.contrast(a, b) for a in rgbs[one] for b in rgbs[other]) >= 35


# --- questions ------------------------------------------------------------------------------------


def _truth(scene: Scene, qa: QA) -> str:
    """The answer, worked out again from the geometry."""

    def fitting(prefix: str = "") -> list[Thing]:
        shape, colour = qa.args.get(f"{prefix}shape"), qa.args.get(f"{prefix}colour")
        found = [t for t in scene.things if shape is None or t.shape == shape]
        return [t for t in found if colour is None or t.colour == colour]

    if qa.kind == "exist":
        return "yes" if fitting() else "no"
    if qa.kind == "count":
        return str(len(fitting()))
    if qa.kind == "sign":
        return "there is no sign" if scene.sign is None else scene.sign.word
    if qa.kind in ("colour", "shape"):
        (thing,) = fitting()
        return thing.colour if qa.kind == "colour" else thing.shape
    (a,), (b,) = fitting("a_"), fitting("b_")
    across = "left" in qa.args["side"] or "right" in qa.args["side"]
    if across:
        assert abs(a.cx - b.cx) >= scene.width / 8
        true = "left" if a.cx < b.cx else "right"
    else:
        assert abs(a.cy - b.cy) >= scene.height / 8
        true = "above" if a.cy < b.cy else "below"
    if qa.kind == "where":
        return true
    return "yes" if qa.args["side"] == true else "no"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_true(split: world.Split) -> None:
    kinds = set()
    for i, scene in enumerate(_scenes(split, 150, EXTRA)):
        rng = stream(3, i, split, "truth")
        asked = pick(scene, rng, 6) + for_evaluation(scene, rng, wordings="any")
        for qa in asked + (ask_all(scene, rng) if i < 30 else []):
            kinds.add(qa.kind)
            if qa.kind != "describe":
                assert qa.answer == _truth(scene, qa), qa
            for word in qa.args.values():
                if word in world.ALL_SHAPES + world.COLOURS:
                    assert word in qa.question
    assert kinds == set(scenes.KINDS)


def test_answers_are_balanced_and_a_blind_guess_gets_little() -> None:
    """The guesser knows the kind, or even what is asked, and has seen the answers to others."""
    for split in ("train", "held_out"):
        asked = defaultdict(list)
        for i, scene in enumerate(_scenes(split, 1500)):
            for qa in for_evaluation(scene, stream(3, i, split, "evaluation")):
                asked[qa.kind].append(qa)
        assert set(asked) == set(scenes.CORE_KINDS)
        for kind, bound in (("exist", 0.55), ("relation", 0.55), ("count", 0.30)):
            answers = Counter(qa.answer for qa in asked[kind])
            assert max(answers.values()) / len(asked[kind]) <= bound, (split, kind, answers)
            assert _blind(asked[kind]) <= bound, (split, kind)
        assert set(Counter(qa.answer for qa in asked["count"])) == set("012345")


def _blind(asked: list[QA]) -> float:
    """Accuracy of the most frequent answer to the same question about the other scenes."""
    tables: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
    for qa in asked:
        tables[tuple(sorted(qa.args.items()))][qa.answer] += 1
    right = 0
    for qa in asked:
        rest = tables[tuple(sorted(qa.args.items()))] - Counter([qa.answer])
        right += bool(rest) and rest.most_common(1)[0][0] == qa.answer
    return right / len(asked)


def test_packed_training_questions_are_balanced_and_differ() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for i, scene in enumerate(_scenes("train", 1500)):
        asked = pick(scene, stream(3, i, "train", "pick"), 6)
        assert 3 <= len(asked) <= 6
        keys = {(qa.kind, tuple(qa.args.items())) for qa in asked}
        assert len(keys) == len(asked)
        for qa in asked:
            answers[qa.kind][qa.answer] += 1
    for kind, bound in (("exist", 0.55), ("relation", 0.55), ("count", 0.30)):
        assert max(answers[kind].values()) / answers[kind].total() <= bound
    assert set(answers) == set(scenes.KINDS)


def test_no_answers_include_hard_negatives() -> None:
    hard = total = 0
    for i, scene in enumerate(_scenes("held_out", 300)):
        (qa,) = for_evaluation(scene, stream(3, i, "held_out", "hard"), kinds=("exist",))
        if qa.answer == "no" and len(qa.args) == 2 and len(scene.things) > 2:
            total += 1
            shapes, colours = zip(*(thing.pair for thing in scene.things), strict=True)
            hard += qa.args["shape"] in shapes and qa.args["colour"] in colours
    assert hard / total > 0.2


def test_a_description_groups_equal_things_in_reading_order() -> None:
    def thing(shape: str, colour: str, cx: float, cy: float) -> Thing:
        return Thing(shape=shape, colour=colour, rgb=(0, 0, 0), cx=cx, cy=cy, r=10)

    scene = Scene(
        width=300,
        height=300,
        things=(
            thing("square", "blue", 250, 60),
            thing("star", "orange", 40, 280),
            thing("circle", "red", 50, 90),
            thing("square", "blue", 150, 150),
        ),
        sign=world.Sign(word="CAT", box=(0, 0, 9, 9), size=14, plate=(0, 0, 0), ink=(0, 0, 0)),
        ground=world.Ground(kind="plain", low=(255, 255, 255), high=(255, 255, 255)),
    )
    assert describe(scene) == (
        'a red circle, two blue squares, an orange star and a sign that says "CAT"'
    )


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("canvas", (10, 100), "64 to 4096"),
        ("max_aspect", 0.5, "at least 1"),
        ("things", (0, 9), "1 to 5"),
        ("shapes", ("blob",), ", ".join(world.ALL_SHAPES)),
        ("grounds", (), ", ".join(world.GROUND_KINDS)),
        ("sign_probability", 2.0, "0 to 1"),
    ],
)
def test_a_bad_profile_says_what_to_choose(field: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        Profile(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"Profile.{field} is {value!r}; choose from {allowed}."


def test_an_unknown_split_says_what_to_choose() -> None:
    with pytest.raises(SettingError) as caught:
        generate_scene(0, 0, split="dev")  # type: ignore[arg-type]
    assert str(caught.value) == "The split is 'dev'; choose 'train' or 'held_out'."


# --- tokenizer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


def test_the_tokenizer_has_the_promised_ids_and_is_the_same_each_time(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 1024
    ids = tokenizer.convert_tokens_to_ids(list(scene_text.SPECIAL_TOKENS))
    assert ids == list(range(len(scene_text.SPECIAL_TOKENS)))
    named = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(named) == [0, 1, 2, 6, 7]
    first = ids[scene_text.SPECIAL_TOKENS.index("<|img_row_1_col_1|>")]
    for row, column in ((1, 10), (2, 1), (10, 10)):
        token_id = tokenizer.convert_tokens_to_ids(f"<|img_row_{row}_col_{column}|>")
        assert token_id == first + (row - 1) * 10 + column - 1
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 7)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 4096)
    assert tokenizer.image_token == "<image>"
    specials = tokenizer(list(scene_text.SPECIAL_TOKENS), add_special_tokens=False).input_ids
    assert specials == [[i] for i in range(len(scene_text.SPECIAL_TOKENS))]
    assert tokenizer.decode(list(range(114)), skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?",
        "  two  spaces, a\ttab\r\nand a line ",
        "Größe naïve Ελλάδα עברית हिन्दी 日本語 👩‍👩‍👧 e\u0301",
        "ZEBRA 12345 <image",
        "\x00\x7f\ufffd",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id


def test_questions_are_short_and_words_of_signs_are_spelled(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for word in WORDS + HELD_OUT_WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == len(word)
    for answer in (*world.ALL_SHAPES, *world.COLOURS, "yes", "no", *"012345"):
        assert len(tokenizer(answer, add_special_tokens=False).input_ids) <= 2, answer
    assert len(tokenizer("Is the red star left of the square?").input_ids) <= 11


def test_the_template_renders_chatml_with_images_in_place(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == scene_text.CHAT_TEMPLATE
    messages: list[Any] = [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": " Before "},
                {"type": "image", "url": "a.png"},
                {"type": "image"},
                {"type": "text", "text": "after\n"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    turns = (
        "<|startoftext|><|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\n Before <image><image>after\n<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == turns + "<|im_start|>assistant\n"
