"""Codecs fed bit by bit: exactly what they give for the whole, from a state of fixed size.

Everything in these codecs is causal but the overlap of the last transform, so a stream keeps what
each layer has last seen. Knows the networks' layers, and no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_audio.codec import check_codes
from lfm2_audio.istft import OverlapAdd
from lfm2_audio.sliding import Sliding, SlidingState
from lfm2_mm.operators import Rotary, rotate

if TYPE_CHECKING:
    from transformers import MimiModel

    from lfm2_audio.detokenizer import DetokenizerNet

__all__ = ["DetokenizerStream", "MimiStream"]

_STEP = 64  # frames at a time: attention of one step takes memory with the square of it


class DetokenizerStream:
    """The stream of a `Detokenizer`; see `lfm2_audio.codec.CodecStream`.

    Keeps the last rows of keys, values and convolution inputs of each layer, and the samples that
    later rows of spectrum still overlap.
    """

    def __init__(self, net: DetokenizerNet, entries: int) -> None:
        self._net, self._entries = net, entries
        self._window = net.istft.window.float().cpu()
        self._begin()

    def _begin(self) -> None:
        self._state = SlidingState()
        self._overlap = OverlapAdd(self._window, self._net.config.hop)

    @torch.no_grad()
    def push(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `CodecStream.push`.

        Raises:
            InputError: if a code is out of range; the stream then stands where it stood.
        """
        config, device = self._net.config, self._net.lin.weight.device
        check_codes(codes, config.codebooks, self._entries)
        pieces = [self._window.new_zeros(0)]
        for part in _steps(codes):
            x = self._net.embed(part.to(device))
            mixing = Sliding(self._state, len(x), config.window, device)
            spectrum = self._net.spectrum(x, mixing)
            mixing.commit()
            pieces.append(self._overlap.push(spectrum.float().cpu()))
        return torch.cat(pieces)

    @torch.no_grad()
    def flush(self) -> Float[Tensor, " n"]:
        """See `CodecStream.flush`."""
        rest = self._overlap.flush()
        self._begin()
        return rest


class MimiStream:
    """The stream of a `Mimi`; see `lfm2_audio.codec.CodecStream`.

    Walks over the layers of transformers' MimiModel and keeps, for each convolution, the inputs
    that later taps still reach, and for each transposed one the outputs that later inputs still
    add to.
    """

    def __init__(self, net: MimiModel) -> None:
        config: Any = net.config
        self._codes = int(config.num_quantizers), int(config.codebook_size)
        self._window = int(config.sliding_window)
        self._rotary = Rotary(int(config.head_dim), float(config.rope_parameters["rope_theta"]))
        self._quantizer: Any = net.quantizer
        self._decoder: Any = net.decoder
        self._device = net.device
        self._begin()

    def _begin(self) -> None:
        self._state = SlidingState()
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def push(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `CodecStream.push`.

        Raises:
            InputError: if a code is out of range; the stream then stands where it stood.
        """
        check_codes(codes, *self._codes)
        pieces = [torch.zeros(0)]
        for part in _steps(codes):
            x = self._quantizer.decode(part.T[None].to(self._device))
            x = self._transposed("upsample", self._decoder.upsample, x)
            x = self._transformer(x[0].T).T[None]
            for i, layer in enumerate(self._decoder.decoder_seanet.layers):
                x = self._layer(str(i), layer, x)
            pieces.append(x[0, 0].cpu())
        return torch.cat(pieces)

    def flush(self) -> Float[Tensor, " n"]:
        """See `CodecStream.flush`; nothing is ever held back."""
        self._begin()
        return torch.zeros(0)

    def _transformer(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The layers between the codes and the convolutions; each sees a window of the past."""
        mixing = Sliding(self._state, len(x), self._window, x.device)
        rotary = self._rotary(mixing.positions, x.dtype)
        for i, layer in enumerate(self._decoder.decoder_transformer.layers):
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            heads = (len(x), -1, attention.head_dim)
            q = rotate(attention.q_proj(h).view(heads), *rotary)
            k = rotate(attention.k_proj(h).view(heads), *rotary)
            seen = mixing.attend(i, q, k, attention.v_proj(h).view(heads))
            x = x + layer.self_attn_layer_scale(attention.o_proj(seen.flatten(1)))
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        mixing.commit()
        return x

    def _layer(self, name: str, layer: Any, x: Float[Tensor, "1 c t"]) -> Tensor:
        if isinstance(layer, nn.ELU):
            return F.elu(x)
        if hasattr(layer, "block"):
            y = x
            for i, inner in enumerate(layer.block):
                y = self._layer(f"{name}.{i}", inner, y)
            return self._layer(name, layer.shortcut, x) + y
        if isinstance(layer, nn.Identity):
            return x
        if isinstance(layer.conv, nn.ConvTranspose1d):
            return self._transposed(name, layer, x)
        return self._convolved(name, layer, x)

    def _convolved(self, name: str, layer: Any, x: Float[Tensor, "1 c t"]) -> Tensor:
        """A causal convolution of stride 1; before the beginning lie zeros."""
        conv = layer.conv
        assert isinstance(conv, nn.Conv1d)
        reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
        if reach:
            past = self._kept.get(name)
            if past is None:
                past = x.new_zeros(*x.shape[:2], reach)
            x = torch.cat([past, x], dim=2)
            self._kept[name] = x[:, :, x.shape[2] - reach :].clone()
        out: Tensor = conv(x)
        return out

    def _transposed(self, name: str, layer: Any, x: Float[Tensor, "1 c t"]) -> Tensor:
        """A transposed convolution whose end, which later inputs add to, is kept back."""
        conv = layer.conv
        assert isinstance(conv, nn.ConvTranspose1d)
        stride, groups = conv.stride[0], conv.groups
        y = F.conv_transpose1d(x, conv.weight, stride=stride, groups=groups)
        if name in self._kept:
            tail = self._kept[name]
            y[:, :, : tail.shape[2]] += tail
        done = x.shape[2] * stride
        self._kept[name] = y[:, :, done:].clone()
        y = y[:, :, :done]
        return y if conv.bias is None else y + conv.bias[:, None]


def _steps(codes: Int[Tensor, "t k"]) -> Iterator[Int[Tensor, "s k"]]:
    for start in range(0, len(codes), _STEP):
        yield codes[start : start + _STEP]
