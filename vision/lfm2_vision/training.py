"""Training data and loss of the vision frontend: drawn scenes as rows, and the model's loss.

A batch is a pure function of (recipe, step). Each picture is one prefix with its questions as
branches, so every question is learnt as if asked alone. Besides the next token, small auxiliary
heads learn what each patch and each position shows; their labels come free from the scenes, and
they are dropped when the model is exported. Knows no optimizer and no schedule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from lfm2_mm.train.objectives import IGNORE, next_token_loss
from lfm2_mm.train.packing import Branched
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.model import VisionLanguageModel
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
from lfm2_vision.unseen import barred_tokens, unseen_pairs

__all__ = [
    "Auxiliary",
    "SceneBatch",
    "SceneEncoder",
    "answered",
    "image_token_id",
    "scene_loss",
]

_GROUND, _SIGN = 0, len(ALL_SHAPES) + 1
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
        barred: Flat indices into `ids` and tokens that take no part in the loss there, `[j, 2]`.
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
    barred: Tensor
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
        barred: list[tuple[int, int]] = []
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
                first = i * time + end - len(answer) - 1
                barred += [(first + k, token) for k, token in barred_tokens(self.tokenizer, qa)]
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
            barred=torch.tensor(barred, dtype=torch.long).view(-1, 2),
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
    shape_of = np.array([*(_SHAPE_ID[thing.shape] for thing in scene.things), _SIGN])
    colour_of = np.array([*(_COLOUR_ID[thing.colour] for thing in scene.things), IGNORE])
    return np.where(shown, shape_of[best], _GROUND), np.where(shown, colour_of[best], IGNORE)


class Auxiliary(nn.Module):
    """Linear heads over patches (from the tower), positions (from the connector) and words.

    The heads over words read the backbone's rows one block after its first attention, where a
    word that names a thing can first have found it.
    """

    def __init__(self, tower_size: int, connector_size: int) -> None:
        super().__init__()
        shapes, colours = len(ALL_SHAPES) + 2, len(ALL_COLOURS) + 1
        self.patch_shape = nn.Linear(tower_size, shapes)
        self.patch_colour = nn.Linear(tower_size, colours)
        self.cell_shape = nn.Linear(connector_size, shapes)
        self.cell_colour = nn.Linear(connector_size, colours)
        self.cell_place = nn.Linear(connector_size, 2)
        self.named_shape = nn.Linear(connector_size, shapes)
        self.named_colour = nn.Linear(connector_size, colours)
        self.named_place = nn.Linear(connector_size, 2)

    def seen(
        self, rows: Float[Tensor, "n c"], cells: Float[Tensor, "m d"], batch: SceneBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """What patches and positions show: weighted cross-entropies, and the shares right."""
        patch = _open(self.patch_shape(rows), batch.patch_colour)
        cell = _open(self.cell_shape(cells), batch.cell_colour)
        things = (batch.patch_shape != _GROUND) & (batch.patch_shape != _SIGN)
        centres = batch.cell_shape != _GROUND
        terms = [
            F.cross_entropy(patch, batch.patch_shape),
            _colour_loss(self.patch_colour(rows), batch.patch_colour, batch.patch_shape),
            4 * F.cross_entropy(cell, batch.cell_shape),
            _colour_loss(self.cell_colour(cells), batch.cell_colour, batch.cell_shape),
            # most patches are ground; shape, the slowest to be learnt, also counts by itself
            2 * F.cross_entropy(patch[things], batch.patch_shape[things]),
            2 * F.cross_entropy(cell[centres], batch.cell_shape[centres]),
            2 * F.l1_loss(self.cell_place(cells).float(), batch.cell_place),
        ]
        right = (patch.argmax(-1) == batch.patch_shape)[things].float().mean()
        found = (cell.argmax(-1) == batch.cell_shape)[centres].float().mean()
        return torch.stack(terms).sum(), {"patch_right": float(right), "cell_right": float(found)}

    def named(
        self, words: Float[Tensor, "k d"], batch: SceneBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """What the words name: shape, colour and place, and the mean distance missed by."""
        place = self.named_place(words).float()
        shape = _open(self.named_shape(words), batch.named_colour)
        colour = self.named_colour(words)
        terms = [
            0.5 * F.cross_entropy(shape, batch.named_shape),
            0.5 * _colour_loss(colour, batch.named_colour, batch.named_shape),
            8 * F.l1_loss(place, batch.named_place),
        ]
        missed = (place.detach() - batch.named_place).abs().mean()
        return torch.stack(terms).sum(), {"missed": float(missed)}


_SHUT = -1e4  # a logit no softmax notices


def _open(shape: Float[Tensor, "n s"], colour: Tensor) -> Float[Tensor, "n s"]:
    """Logits of shapes in fp32, those never seen in the given colour classes shut out."""
    unseen = unseen_pairs().to(shape.device)
    return shape.float().masked_fill(unseen[colour.clamp(min=0)], _SHUT)


def _colour_loss(logits: Float[Tensor, "n c"], colour: Tensor, shape: Tensor) -> Tensor:
    """Cross-entropy of colours, those never seen in the given shape classes shut out."""
    unseen = unseen_pairs().to(logits.device)
    return F.cross_entropy(logits.float().masked_fill(unseen.T[shape], _SHUT), colour)


def scene_hidden(
    model: VisionLanguageModel, batch: SceneBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a batch: final hidden states, those of the named words, tower's, connector's."""
    rows = model.vision_tower(batch.patches, batch.shapes)
    cells = model.multi_modal_projector(rows, batch.shapes)
    backbone = model.language_model
    x = backbone.embed(batch.ids)
    flat = x.flatten(0, 1).index_copy(0, batch.image_positions, cells.to(x.dtype))
    kept: list[Tensor] = []
    tap = next(i for i, block in enumerate(backbone.layers) if block.is_attention) + 1
    hook = backbone.layers[tap].register_forward_hook(lambda _, __, out: kept.append(out))
    try:
        hidden = backbone(flat.view_as(x), batch.mixing)
    finally:
        hook.remove()
    return hidden, kept[0].flatten(0, 1)[batch.named], rows, cells


