"""A whole decode step of a dense backbone in one native call: one new position of each sequence.

What it computes is what `Backbone.forward` computes over a `Ragged` mixing of single rows, with
the numbers between products in fp32; that is its twin. It writes into the caches' own memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.cache import SequenceCache
from lfm2_mm.config import BackboneConfig
from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import Ready

__all__ = ["AttentionPart", "ConvolutionPart", "DecodeStep", "StepLayer"]

_STEP = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
_STEP += [ctypes.c_int, ctypes.c_int]
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ConvolutionPart:
    """A gated short convolution; `taps` is `[d, k]` as in checkpoints, the last one is now."""

    in_proj: Ready
    out_proj: Ready
    taps: Float[Tensor, "d k"]
    in_bias: Float[Tensor, " wide"] | None = None
    conv_bias: Float[Tensor, " d"] | None = None
    out_bias: Float[Tensor, " d"] | None = None


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """Grouped-query attention with norms of each head."""

    q_proj: Ready
    k_proj: Ready
    v_proj: Ready
    out_proj: Ready
    q_norm: Float[Tensor, " e"]
    k_norm: Float[Tensor, " e"]


@dataclass(frozen=True, slots=True)
class StepLayer:
    """One block: norm, operator, norm, SwiGLU (`w2(silu(w1 x) * w3 x)`)."""

    operator_norm: Float[Tensor, " d"]
    operator: ConvolutionPart | AttentionPart
    ffn_norm: Float[Tensor, " d"]
    w1: Ready
    w3: Ready
    w2: Ready

    def weights(self) -> tuple[Ready, ...]:
        """All of its quantised weights."""
        part = self.operator
        if isinstance(part, ConvolutionPart):
            own: tuple[Ready, ...] = (part.in_proj, part.out_proj)
        else:
            own = (part.q_proj, part.k_proj, part.v_proj, part.out_proj)
        return (*own, self.w1, self.w3, self.w2)


class DecodeStep:
    """The step of one backbone, its weights where `Ready` has them.

    Args:
        config: Of a dense, causal backbone; see `can_run`.
        layers: In order; of the kinds that the config says.
        norm: Weight of the norm behind the last layer.
    """

    def __init__(
        self,
        config: BackboneConfig,
        layers: Sequence[StepLayer],
        norm: Float[Tensor, " d"],
    ) -> None:
        self.config = config
        self._keep: list[Tensor] = []
        self._weights = [weight for layer in layers for weight in layer.weights()]
        rows = [self._row(layer) for layer in layers]
        self._layers = torch.tensor(rows, dtype=torch.int64)
        even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
        numbers = [
            len(rows),
            self._layers.data_ptr(),
            config.hidden_size,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.conv_taps,
            max(layer.w1.rows for layer in layers),
            self._place(norm),
            self._place(frequencies),
            self._place(torch.tensor([config.norm_eps])),
        ]
        self._model = torch.tensor(numbers, dtype=torch.int64)

    def __deepcopy__(self, memo: object) -> DecodeStep:
        return self  # the tables point into `_keep`

    def __getstate__(self) -> None:
        raise TypeError("a native step cannot be pickled; save the packed weights")

    @staticmethod
    def can_run(config: BackboneConfig, layers: Sequence[StepLayer]) -> bool:
        """Whether such a step exists: a dense causal backbone, native weights, known shapes."""
        return (
            native.function("lfm2_step", _STEP, ctypes.c_int) is not None
            and config.n_experts == 0
            and config.causal
            and config.hidden_size % 16 == 0
            and len(layers) == config.n_layers > 0
            and all(weight.native for layer in layers for weight in layer.weights())
        )

    def __call__(
        self, x: Float[Tensor, "n d"], caches: Sequence[SequenceCache]
    ) -> Float[Tensor, "n d"]:
        """Hidden states behind the last norm, in the dtype of `x`.

        Args:
            x: Embedding of the next position of each sequence.
            caches: One for each row, all different, in fp32 or bf16, each with a place reserved;
                keys, values and states are written, but count only after `advance(1)`.

        Raises:
            ValueError: the caches are not of that kind, or their number differs.
            MemoryError: there is no memory for what lies between the layers.
        """
        call = native.function("lfm2_step", _STEP, ctypes.c_int)
        dtype = caches[0].dtype if caches else torch.float32
        if call is None or len(caches) != len(x) or dtype not in _DTYPES:
            raise ValueError(
                f"a native step of {len(x)} rows over {len(caches)} caches in {dtype} is not "
                "possible; ask `can_run` and hand in one cache in fp32 or bf16 for each row"
            )
        if not len(x):
            return x
        hidden = x.detach().to(torch.float32, copy=True).contiguous()
        convs = self.config.conv_layers
        shape = (len(caches), len(convs), self.config.conv_taps - 1, self.config.hidden_size)
        fresh = torch.empty(shape, dtype=dtype)
        size = fresh[0, 0].nbytes if convs else 0
        alive: list[Tensor] = []
        pointers: list[int] = []
        for i, cache in enumerate(caches):
            states = [cache.conv_state(layer).contiguous() for layer in convs]
            alive += states
            pointers += [state.data_ptr() for state in states]
            start = fresh.data_ptr() + i * len(convs) * size
            pointers += [start + slot * size for slot in range(len(convs))]
        table = (ctypes.c_int64 * max(1, len(pointers)))(*pointers)
        places = ctypes.addressof(table)
        words: list[int] = []
        for i, cache in enumerate(caches):
            keys, values = cache.buffers
            at = places + 16 * i * len(convs)
            words += [cache.length, keys.data_ptr(), values.data_ptr(), cache.capacity]
            words += [at, at + 8 * len(convs)]
        sequences = (ctypes.c_int64 * len(words))(*words)
        half, used = int(dtype == torch.bfloat16), native.threads()
        place = self._model.data_ptr()
        if call(place, hidden.data_ptr(), len(x), ctypes.addressof(sequences), half, used):
            raise MemoryError("there is no memory left for a step of the backbone")
        for i, cache in enumerate(caches):
            for layer, state in zip(convs, fresh[i].unbind(), strict=True):
                cache.set_conv_state(layer, state)
        return hidden.to(x.dtype)

    def _place(self, tensor: Tensor | None) -> int:
        """Where the numbers lie, in fp32, for as long as this lives; 0 for none."""
        if tensor is None:
            return 0
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _row(self, layer: StepLayer) -> list[int]:
        """`lfm2_layer` of src/forward.h."""
        part = layer.operator
        ffn = [_table(weight) for weight in (layer.w1, layer.w3, layer.w2)]
        norms = [self._place(layer.operator_norm), self._place(layer.ffn_norm)]
        if isinstance(part, ConvolutionPart):
            first = [0, *norms, _table(part.in_proj), 0, 0, _table(part.out_proj), *ffn]
            taps = self._place(part.taps.T)
            biases = (part.in_bias, part.conv_bias, part.out_bias)
            return [*first, 0, 0, taps, *(self._place(bias) for bias in biases)]
        own = [_table(part.q_proj), _table(part.k_proj), _table(part.v_proj), _table(part.out_proj)]
        heads = [self._place(part.q_norm), self._place(part.k_norm)]
        return [1, *norms, *own, *ffn, *heads, 0, 0, 0, 0]


def _table(ready: Ready) -> int:
    return 0 if ready.table is None else ready.table.data_ptr()
