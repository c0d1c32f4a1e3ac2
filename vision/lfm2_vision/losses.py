"""Losses on drawn scenes: the next token, and auxiliary heads that say what is seen and named.

Small auxiliary heads learn what each patch, each position and each naming word shows; their labels
come free from the scenes, and they are dropped when the model is exported. Knows no optimizer and
no schedule; the rows come from `training`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.train.objectives import IGNORE, next_token_loss
from lfm2_vision.factors import Factors
from lfm2_vision.model import VisionLanguageModel
from lfm2_vision.quick import Quick
from lfm2_vision.scenes import ALL_COLOURS, ALL_SHAPES
from lfm2_vision.training import GROUND, SIDES_ASKED, SIGN, SceneBatch
from lfm2_vision.unseen import level_loss, lift_loss, unseen_pairs

__all__ = ["Auxiliary", "answered", "counting_loss", "lift_words", "scene_loss"]


class Auxiliary(nn.Module):
    """Linear heads over patches (from the tower), positions (from the connector) and words.

    The heads over words read the backbone's rows one block after its first attention, where a
    word that names a thing can first have found it. The way between two things is read after the
    second attention, at the token that the answer follows: there both places can have met.
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
        self.asked_way = nn.Linear(connector_size, 2)
        self.asked_side = nn.Linear(connector_size, len(SIDES_ASKED))
        self.counted = nn.Linear(connector_size, 6)
        self.counted_last = nn.Linear(connector_size, 6)
        self.factors = Factors(connector_size, len(ALL_SHAPES), len(ALL_COLOURS))

    def seen(
        self, rows: Float[Tensor, "n c"], cells: Float[Tensor, "m d"], batch: SceneBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """What patches and positions show: weighted cross-entropies, and the shares right."""
        raw_patch, raw_cell = self.patch_shape(rows), self.cell_shape(cells)
        patch, cell = _open(raw_patch, batch.patch_colour), _open(raw_cell, batch.cell_colour)
        ground = batch.patch_shape == GROUND
        things = (batch.patch_shape > GROUND) & (batch.patch_shape != SIGN)
        shared = batch.cell_shape > GROUND
        share, shown = batch.cell_share[shared], batch.cell_shape[shared]
        terms = [
            F.binary_cross_entropy_with_logits(patch[:, GROUND], ground.float()),
            _shape_loss(patch[~ground], batch.patch_shape[~ground]),
            _colour_loss(self.patch_colour(rows), batch.patch_colour, batch.patch_shape),
            12 * counting_loss(cell, batch),
            _colour_loss(self.cell_colour(cells), batch.cell_colour, batch.cell_shape),
            # most patches are ground; shape, the slowest to be learnt, also counts by itself
            2 * _shape_loss(patch[things], batch.patch_shape[things]),
            2 * _weighed(F.cross_entropy(cell[shared][:, 1:], shown - 1, reduction="none"), share),
            0.2 * _level(raw_patch[things], batch.patch_shape[things], batch.patch_colour[things]),
            0.2 * _level(raw_cell[shared], shown, batch.cell_colour[shared]),
            2 * F.l1_loss(self.cell_place(cells).float(), batch.cell_place),
            0.1 * _loud(cells),
        ]
        self.factors.watch(cells, batch.cell_share, batch.cell_shape, batch.cell_colour)
        told = patch[things][:, 1:].argmax(-1) + 1 == batch.patch_shape[things]
        found = cell[shared][:, 1:].argmax(-1) + 1 == shown
        total = torch.stack(terms).sum()
        if not len(told):
            return total, {}
        return total, {
            "patch_right": float(told.float().mean()),
            "cell_right": float(_weighed(found.float(), share)),
        }

    def named(
        self, words: Float[Tensor, "k d"], asked: Float[Tensor, "r d"], batch: SceneBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """What the words name: shape, colour and place; and the way between the two asked about.

        Both may be none at all, which adds nothing.
        """
        if not len(words):
            return words.sum(), {}
        place = self.named_place(words).float()
        shape = _open(self.named_shape(words), batch.named_colour)
        colour = self.named_colour(words)
        terms = [
            0.5 * _shape_loss(shape, batch.named_shape),
            0.5 * _colour_loss(colour, batch.named_colour, batch.named_shape),
            8 * F.l1_loss(place, batch.named_place),
        ]
        missed = {"missed": float((place.detach() - batch.named_place).abs().mean())}
        if len(asked):
            way = F.l1_loss(self.asked_way(asked).float(), batch.asked_way)
            side = F.cross_entropy(self.asked_side(asked).float(), batch.asked_side)
            terms += [8 * way, 0.5 * side]
            missed |= {"way_missed": float(way.detach()), "side": float(side.detach())}
        return torch.stack(terms).sum(), missed

    def numbers(
        self, nouns: Float[Tensor, "q d"], last: Float[Tensor, "q d"], batch: SceneBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """How many things there are of what is counted, at its noun and before the answer."""
        if not len(nouns):
            return nouns.sum(), {}
        at_noun = F.cross_entropy(self.counted(nouns).float(), batch.counted_number)
        at_last = F.cross_entropy(self.counted_last(last).float(), batch.counted_number)
        return at_noun + at_last, {
            "noun": float(at_noun.detach()),
            "number": float(at_last.detach()),
        }


_SHUT = -1e4  # a logit no softmax notices


def _weighed(values: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The weighted mean; 0 of nothing."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def counting_loss(shape: Float[Tensor, "m s"], batch: SceneBatch) -> Float[Tensor, ""]:
    """Each position's share of a thing, whatever it is, and by that share which one it is.

    Told one position per thing, positions beside a centre say "mostly one" too, and who adds them
    up counts wrong; shares add up to one. Ground is no shape among shapes: where it is, a thing of
    a pair that was never seen, of whose name nobody is sure, is taken for ground.

    Args:
        shape: Logits of shape classes; the first is that of "mostly ground", by itself.
        batch: The labels.
    """
    share, named = batch.cell_share, batch.cell_shape > GROUND
    ground = F.binary_cross_entropy_with_logits(shape[:, GROUND], 1 - share, reduction="none")
    logs = F.log_softmax(shape[:, 1:], -1)
    of_thing = logs.gather(1, (batch.cell_shape - 1).clamp(min=0)[:, None])[:, 0]
    return (ground - share * named * of_thing).mean()


def _loud(rows: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """How far the rows' root mean squares lie above 2: nothing else keeps them small.

    Not squared: Adam's steps overshoot where rows are large, and a square would drive them on.
    """
    return F.relu(rows.float().square().mean(-1).sqrt() - 2).mean()


def _shape_loss(logits: Float[Tensor, "n s"], shape: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy among shapes, ground aside; things without a name count nothing."""
    wanted = torch.where(shape > GROUND, shape - 1, IGNORE)
    total = F.cross_entropy(logits[:, 1:].float(), wanted, reduction="sum")
    return total / (wanted != IGNORE).sum().clamp(min=1)


def _open(shape: Float[Tensor, "n s"], colour: Tensor) -> Float[Tensor, "n s"]:
    """Logits of shapes in fp32, those never seen in the given colour classes shut out."""
    return shape.float().masked_fill(_unseen(colour), _SHUT)


def _level(logits: Tensor, shape: Tensor, colour: Tensor) -> Tensor:
    """`level_loss` of shape classes, ground and sign aside."""
    unseen = _unseen(colour)
    return level_loss(logits[:, 1:-1], unseen[:, 1:-1], shape - 1)


def lift_words(
    last: Float[Tensor, "n d"], head: Float[Tensor, "v d"], batch: SceneBatch
) -> Float[Tensor, ""]:
    """`lift_loss` of the words that answer for a shape, weighted.

    The next-token loss keeps withheld names from rising, this one from sinking: without it, who
    never answered "star" to "blue" takes the question for the answer, whatever the tower sees.
    Colours do not need it.
    """
    if not len(batch.shape_asked):
        return last.new_zeros((), dtype=torch.float32)
    shape, colour = batch.shape_answer.unbind(1)
    scores = F.linear(last[batch.shape_asked], head[batch.shape_words])
    unseen = unseen_pairs().to(last.device)[colour][:, 1:-1]
    return 0.2 * lift_loss(scores, unseen, shape - 1)


def _colour_loss(logits: Float[Tensor, "n c"], colour: Tensor, shape: Tensor) -> Tensor:
    """Cross-entropy of colours, those never seen in the given shape classes shut out."""
    unseen = unseen_pairs().to(logits.device)
    named = colour.where(colour >= 0, IGNORE)
    total = F.cross_entropy(
        logits.float().masked_fill(unseen.T[shape.clamp(min=GROUND)], _SHUT), named, reduction="sum"
    )
    return total / (named != IGNORE).sum().clamp(min=1)


def _unseen(colour: Tensor) -> Tensor:
    """Which shapes are withheld in each colour class; classes of unnamed fills are negated."""
    return unseen_pairs().to(colour.device)[colour.abs().where(colour != IGNORE, 0)]


class Hidden(NamedTuple):
    """Rows of a batch.

    Attributes:
        last: Final hidden states of all tokens.
        words: States of the words that name a thing, a block after the first attention.
        asked: States of the last token of questions about places, after the second attention.
        nouns: States of the words that name what is counted, as `words`.
        counted: States of the last token of such questions, as `asked`.
        rows: What the tower makes of the patches.
        cells: What the connector makes of those.
    """

    last: Tensor
    words: Tensor
    asked: Tensor
    nouns: Tensor
    counted: Tensor
    rows: Tensor
    cells: Tensor


def scene_hidden(
    model: VisionLanguageModel,
    batch: SceneBatch,
    quick: Quick | None = None,
    factors: Factors | None = None,
) -> Hidden:
    """One pass through all parts; `quick` is how, by default as written.

    With `factors` the backbone reads the rows as the batch's exchange leaves them.
    """
    quick = quick or Quick(model.vision_tower, model.language_model, compiled=False)
    rows = quick.see(batch.patches, batch.shapes)
    cells = model.multi_modal_projector(rows, batch.shapes)
    backbone = model.language_model
    x = backbone.embed(batch.ids)
    if torch.is_autocast_enabled(x.device.type):  # the rows between blocks, too, in bf16
        x = x.to(torch.get_autocast_dtype(x.device.type))
    read = cells
    if factors is not None and batch.exchange is not None:
        # detached: a connector that learnt from these would grow its rows out of reach
        read = factors.exchanged(
            cells.detach(), batch.cell_share, batch.cell_shape, batch.cell_colour, batch.exchange
        )
    x = x.index_copy(0, batch.image_positions, read.to(x.dtype))
    attentions = [i for i, block in enumerate(backbone.layers) if block.is_attention]
    words, asked = attentions[0] + 1, attentions[:2][-1]
    states = quick.read(x, batch.mixing)
    after_first, after_second = states[words], states[asked]
    return Hidden(
        last=states[-1],
        words=after_first[batch.named],
        asked=after_second[batch.asked],
        nouns=after_first[batch.counted],
        counted=after_second[batch.counted_last],
        rows=rows,
        cells=cells,
    )


def scene_loss(
    model: VisionLanguageModel,
    auxiliary: Auxiliary,
    batch: SceneBatch,
    *,
    weight: float,
    text: bool = True,
    quick: Quick | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss plus the weighted auxiliary losses; without `text` those on pictures."""
    if not text:
        quick = quick or Quick(model.vision_tower, model.language_model, compiled=False)
        rows = quick.see(batch.patches, batch.shapes)
        cells = model.multi_modal_projector(rows, batch.shapes)
        extra, parts = auxiliary.seen(rows, cells, batch)
        return weight * extra, {"aux": float(extra.detach()), **parts}
    hidden = scene_hidden(model, batch, quick, auxiliary.factors)
    spoken = next_token_loss(hidden.last, model.head_weight, batch.targets)
    extra, parts = auxiliary.seen(hidden.rows, hidden.cells, batch)
    pointed, more = auxiliary.named(hidden.words, hidden.asked, batch)
    number, counts = auxiliary.numbers(hidden.nouns, hidden.counted, batch)
    lift = lift_words(hidden.last, model.head_weight, batch)
    return spoken + lift + weight * (extra + pointed + number), {
        "text": float(spoken.detach()),
        "lift": float(lift.detach()),
        "aux": float(extra.detach()),
        **parts,
        **more,
        **counts,
    }


@torch.no_grad()
def answered(model: VisionLanguageModel, batch: SceneBatch) -> list[tuple[str, bool]]:
    """Per branch its kind and whether greedy decoding would give exactly the right answer.

    Greedy decoding reproduces an answer if and only if, fed the answer so far, the model prefers
    the right token at every step; so one forward pass decides for all branches.
    """
    hidden = scene_hidden(model, batch).last
    out = []
    for kind, (start, length) in zip(batch.kinds, batch.branches, strict=True):
        targets = batch.targets[start : start + length]
        wanted = targets != IGNORE
        scores = F.linear(hidden[start : start + length][wanted], model.head_weight)
        out.append((kind, bool((scores.argmax(-1) == targets[wanted]).all())))
    return out
