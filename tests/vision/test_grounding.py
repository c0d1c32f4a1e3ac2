"""lfm2_vision.grounding: boxes out of whatever a model wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_vision.grounding import Box, parse_boxes

CAT = Box((10, 20, 300, 400), "cat")
DOG = Box((500, 0, 1000, 999), "dog", 1)
LIST = json.dumps([CAT.to_dict(), DOG.to_dict()])


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        f"Here you are:\n```json\n{LIST}\n```\nAnything else?",
        json.dumps({"boxes": [CAT.to_dict(), DOG.to_dict()]}),
        LIST.replace("bbox_2d", "bbox"),
        LIST[1:-1].replace("}, {", "}\n{"),
        "{not json} " + LIST,
        LIST[:-1] + ', {"image_id": 0, "bbox_2d": [1, 2, 3',
        LIST[:-1] + ', {"image_id": 0, "bbox_2d": [1, 2, 3]}, {"label": "x"}]',
    ],
)
def test_whole_boxes_are_found(text: str) -> None:
    assert parse_boxes(text) == [CAT, DOG]


def test_order_of_nested_lists_is_kept() -> None:
    nested = json.dumps({"a": [[CAT.to_dict()]], "b": {"c": DOG.to_dict()}})
    assert parse_boxes(nested) == [CAT, DOG]


@pytest.mark.parametrize(
    ("corners", "bbox"),
    [
        ([300, 400, 10, 20], (10, 20, 300, 400)),
        ([-5, 20, 1200, 400], (0, 20, 1000, 400)),
        ([10.4, 19.6, 300.0, 400], (10, 20, 300, 400)),
        ([10**400, 0, 5, 5], (5, 0, 1000, 5)),
    ],
)
def test_corners_are_put_right(corners: list[float], bbox: tuple[int, int, int, int]) -> None:
    assert parse_boxes(json.dumps({"bbox_2d": corners})) == [Box(bbox)]


@pytest.mark.parametrize(
    "corners", ["[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1, 2, 3, NaN]", '["1", 2, 3, 4]', "null", "{}"]
)
def test_what_is_no_box_is_left_out(corners: str) -> None:
    assert parse_boxes(f'[{{"bbox_2d": {corners}, "label": "x"}}]') == []


def test_labels_and_image_ids() -> None:
    text = '[{"bbox_2d": [1,2,3,4], "label": 7, "image_id": -1}, {"bbox": [1,2,3,4], "label": []}]'
    assert parse_boxes(text) == [Box((1, 2, 3, 4), "7"), Box((1, 2, 3, 4))]
    assert parse_boxes('{"bbox_2d": [1,2,3,4], "label": "a } b { c"}')[0].label == "a } b { c"


def test_pixels() -> None:
    assert CAT.to_pixels(640, 480) == (6, 10, 192, 192)
    assert Box((0, 0, 1000, 1000)).to_pixels(1920, 1080) == (0, 0, 1920, 1080)


@given(st.text(alphabet='{}[]",:bbox_2d 01.-e\\', max_size=80))
def test_never_raises(text: str) -> None:
    assert all(0 <= n <= 1000 for box in parse_boxes(text + LIST) for n in box.bbox)


def test_deep_nesting_and_endless_text() -> None:
    assert parse_boxes('{"a":' * 20000) == []
    assert parse_boxes("[" * 20000 + LIST) == [CAT, DOG]
    assert parse_boxes("") == []
