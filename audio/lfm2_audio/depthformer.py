"""The depthformer: one hidden state of the backbone becomes the codes of one frame of speech.

A small causal transformer that runs over codebooks, not over time: codebook k sees the hidden state
and the codes before it. Module names equal the official ones (`depth_linear`, `depthformer`,
`depth_embeddings`). Source of the facts: liquid-audio 1.3.0, seen through its outputs. Knows
neither the backbone nor how codes are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_audio.config import AudioConfig
from lfm2_audio.depth_step import DepthShape, DepthSteps, depth_steps
from lfm2_mm import fused
from lfm2_mm.operators import RMSNorm, SwiGLU

__all__ = ["Choose", "Codebook", "DepthLayer", "Depthformer", "rotate_pairs"]

# What every LFM2-Audio has and no config says.
_HEADS, _KV_HEADS, _THETA, _EPS, _MULTIPLE = 32, 8, 1e6, 1e-5, 256

Choose = Callable[[int, Tensor], Tensor]
"""Codes int64 `[n]` from the number of a codebook and the scores of its classes `[n, v]`."""

Angles = tuple[Tensor, Tensor]


def rotate_pairs(
    x: Float[Tensor, "*n e"], cos: Float[Tensor, "*m e"], sin: Float[Tensor, "*m e"]
) -> Float[Tensor, "*n e"]:
    """Turn each pair of neighbours (2 i, 2 i + 1) by its angle.

    Args:
        x: Heads.
        cos: Each cosine twice.
        sin: Each sine twice, the first of the two negative.
    """
    swapped = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class BoundedAttention(nn.Module):
    """The norms of queries and keys, per head; the official name of what surrounds the product."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.q_layernorm = RMSNorm(head_dim, _EPS)
        self.k_layernorm = RMSNorm(head_dim, _EPS)


