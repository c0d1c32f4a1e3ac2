"""A vision-language model as it trains fast on a CPU: compiled pieces from attention to attention.

It computes what the model's own modules do, with the same parameters. The matrix units take a
fraction of a training step; the passes over memory between them are what costs, and compiling long
pieces fuses those. Attention stays outside, where its shapes change with every batch. Knows no
loss and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone, Block
from lfm2_mm.operators import rotate
from lfm2_mm.train.packing import Branched
from lfm2_vision.encoder import EncoderLayer, Siglip2Tower, ViewShape

__all__ = ["Quick"]

Heads = tuple[Tensor, Tensor, Tensor]


class Quick:
    """The forward passes of training.

    Args:
        tower: The vision tower.
        backbone: The backbone; dense.
        compiled: False runs the same pieces as they are written.
    """

    def __init__(self, tower: Siglip2Tower, backbone: Backbone, *, compiled: bool = True) -> None:
        self.tower, self.backbone = tower, backbone
        wrap: Callable[[Any], Any] = (
            (lambda f: torch.compile(f, dynamic=True)) if compiled else (lambda f: f)
        )
        self._enter, self._between, self._leave = wrap(_enter), wrap(_between), wrap(_leave)
        self._open, self._middle, self._close = wrap(_open), wrap(_middle), wrap(_close)

    def see(
        self, patches: Float[Tensor, "n p"], shapes: Sequence[ViewShape]
    ) -> Float[Tensor, "n d"]:
        """What the tower makes of packed patches; see `Siglip2Tower`."""
        tower = self.tower
        layers = [layer for layer in tower.encoder.layers if isinstance(layer, EncoderLayer)]
        lengths = [rows * columns for rows, columns in shapes]
        x = tower.embeddings(patches, shapes)
        q, k, v = self._enter(x, layers[0])
        for layer, after in zip(layers, layers[1:], strict=False):
            out = layer.self_attn.mix(q, k, v, lengths)
            x, (q, k, v) = self._between(x, out, layer, after)
        out = layers[-1].self_attn.mix(q, k, v, lengths)
        rows: Tensor = self._leave(x, out, layers[-1], tower.post_layernorm)
        return rows

    def read(self, x: Float[Tensor, "n d"], mixing: Branched) -> list[Float[Tensor, "n d"]]:
        """Embedded rows after each layer, the last after the final norm as well."""
        blocks = [block for block in self.backbone.layers if isinstance(block, Block)]
        rotary = self.backbone.rotary(mixing.positions, x.dtype)
        stops = [i for i, block in enumerate(blocks) if block.is_attention]
        states, heads = self._open(x, blocks[: stops[0] + 1], mixing.sources, rotary)
        for this, after in zip(stops, stops[1:], strict=False):
            out = mixing.attend(this, *heads)
            more, heads = self._middle(
                states[-1] if states else x, out, blocks[this : after + 1], mixing.sources, rotary
            )
            states += more
        out = mixing.attend(stops[-1], *heads)
        norm = self.backbone.embedding_norm
        before = states[-1] if states else x
        rest = self._close(before, out, blocks[stops[-1] :], mixing.sources, norm)
        return [*states, *rest]


def _heads(x: Tensor, block: Block, rotary: tuple[Tensor, Tensor]) -> Heads:
    attention, h = block.self_attn, block.operator_norm(x)
    shape = (len(x), -1, attention.head_dim)
    q = rotate(attention.q_layernorm(attention.q_proj(h).view(shape)), *rotary)
    k = rotate(attention.k_layernorm(attention.k_proj(h).view(shape)), *rotary)
    return q, k, attention.v_proj(h).view(shape)


def _mixed(x: Tensor, out: Tensor, block: Block) -> Tensor:
    x = x + block.self_attn.out_proj(out.flatten(-2))
    done: Tensor = x + block.feed_forward(block.ffn_norm(x))
    return done


def _convolved(x: Tensor, block: Block, sources: Sequence[Tensor]) -> Tensor:
    conv = block.conv
    b, c, u = conv.in_proj(block.operator_norm(x)).chunk(3, dim=-1)
    u, taps = b * u, conv.conv.weight[:, 0].to(x.dtype)
    y = u * taps[:, -1]
    rows = nn.functional.pad(u, (0, 0, 0, 1))
    for j, source in enumerate(sources):
        y = y + rows[source] * taps[:, j]
    x = x + conv.out_proj(c * y)
    done: Tensor = x + block.feed_forward(block.ffn_norm(x))
    return done


def _run(x: Tensor, blocks: Sequence[Block], sources: Sequence[Tensor]) -> list[Tensor]:
    states = []
    for block in blocks:
        x = _convolved(x, block, sources)
        states.append(x)
    return states


def _open(
    x: Tensor, blocks: Sequence[Block], sources: Any, rotary: Any
) -> tuple[list[Tensor], Heads]:
    states = _run(x, blocks[:-1], sources)
    return states, _heads(states[-1] if states else x, blocks[-1], rotary)


def _middle(
    x: Tensor, out: Tensor, blocks: Sequence[Block], sources: Any, rotary: Any
) -> tuple[list[Tensor], Heads]:
    states = [_mixed(x, out, blocks[0])]
    states += _run(states[0], blocks[1:-1], sources)
    return states, _heads(states[-1], blocks[-1], rotary)


def _close(
    x: Tensor, out: Tensor, blocks: Sequence[Block], sources: Any, norm: nn.Module
) -> list[Tensor]:
    states = [_mixed(x, out, blocks[0])]
    states += _run(states[0], blocks[1:], sources)
    return [*states[:-1], norm(states[-1])]


def _enter(x: Tensor, layer: EncoderLayer) -> Heads:
    h, attention = layer.layer_norm1(x), layer.self_attn
    return attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)


def _leave(x: Tensor, out: Tensor, layer: EncoderLayer, norm: nn.Module) -> Tensor:
    done: Tensor = norm(_done(x, out, layer))
    return done


def _between(
    x: Tensor, out: Tensor, layer: EncoderLayer, after: EncoderLayer
) -> tuple[Tensor, Heads]:
    x = _done(x, out, layer)
    return x, _enter(x, after)


def _done(x: Tensor, out: Tensor, layer: EncoderLayer) -> Tensor:
    x = x + layer.self_attn.out_proj(out)
    h = layer.mlp.fc1(layer.layer_norm2(x))
    done: Tensor = x + layer.mlp.fc2(nn.functional.gelu(h, approximate="tanh"))
    return done
