"""Training data of the vision frontend: drawn scenes as rows, with labels of what they show.

Each picture is a prefix with its questions as branches, so every question is learnt as if asked
alone. Knows neither losses nor a schedule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from lfm2_mm.train.objectives import IGNORE
from lfm2_mm.train.packing import Branched
from lfm2_vision.factors import Exchange
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.patches import patchify, views
from lfm2_vision.pointing import counted_things, named_things
from lfm2_vision.prompt_text import ImageTokens, placeholder_text
from lfm2_vision.scenes import (
    ALL_COLOURS,
    ALL_SHAPES,
    QA,
    SIGN_LABEL,
    UNNAMED,
    Sample,
    Scene,
    Thing,
    label_map,
)
from lfm2_vision.tiling import Plan, plan

__all__ = ["GROUND", "SIDES_ASKED", "SIGN", "SceneBatch", "SceneEncoder", "image_token_id"]

SIDES_ASKED = ("left", "right", "above", "below", "left or right", "above or below")
GROUND, SIGN = 0, len(ALL_SHAPES) + 1
_SHAPE_ID = {**{name: i + 1 for i, name in enumerate(ALL_SHAPES)}, UNNAMED: IGNORE}
_COLOUR_ID = {name: i + 1 for i, name in enumerate(ALL_COLOURS)}
_ROUND = 256
_LEAST_COVER = 0.2  # a patch shows a thing when the thing covers this share of it


@dataclass
class SceneBatch:
    """Pictures with their questions, ready for the model.

    Attributes:
        patches: Packed patches of all views, float32 `[n, p]`.
        shapes: Patch rows and columns of each view.
        ids: Tokens `[t]`: the prefixes of all pictures, padding, then all branches by length.
        image_positions: Where the features of all views go, as indices into `ids`.
        targets: Next tokens `[t]`; `IGNORE` where no loss is taken.
        mixing: How the tokens see each other.
        patch_shape: Shape class of each patch, `[n]`; `IGNORE` for a shape without a name.
        patch_colour: Colour class of each patch, `[n]`; `IGNORE` on ground and signs. The class of
            the nearest colour, negated, where the fill has no name; so are the other colours.
            `IGNORE` on stripes.
        cell_shape: Shape class whose centre lies in or next to each position, `[m]`; 0 for none,
            `IGNORE` for a shape without a name.
        cell_share: The position's share of that thing, `[m]`: a centre is shared by the four
            positions around it as in bilinear interpolation, so each thing counts as one in all.
        cell_colour: Its colour class, `[m]`; `IGNORE` for none.
        cell_place: Middle of each position, `[m, 2]`, as shares of the picture's width and height.
        named: Indices into `ids` of the words that name one thing, `[k]`.
        named_place: Centre of that thing, `[k, 2]`, as shares of the picture.
        named_shape: Its shape class, `[k]`.
        named_colour: Its colour class, `[k]`.
        asked: Indices into `ids` of the last token before the answer to a question about where
            one thing is from another, `[r]`.
        asked_way: From the centre of the first thing to that of the second, `[r, 2]`, as shares
            of the picture.
        asked_side: What such a question offers, as an index into `SIDES_ASKED`, `[r]`.
        counted: Indices into `ids` of the words that name what is counted, `[q]`.
        counted_number: How many things fit, `[q]`.
        counted_last: Indices into `ids` of the last token before the answer, `[q]`.
        shape_asked: Indices into `ids` of the last token before the answer to a question for the
            shape of what has a colour, `[s]`.
        shape_answer: Shape and colour class of the thing, `[s, 2]`.
        shape_words: First token of each shape as an answer, in the order of `ALL_SHAPES`.
        kinds: Kind of each branch.
        branches: First token and length of each branch.
        exchange: What the backbone reads in place of the things' shapes or colours, if anything.
    """

    patches: Tensor
    shapes: list[tuple[int, int]]
    ids: Tensor
    image_positions: Tensor
    targets: Tensor
    mixing: Branched
    patch_shape: Tensor
    patch_colour: Tensor
    cell_shape: Tensor
    cell_share: Tensor
    cell_colour: Tensor
    cell_place: Tensor
    named: Tensor
    named_place: Tensor
    named_shape: Tensor
    named_colour: Tensor
    asked: Tensor
    asked_way: Tensor
    asked_side: Tensor
    counted: Tensor
    counted_number: Tensor
    counted_last: Tensor
    shape_asked: Tensor
    shape_answer: Tensor
    shape_words: Tensor
    kinds: list[str] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)
    exchange: Exchange | None = None


def image_token_id(tokenizer: Tokenizer) -> int:
    """The id of `<image>`."""
    found = tokenizer.token_to_id(ImageTokens().image)
    assert found is not None, "nano-vl's tokenizer always holds it"
    return found


class SceneEncoder:
    """Turns samples into batches.

    Args:
        tokenizer: The model's tokenizer.
        config: How pictures are prepared.
        taps: Taps of the backbone's short convolutions.
    """

    def __init__(self, tokenizer: Tokenizer, config: ImageConfig, *, taps: int = 3) -> None:
        self.tokenizer, self.config, self.taps = tokenizer, config, taps
        self.tokens = ImageTokens()
        self.image_id = image_token_id(tokenizer)
        self._shape_words = torch.tensor([self._encode(name)[0] for name in ALL_SHAPES])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _named(self, scene: Scene, qa: QA) -> list[tuple[int, Thing]]:
        """Token of the question and thing, for each thing that the question names."""
        found = named_things(scene, qa)
        if not found:
            return []
        encoded = self.tokenizer.encode(qa.question, add_special_tokens=False)
        ends = [end for _, end in encoded.offsets]
        return [(bisect_right(ends, at), thing) for at, thing in found]

    def _counted(self, scene: Scene, qa: QA) -> tuple[int, int] | None:
        """Token of the question that names what is counted, and how many there are."""
        found = counted_things(scene, qa)
        if found is None:
            return None
        encoded = self.tokenizer.encode(qa.question, add_special_tokens=False)
        return bisect_right([end for _, end in encoded.offsets], found[0]), found[1]

    def batch(self, samples: Sequence[Sample], config: ImageConfig | None = None) -> SceneBatch:
        """Encode samples; `config` overrides the image settings for this batch."""
        config = config or self.config
        plans = [plan(*sample.image.size, config) for sample in samples]
        tokens: list[int] = []
        prefixes = []
        for layout in plans:
            head = "<|startoftext|><|im_start|>user\n" + placeholder_text(layout, self.tokens)
            prefixes.append(self._encode(head))
            tokens += prefixes[-1]
        branches = [
            _Branch(
                i,
                qa,
                self._encode(f"{qa.question}<|im_end|>\n<|im_start|>assistant\n"),
                self._encode(f"{qa.answer}<|im_end|>"),
            )
            for i, sample in enumerate(samples)
            for qa in sample.questions
        ]
        branches.sort(key=len)
        # an idle prefix fills up the rows: kernels are chosen anew for every number of them
        idle = -(len(tokens) + sum(map(len, branches))) % _ROUND
        tokens += [0] * idle
        mixing = Branched(
            [*(len(prefix) for prefix in prefixes), *([idle] if idle else [])],
            [(branch.row, len(branch)) for branch in branches],
            taps=self.taps,
        )
        targets = [IGNORE] * len(tokens)
        named: list[tuple[int, Thing, Scene]] = []
        asked: list[tuple[int, tuple[float, float], int]] = []
        shapes_asked: list[tuple[int, int, int]] = []
        counted: list[tuple[int, int, int]] = []
        for branch, at in zip(branches, mixing.branch_starts, strict=True):
            tokens += branch.question + branch.answer
            targets += [IGNORE] * (len(branch.question) - 1) + branch.answer + [IGNORE]
            scene = samples[branch.row].scene
            found = self._named(scene, branch.qa)
            named += [(at + token, thing, scene) for token, thing in found]
            last = at + len(branch.question) - 1
            if number := self._counted(scene, branch.qa):
                counted.append((at + number[0], number[1], last))
            if branch.qa.kind in ("relation", "where") and len(found) == 2:
                (_, a), (_, b) = found
                way = ((b.cx - a.cx) / scene.width, (b.cy - a.cy) / scene.height)
                asked.append((last, way, SIDES_ASKED.index(branch.qa.args["side"])))
            elif branch.qa.kind == "shape" and found:
                thing = found[0][1]
                shapes_asked.append((last, _SHAPE_ID[thing.shape], _COLOUR_ID[thing.colour]))
        ids = torch.tensor(tokens)
        answers = torch.tensor(shapes_asked, dtype=torch.long).view(-1, 3)
        numbers = torch.tensor(counted, dtype=torch.long).view(-1, 3)
        patches, shapes, labels = [], [], []
        for sample, layout in zip(samples, plans, strict=True):
            pixels = views(sample.image, layout, config)
            patches += [patchify(view, config) for view in pixels]
            shapes += [(view.patch_rows, view.patch_cols) for view in layout.views]
            labels += _labels(sample.scene, layout, config)
        columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*labels, strict=True)]
        return SceneBatch(
            patches=torch.cat(patches),
            shapes=shapes,
            ids=ids,
            image_positions=ids.eq(self.image_id).nonzero()[:, 0],
            targets=torch.tensor(targets),
            mixing=mixing,
            patch_shape=columns[0],
            patch_colour=columns[1],
            cell_shape=columns[2],
            cell_share=columns[3],
            cell_colour=columns[4],
            cell_place=columns[5],
            named=torch.tensor([at for at, _, _ in named], dtype=torch.long),
            named_place=torch.tensor(
                [(thing.cx / scene.width, thing.cy / scene.height) for _, thing, scene in named],
                dtype=torch.float32,
            ).view(-1, 2),
            named_shape=torch.tensor([_SHAPE_ID[t.shape] for _, t, _ in named], dtype=torch.long),
            named_colour=torch.tensor(
                [_colour_id(scene, t) for _, t, scene in named], dtype=torch.long
            ),
            asked=torch.tensor([at for at, _, _ in asked], dtype=torch.long),
            asked_way=torch.tensor([way for _, way, _ in asked], dtype=torch.float32).view(-1, 2),
            asked_side=torch.tensor([side for _, _, side in asked], dtype=torch.long),
            counted=numbers[:, 0],
            counted_number=numbers[:, 1],
            counted_last=numbers[:, 2],
            shape_asked=answers[:, 0],
            shape_answer=answers[:, 1:],
            shape_words=self._shape_words,
            kinds=[branch.qa.kind for branch in branches],
            branches=[
                (at, len(branch)) for branch, at in zip(branches, mixing.branch_starts, strict=True)
            ],
        )


@dataclass(frozen=True, slots=True)
class _Branch:
    """A question with its answer, as tokens, and the number of the picture it is about."""

    row: int
    qa: QA
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.question) + len(self.answer)


def _colour_id(scene: Scene, thing: Thing) -> int:
    """Colour class; negated in a scene whose colours have no names; none of stripes."""
    if thing.second is not None:
        return IGNORE
    return _COLOUR_ID[thing.colour] if scene.colours else -_COLOUR_ID[thing.colour]


def _labels(scene: Scene, layout: Plan, config: ImageConfig) -> list[list[NDArray[Any]]]:
    """Per view: patch shapes and colours, cell shapes, shares, colours and places."""
    whole = Image.fromarray(label_map(scene))
    out: list[list[NDArray[Any]]] = []
    for view in layout.views:
        size = (view.width, view.height) if view.kind == "thumbnail" else layout.canvas
        left, top, right, bottom = view.box
        # PIL crops in source pixels and resizes in one go; nearest keeps labels whole
        scale_x, scale_y = scene.width / size[0], scene.height / size[1]
        box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        crop = whole.resize((view.width, view.height), Image.Resampling.NEAREST, box=box)
        patch_shape, patch_colour = _patch_labels(np.asarray(crop), scene, config.patch_size)
        side = config.token_side
        rows, cols = view.height // side, view.width // side
        cell_shape = np.zeros((rows, cols), np.int64)
        cell_share = np.zeros((rows, cols), np.float32)
        cell_colour = np.full((rows, cols), IGNORE, np.int64)
        for thing in scene.things:
            x, y = thing.cx / scale_x - left, thing.cy / scale_y - top
            if 0 <= x < view.width and 0 <= y < view.height:
                for row, col, share in _shares(x / side - 0.5, y / side - 0.5, rows, cols):
                    if share > cell_share[row, col]:
                        cell_share[row, col] = share
                        cell_shape[row, col] = _SHAPE_ID[thing.shape]
                        cell_colour[row, col] = _colour_id(scene, thing)
        across = (left + (np.arange(cols) + 0.5) * side) / size[0]
        down = (top + (np.arange(rows) + 0.5) * side) / size[1]
        place = np.empty((rows, cols, 2), np.float32)
        place[..., 0], place[..., 1] = across, down[:, None]
        cells: list[NDArray[Any]] = [cell_shape.ravel(), cell_share.ravel(), cell_colour.ravel()]
        out.append([patch_shape, patch_colour, *cells, place.reshape(-1, 2)])
    return out


def _shares(x: float, y: float, rows: int, cols: int) -> list[tuple[int, int, float]]:
    """Row, column and share of the positions around a point; beyond the edge it is the edge's."""
    x, y = min(max(x, 0.0), cols - 1.0), min(max(y, 0.0), rows - 1.0)
    col, row = min(int(x), max(cols - 2, 0)), min(int(y), max(rows - 2, 0))
    across, down = x - col, y - row
    shares = [
        (row, col, (1 - down) * (1 - across)),
        (row, col + 1, (1 - down) * across),
        (row + 1, col, down * (1 - across)),
        (row + 1, col + 1, down * across),
    ]
    return [(r, c, share) for r, c, share in shares if share > 0]


def _patch_labels(
    crop: NDArray[np.uint8], scene: Scene, side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The thing that covers most of each patch, as shape and colour classes, raster order."""
    rows, cols = crop.shape[0] // side, crop.shape[1] // side
    cells = crop.reshape(rows, side, cols, side).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
    marks = [*range(1, len(scene.things) + 1), SIGN_LABEL]
    cover = np.stack([(cells == mark).mean(-1) for mark in marks])
    best = cover.argmax(0)
    shown = cover.max(0) >= _LEAST_COVER
    shape_of = np.array([*(_SHAPE_ID[thing.shape] for thing in scene.things), SIGN])
    colour_of = np.array([*(_colour_id(scene, thing) for thing in scene.things), IGNORE])
    return np.where(shown, shape_of[best], GROUND), np.where(shown, colour_of[best], IGNORE)