def scene_loss(
    model: VisionLanguageModel,
    auxiliary: Auxiliary,
    batch: SceneBatch,
    *,
    weight: float,
    text: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss plus the weighted auxiliary losses; without `text` those on pictures."""
    if not text:
        rows = model.vision_tower(batch.patches, batch.shapes)
        cells = model.multi_modal_projector(rows, batch.shapes)
        extra, parts = auxiliary.seen(rows, cells, batch)
        return weight * extra, {"aux": float(extra.detach()), **parts}
    hidden, words, rows, cells = scene_hidden(model, batch)
    spoken = next_token_loss(hidden, model.head_weight, batch.targets, barred=batch.barred)
    extra, parts = auxiliary.seen(rows, cells, batch)
    pointed, more = auxiliary.named(words, batch)
    return spoken + weight * (extra + pointed), {
        "text": float(spoken.detach()),
        "aux": float(extra.detach()),
        **parts,
        **more,
    }


@torch.no_grad()
def answered(model: VisionLanguageModel, batch: SceneBatch) -> list[tuple[str, bool]]:
    """Per branch its kind and whether greedy decoding would give exactly the right answer.

    Greedy decoding reproduces an answer if and only if, fed the answer so far, the model prefers
    the right token at every step; so one forward pass decides for all branches.
    """
    hidden = scene_hidden(model, batch)[0]
    out = []
    for i, (kinds, spans) in enumerate(zip(batch.kinds, batch.branches, strict=True)):
        for kind, (start, length) in zip(kinds, spans, strict=True):
            targets = batch.targets[i, start : start + length]
            asked = targets != IGNORE
            scores = F.linear(hidden[i, start : start + length][asked], model.head_weight)
            out.append((kind, bool((scores.argmax(-1) == targets[asked]).all())))
    return out
