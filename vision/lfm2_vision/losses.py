"""Losses on drawn scenes: the next token, and auxiliary heads that say what is seen and named.

Small auxiliary heads learn what each patch, each position and each naming word shows; their labels
come free from the scenes, and they are dropped when the model is exported. Knows no optimizer and
no schedule; the rows come from `training`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.train.objectives import IGNORE, next_token_loss
from lfm2_vision.model import VisionLanguageModel
from lfm2_vision.scenes import ALL_COLOURS, ALL_SHAPES
from lfm2_vision.training import GROUND, SIGN, SceneBatch
from lfm2_vision.unseen import level_loss, unseen_pairs

__all__ = ["Auxiliary", "answered", "scene_loss"]


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
        raw_patch, raw_cell = self.patch_shape(rows), self.cell_shape(cells)
        patch, cell = _open(raw_patch, batch.patch_colour), _open(raw_cell, batch.cell_colour)
        things = (batch.patch_shape != GROUND) & (batch.patch_shape != SIGN)
        centres = batch.cell_shape != GROUND
        terms = [
            F.cross_entropy(patch, batch.patch_shape),
            _colour_loss(self.patch_colour(rows), batch.patch_colour, batch.patch_shape),
            4 * F.cross_entropy(cell, batch.cell_shape),
            _colour_loss(self.cell_colour(cells), batch.cell_colour, batch.cell_shape),
            # most patches are ground; shape, the slowest to be learnt, also counts by itself
            2 * F.cross_entropy(patch[things], batch.patch_shape[things]),
            2 * F.cross_entropy(cell[centres], batch.cell_shape[centres]),
            0.2 * _level(raw_patch[things], batch.patch_shape[things], batch.patch_colour[things]),
            0.2 * _level(raw_cell[centres], batch.cell_shape[centres], batch.cell_colour[centres]),
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


def _level(logits: Tensor, shape: Tensor, colour: Tensor) -> Tensor:
    """`level_loss` of shape classes, ground and sign aside."""
    unseen = unseen_pairs().to(logits.device)[colour.clamp(min=0)]
    return level_loss(logits[:, 1:-1], unseen[:, 1:-1], shape - 1)


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
    spoken = next_token_loss(hidden, model.head_weight, batch.targets)
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
