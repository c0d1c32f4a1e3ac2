"""What nano-audio learns to recognise speech from: rows, CTC and text, each with a loss.

The rows that the backbone reads are scored against its own word embeddings, so that a row comes to
look like the word that is spoken in it; that head ends with training. Knows neither the data's
making nor a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_audio.training import BLANK, SpeechBatch
from lfm2_mm.backbone import Backbone
from lfm2_mm.train.attention import PlainWhole
from lfm2_mm.train.objectives import IGNORE, next_token_loss

__all__ = ["WordHead", "collapsed", "ctc_loss", "row_loss", "text_loss", "text_rows"]


class WordHead(nn.Module):
    """Scores rows against the embeddings of the lexicon's words, and against none of them.

    Args:
        size: Width of rows and embeddings.
        tokens: Token id of each word of the lexicon, in order.
    """

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(1, size))
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.bias = nn.Parameter(torch.zeros(len(tokens) + 1))
        self._tokens = torch.tensor(tokens)

    def forward(
        self, rows: Float[Tensor, "b t d"], embeddings: Float[Tensor, "v d"]
    ) -> Float[Tensor, "b t c"]:
        """Logits of each class, in fp32."""
        table = torch.cat([self.blank, embeddings[self._tokens.to(embeddings.device)]])
        return (F.linear(rows, table) * self.scale).float() + self.bias


def row_loss(
    logits: Float[Tensor, "b t c"], targets: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, ""], float]:
    """Mean cross-entropy of rows whose word is known, and the share of spoken ones named rightly.

    Without any such row the loss is 0.
    """
    chosen = targets != IGNORE
    found, wanted = logits[chosen], targets[chosen]
    loss = F.cross_entropy(found, wanted, reduction="sum") / chosen.sum().clamp(min=1)
    spoken = wanted != BLANK
    good = (found.argmax(-1) == wanted)[spoken].float()
    return loss, float(good.mean()) if len(good) else 0.0


def ctc_loss(logits: Float[Tensor, "b t c"], batch: SpeechBatch) -> Float[Tensor, ""]:
    """Mean negative log-likelihood per word (Graves et al., ICML 2006)."""
    scores = logits.log_softmax(-1).transpose(0, 1)
    rows = torch.full_like(batch.word_counts, logits.shape[1])
    total = F.ctc_loss(
        scores,
        batch.words,
        rows,
        batch.word_counts,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return total / batch.word_counts.sum()


def collapsed(classes: Int[Tensor, " t"]) -> list[int]:
    """The words of a best path: repetitions once, blanks not at all."""
    runs = torch.unique_consecutive(classes)
    found: list[int] = runs[runs != BLANK].tolist()
    return found


def text_rows(
    backbone: Backbone,
    rows: Float[Tensor, "b t d"],
    counts: Int[Tensor, " b"],
    before: Int[Tensor, " p"],
    after: Int[Tensor, "b u"],
) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"]]:
    """Embeddings `[before | sound | after | padding]` of each utterance, and its token ids.

    Ids are `IGNORE` at sound and padding; `after` is padded with `IGNORE`.
    """
    size, device = len(rows), rows.device
    p, u = len(before), after.shape[1]
    real = after != IGNORE
    ends = p + counts + real.sum(1)
    time = int(ends.max())
    place = torch.arange(time, device=device).expand(size, time)
    sound = place - p
    tail = sound - counts[:, None]
    in_sound = (sound >= 0) & (tail < 0)
    in_tail = (tail >= 0) & (place < ends[:, None])
    ids = torch.full((size, time), IGNORE, device=device)
    ids[:, :p] = before
    ids = torch.where(in_tail, after.gather(1, tail.clamp(0, u - 1)), ids)
    embedded = backbone.embed(ids.clamp(min=0))
    offsets = torch.arange(size, device=device)[:, None] * rows.shape[1]
    source = (sound.clamp(0, rows.shape[1] - 1) + offsets).flatten()
    heard = rows.flatten(0, 1).index_select(0, source).view(size, time, -1)
    return torch.where(in_sound[..., None], heard.to(embedded.dtype), embedded), ids


def text_loss(
    backbone: Backbone,
    rows: Float[Tensor, "b t d"],
    counts: Int[Tensor, " b"],
    batch: SpeechBatch,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers' tokens, given the sound."""
    x, ids = text_rows(backbone, rows, counts, batch.before, batch.after)
    hidden = backbone(x, PlainWhole(*ids.shape, device=x.device))
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    # the prompt is no answer: it ends where the sound and the lead behind it end
    first = len(batch.before) + counts + batch.answers_from - 1
    place = torch.arange(ids.shape[1], device=ids.device)
    targets = torch.where(place >= first[:, None], targets, IGNORE)
    return next_token_loss(hidden, backbone.embed_tokens.weight, targets)