class DepthAttention(nn.Module):
    """Grouped-query attention over the codebooks so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head_dim = e = dim // _HEADS
        self.qkv_proj = nn.Linear(dim, (_HEADS + 2 * _KV_HEADS) * e, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.bounded_attention = BoundedAttention(e)

    def forward(
        self, x: Float[Tensor, "n t d"], angles: Angles, past: Tensor | None = None, at: int = 0
    ) -> Float[Tensor, "n t d"]:
        """All rows of each frame; or, with `past`, row `at` alone.

        Keys and values of the row are written to `past`, `[2, n, g, k, e]`.
        """
        norms = self.bounded_attention
        heads = fused.linear(x, self.qkv_proj).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [_HEADS, _KV_HEADS, _KV_HEADS], dim=1)
        q = rotate_pairs(norms.q_layernorm(q), *angles)
        k = rotate_pairs(norms.k_layernorm(k), *angles)
        if past is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return fused.linear(mixed.transpose(1, 2).flatten(2), self.out_proj)
        past[0, :, :, at], past[1, :, :, at] = k[:, :, 0], v[:, :, 0]
        keys, values = past[:, :, :, : at + 1]
        # the heads of a group become the rows of one small matrix product
        grouped = q.reshape(len(x), _KV_HEADS, _HEADS // _KV_HEADS, -1)
        out = F.scaled_dot_product_attention(grouped, keys, values).reshape(len(x), 1, -1)
        return fused.linear(out, self.out_proj)


class DepthLayer(nn.Module):
    """`x += attention(norm(x)); x += ffn(norm(x))`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = math.ceil(8 * dim // 3 / _MULTIPLE) * _MULTIPLE
        self.operator_norm = RMSNorm(dim, _EPS)
        self.operator = DepthAttention(dim)
        self.ffn_norm = RMSNorm(dim, _EPS)
        self.feed_forward = SwiGLU(dim, width)

    def forward(
        self, x: Float[Tensor, "n t d"], angles: Angles, past: Tensor | None = None, at: int = 0
    ) -> Float[Tensor, "n t d"]:
        """See `DepthAttention`."""
        x = x + self.operator(self.operator_norm(x), angles, past, at)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class DepthStack(nn.Module):
    """The layers; there is no norm behind the last one."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DepthLayer(dim) for _ in range(layers))


class Codebook(nn.Module):
    """The codes of one codebook: as input of the next one, and as classes of its own."""

    def __init__(self, classes: int, dim: int, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, dim)
        self.embedding_norm = RMSNorm(dim, _EPS)
        self.to_logits = None if tied else nn.Linear(dim, classes, bias=False)

    def logits(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Scores of the classes; the norm comes first."""
        return self.classes(self.embedding_norm(x))

    def classes(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Scores of the classes, of rows that went through the norm."""
        if self.to_logits is not None:
            return fused.linear(x, self.to_logits)
        weight = self.embedding.weight
        if isinstance(weight, Tensor):
            return F.linear(x, weight)
        out: Tensor = weight(x)  # packed: see `lfm2_mm.quantize.layers`
        return out


class Depthformer(nn.Module):
    """Hidden states in, frames of codes out."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        depth, self.codebooks = config.depthformer, config.codebooks
        self.dim, self.end = depth.dim, config.audio_vocab - 1
        self.depth_linear = nn.Linear(config.backbone.hidden_size, self.codebooks * self.dim)
        self.depthformer = DepthStack(depth.layers, self.dim)
        self.depth_embeddings = nn.ModuleList(
            Codebook(config.audio_vocab, self.dim, tied=depth.tie) for _ in range(self.codebooks)
        )
        self._steps: list[DepthSteps | None] = []  # the native ones, once they were looked for

    def frames(self, hidden: Float[Tensor, "n d"], choose: Choose) -> Int[Tensor, "n k"]:
        """The next frame of each sequence.

        A frame whose first code is the end of speech consists of that code alone. What the other
        codebooks of such a frame would be is computed only where another sequence goes on.

        Args:
            hidden: The backbone's last hidden state of each sequence.
            choose: Called once for each codebook, in order.
        """
        starts = fused.linear(hidden, self.depth_linear).view(-1, self.codebooks, self.dim)
        scores = self._scores(starts)
        codes = torch.full(starts.shape[:2], self.end, dtype=torch.int64, device=hidden.device)
        before: Tensor | None = None
        for k, book in enumerate(self._books()):
            x = starts[:, k]
            codes[:, k] = choose(k, scores(k, x if before is None else x + before))
            if k == 0 and bool((codes[:, 0] == self.end).all()):
                return codes
            before = book.embedding(codes[:, k])
        codes[codes[:, 0] == self.end] = self.end
        return codes

    def _books(self) -> list[Codebook]:
        return [book for book in self.depth_embeddings if isinstance(book, Codebook)]

    def _scores(self, starts: Float[Tensor, "n k d"]) -> Callable[[int, Tensor], Tensor]:
        """A frame's scores, codebook after codebook: `[n, v]` of its number and inputs `[n, d]`."""
        books, layers = self._books(), self.depthformer.layers
        if not self._steps and not torch.is_grad_enabled():
            shape = DepthShape(
                heads=_HEADS,
                groups=_KV_HEADS,
                head_dim=self.dim // _HEADS,
                theta=_THETA,
                eps=_EPS,
            )
            norms = [book.embedding_norm.weight for book in books]
            built = [layer for layer in layers if isinstance(layer, DepthLayer)]
            self._steps.append(depth_steps(built, norms, shape))
        native = self._steps[0] if self._steps and not torch.is_grad_enabled() else None
        if native is not None:
            steps, caches = native, native.begin(len(starts))
            return lambda k, x: books[k].classes(steps(k, x, caches))
        cos, sin = self._angles(starts)
        past = self._past(starts)

        def walked(k: int, x: Tensor) -> Tensor:
            x = x[:, None]
            for layer, kept in zip(layers, past, strict=True):
                x = layer(x, (cos[k], sin[k]), kept, k)
            return books[k].logits(x[:, 0])

        return walked

    def forward(
        self, hidden: Float[Tensor, "n d"], codes: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n k v"]:
        """Scores of every codebook where the codes before it are known; for training and parity.

        Args:
            hidden: One hidden state a frame.
            codes: The frames that follow; the last codebook's are not read.
        """
        starts = fused.linear(hidden, self.depth_linear).view(-1, self.codebooks, self.dim)
        books = self._books()
        before = [book.embedding(codes[:, k]) for k, book in enumerate(books[:-1])]
        x = starts + F.pad(torch.stack(before, 1), (0, 0, 1, 0)) if before else starts
        angles = self._angles(starts)
        for layer in self.depthformer.layers:
            x = layer(x, angles)
        return torch.stack([book.logits(x[:, k]) for k, book in enumerate(books)], 1)

    def pack(self) -> Iterator[None]:
        """Lay out the weights for inference where that helps, a layer with each item."""
        for part in (self.depth_linear, *self.depthformer.layers):
            fused.pack(part.modules())
            yield

    def _past(self, like: Tensor) -> Tensor:
        """Room for keys and values of all layers, `[layers, 2, n, g, k, e]`."""
        n, k = like.shape[:2]
        shape = (len(self.depthformer.layers), 2, n, _KV_HEADS, k, self.dim // _HEADS)
        return like.new_empty(shape)

    def _angles(self, like: Tensor) -> Angles:
        """Tables `[k, e]` for `rotate_pairs`: the position of a row is its codebook."""
        e = self.dim // _HEADS
        even = torch.arange(0, e, 2, dtype=torch.float32, device=like.device)
        place = torch.arange(self.codebooks, dtype=torch.float32, device=like.device)
        angles = (place[:, None] * _THETA ** -(even / e)).repeat_interleave(2, dim=-1)
        sin = angles.sin()
        sin[:, 0::2] *= -1
        return angles.cos().to(like.dtype), sin.to(like.dtype)
