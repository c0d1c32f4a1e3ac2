"""Packing a backbone by what its layers see: block after block, each on what the packed ones give.

The texts seen may be a user's, or what the model says of itself when nobody asks. Knows backbones
and ids; nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import SequenceCache
from lfm2_mm.errors import InputError
from lfm2_mm.kernels.linear import SCHEMES, dequantize, quantize
from lfm2_mm.mixing import Packed as PackedRows
from lfm2_mm.mixing import Ragged
from lfm2_mm.quantize.feedback import feedback
from lfm2_mm.quantize.fitting import fit, place, scheme_for
from lfm2_mm.quantize.layers import Packed
from lfm2_mm.quantize.recipes import Recipe, Schemes

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = ["calibrate", "own_words", "pack_model"]


@torch.inference_mode()
def own_words(model: Model, *, sequences: int = 16, tokens: int = 128) -> list[list[int]]:
    """What a model says after its begin token, drawn at temperature 1; always the same."""
    backbone = model.backbone
    start = backbone.config.bos_id or 0
    draw = torch.Generator().manual_seed(0)
    caches = [
        SequenceCache(backbone.config, capacity=tokens, dtype=model.dtype) for _ in range(sequences)
    ]
    said = [torch.full((sequences,), start)]
    for _ in range(min(tokens, backbone.config.max_positions) - 1):
        mixing = Ragged([(cache, 1) for cache in caches])
        hidden = backbone(backbone.embed(said[-1]), mixing)
        mixing.commit()
        chances = model.head.logits(hidden).float().softmax(-1)
        said.append(torch.multinomial(chances, 1, generator=draw)[:, 0])
    return torch.stack(said, dim=1).tolist()


def pack_model(model: Model, recipe: Recipe, texts: Sequence[Sequence[int]]) -> None:
    """Pack a loaded model in place: the backbone by what it sees in texts, encoders as they are."""
    schemes, head = recipe.backbone, model.head.weight
    tied = head is model.backbone.embed_tokens.weight
    calibrate(model.backbone, texts, schemes)
    if tied:
        model.head.weight = model.backbone.embed_tokens.weight
    elif isinstance(head, Tensor) and (scheme := scheme_for(head.shape, schemes.embedding)):
        model.head.weight = Packed(quantize(head.detach(), scheme), None, model.dtype)
        if schemes.report is not None:
            schemes.report("lm_head.weight")
    for part in model.parts.values():
        fit(part, part.state_dict(), recipe.encoder, dtype=model.dtype, where=model.name)


@torch.no_grad()
def calibrate(backbone: Backbone, texts: Sequence[Sequence[int]], schemes: Schemes) -> None:
    """Replace a backbone's linear layers and its embedding by packed ones.

    Args:
        backbone: With dense weights on the CPU.
        texts: Token ids of some texts, some hundred tokens in all at least.
        schemes: How to pack.

    Raises:
        InputError: if there is no text.
    """
    texts = [text for text in texts if len(text)]
    if not texts:
        raise InputError("there is no text to calibrate with; give a file with some lines")
    told = schemes.report or (lambda name: None)
    mixing = PackedRows([len(text) for text in texts], causal=backbone.config.causal)
    x = backbone.embed(torch.tensor([token for text in texts for token in text])).float()
    rotary = backbone.rotary(mixing.positions, x.dtype)
    dtype = backbone.embedding_norm.weight.dtype
    for number, block in enumerate(backbone.layers):
        wide = copy.deepcopy(block).float()
        seen = _products(wide, schemes, x, mixing, rotary)
        for name, products in seen.items():
            layer = wide.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            scheme = scheme_for(layer.weight.shape, schemes.linear)
            if scheme is None:
                continue
            usable = products is not None and SCHEMES[scheme].bits == 4
            packed = (
                feedback(layer.weight, scheme, products)
                if usable and products is not None
                else quantize(layer.weight, scheme)
            )
            layer.weight.copy_(dequantize(packed))
            full = f"layers.{number}.{name}.weight"
            place(backbone, full, Packed(packed, None, dtype))
            told(full)
        x = wide(x, mixing, rotary)
    table = backbone.embed_tokens.weight
    scheme = scheme_for(table.shape, schemes.embedding)
    if isinstance(table, Tensor) and scheme is not None:
        place(backbone, "embed_tokens.weight", Packed(quantize(table, scheme), None, table.dtype))
        told("embed_tokens.weight")


def _products(block: nn.Module, schemes: Schemes, *inputs: object) -> dict[str, Tensor | None]:
    """Per linear layer to be packed the sum of `x x^T` over its inputs; None where none came."""
    found: dict[str, Tensor | None] = {}
    hooks = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            if len(rows):
                before = found[name]
                found[name] = rows.T @ rows if before is None else before.addmm_(rows.T, rows)

        return see

    for name, part in block.named_modules():
        if type(part) is nn.Linear and not schemes.keeps(name):
            found[name] = None
            hooks.append(part.register_forward_pre_hook(watch(name)))
    try:
        block(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
