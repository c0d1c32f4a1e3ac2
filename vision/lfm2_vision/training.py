"""Training data of the vision frontend: drawn scenes as rows, with labels of what they show.

Each picture is one prefix with its questions as branches, so every question is learnt as if asked
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
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.patches import patchify, views
from lfm2_vision.pointing import named_things
from lfm2_vision.prompt_text import ImageTokens, placeholder_text
from lfm2_vision.scenes import (
    ALL_COLOURS,
    ALL_SHAPES,
    QA,
    SIGN_LABEL,
    Sample,
    Scene,
    Thing,
    label_map,
)
from lfm2_vision.tiling import Plan, plan

__all__ = ["GROUND", "SIGN", "SceneBatch", "SceneEncoder", "image_token_id"]

GROUND, SIGN = 0, len(ALL_SHAPES) + 1
_SHAPE_ID = {name: i + 1 for i, name in enumerate(ALL_SHAPES)}
_COLOUR_ID = {name: i + 1 for i, name in enumerate(ALL_COLOURS)}
_LEAST_COVER = 0.2  # a patch shows a thing when the thing covers this share of it


@dataclass
class SceneBatch:
    """Pictures with their questions, ready for the model.

    Attributes:
        patches: Packed patches of all views, float32 `[n, p]`.
        shapes: Patch rows and columns of each view.
        ids: Token rows `[b, t]`, prefix then branches, padded with 0.
        image_positions: Where the features of all views go, as flat indices into `ids`.
        targets: Next tokens `[b, t]`; `IGNORE` where no loss is taken.
        mixing: How the positions of a row see each other.
        patch_shape: Shape class of each patch, `[n]`.
        patch_colour: Colour class of each patch, `[n]`; `IGNORE` on ground and signs.
        cell_shape: Shape class whose centre lies in each position, `[m]`; 0 for none.
        cell_colour: Its colour class, `[m]`; `IGNORE` for none.
        cell_place: Middle of each position, `[m, 2]`, as shares of the picture's width and height.
        named: Flat indices into `ids` of the words that name one thing, `[k]`.
        named_place: Centre of that thing, `[k, 2]`, as shares of the picture.
        named_shape: Its shape class, `[k]`.
        named_colour: Its colour class, `[k]`.
        kinds: Kind of each branch, row by row.
        branches: First position and length of each branch, row by row.
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
    cell_colour: Tensor
    cell_place: Tensor
    named: Tensor
    named_place: Tensor
    named_shape: Tensor
    named_colour: Tensor
    kinds: list[list[str]] = field(default_factory=list)
    branches: list[list[tuple[int, int]]] = field(default_factory=list)


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

    def batch(self, samples: Sequence[Sample], config: ImageConfig | None = None) -> SceneBatch:
        """Encode samples; `config` overrides the image settings for this batch."""
        config = config or self.config
        plans = [plan(*sample.image.size, config) for sample in samples]
        rows, heads = [], []
        for sample, layout in zip(samples, plans, strict=True):
            prefix = self._encode(
                "<|startoftext|><|im_start|>user\n" + placeholder_text(layout, self.tokens)
            )
            branches = [
                (
                    self._encode(f"{qa.question}<|im_end|>\n<|im_start|>assistant\n"),
                    self._encode(f"{qa.answer}<|im_end|>"),
                )
                for qa in sample.questions
            ]
            rows.append((prefix, branches))
            heads.append((len(prefix), [len(q) + len(a) for q, a in branches]))
        time = max(prefix + sum(lengths) for prefix, lengths in heads)
        ids = torch.zeros(len(rows), time, dtype=torch.long)
        targets = torch.full_like(ids, IGNORE)
        spans: list[list[tuple[int, int]]] = []
        named: list[tuple[int, Thing, Scene]] = []
        for i, (prefix, branches) in enumerate(rows):
            ids[i, : len(prefix)] = torch.tensor(prefix)
            at = len(prefix)
            spans.append([])
            for (question, answer), qa in zip(branches, samples[i].questions, strict=True):
                named += [
                    (i * time + at + token, thing, samples[i].scene)
                    for token, thing in self._named(samples[i].scene, qa)
                ]
                end = at + len(question) + len(answer)
                ids[i, at:end] = torch.tensor(question + answer)
                targets[i, end - len(answer) - 1 : end - 1] = torch.tensor(answer)
                spans[-1].append((at, end - at))
                at = end
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
            image_positions=ids.eq(self.image_id).flatten().nonzero()[:, 0],
            targets=targets,
            mixing=Branched(heads, time, taps=self.taps),
            patch_shape=columns[0],
            patch_colour=columns[1],
            cell_shape=columns[2],
            cell_colour=columns[3],
            cell_place=columns[4],
            named=torch.tensor([at for at, _, _ in named], dtype=torch.long),
            named_place=torch.tensor(
                [(thing.cx / scene.width, thing.cy / scene.height) for _, thing, scene in named],
                dtype=torch.float32,
            ).view(-1, 2),
            named_shape=torch.tensor([_SHAPE_ID[t.shape] for _, t, _ in named], dtype=torch.long),
            named_colour=torch.tensor(
                [_COLOUR_ID[t.colour] for _, t, _ in named], dtype=torch.long
            ),
            kinds=[[qa.kind for qa in sample.questions] for sample in samples],
            branches=spans,
        )


def _labels(scene: Scene, layout: Plan, config: ImageConfig) -> list[list[NDArray[Any]]]:
    """Per view: patch shapes, patch colours, cell shapes, cell colours, cell places."""
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
        cell_colour = np.full((rows, cols), IGNORE, np.int64)
        for thing in scene.things:
            x, y = thing.cx / scale_x - left, thing.cy / scale_y - top
            if 0 <= x < view.width and 0 <= y < view.height:
                cell_shape[int(y // side), int(x // side)] = _SHAPE_ID[thing.shape]
                cell_colour[int(y // side), int(x // side)] = _COLOUR_ID[thing.colour]
        across = (left + (np.arange(cols) + 0.5) * side) / size[0]
        down = (top + (np.arange(rows) + 0.5) * side) / size[1]
        place = np.empty((rows, cols, 2), np.float32)
        place[..., 0], place[..., 1] = across, down[:, None]
        labels: list[NDArray[Any]] = [patch_shape, patch_colour, cell_shape.ravel()]
        out.append([*labels, cell_colour.ravel(), place.reshape(-1, 2)])
    return out


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
    colour_of = np.array([*(_COLOUR_ID[thing.colour] for thing in scene.things), IGNORE])
    return np.where(shown, shape_of[best], GROUND), np.where(shown, colour_of[best], IGNORE)
