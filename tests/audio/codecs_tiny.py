"""Tiny codecs with random weights, and ways to cut frames into chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from lfm2_audio.codec import CodecStream
from lfm2_audio.detokenizer import ENTRIES, Detokenizer, DetokenizerConfig, DetokenizerNet
from lfm2_mm.config import BackboneConfig, LayerType

KINDS: tuple[LayerType, ...] = ("conv", "conv", "full_attention", "conv", "full_attention", "conv")


def tiny_detokenizer(
    *, window: int = 30, codebooks: int = 3, n_fft: int = 64, seed: int = 0
) -> Detokenizer:
    config = DetokenizerConfig(
        backbone=BackboneConfig(
            vocab_size=1,
            hidden_size=32,
            ffn_size=48,
            layer_types=KINDS,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            bos_id=0,
            eos_ids=(0,),
        ),
        window=window,
        codebooks=codebooks,
        n_fft=n_fft,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DetokenizerNet(config)
        net.requires_grad_(False)
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return Detokenizer(net)


def codes_of(frames: int, codebooks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ENTRIES, (frames, codebooks), generator=generator)


def in_chunks(stream: CodecStream, codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """What a stream returns for chunks of these sizes, and a last one of what is left."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(stream.push(codes[start : start + size]))
        start += size
    pieces.append(stream.push(codes[start:]))
    return [*pieces, stream.flush()]


chunk_sizes = st.lists(st.integers(0, 20), max_size=12)
