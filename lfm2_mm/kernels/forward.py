"""The new rows of several sequences through a whole backbone in one native call.

What it computes is what `Backbone.forward` computes over a `Ragged` mixing, with the numbers
between products in fp32; that is its twin. It writes into the caches' own memory, in their number
format or in int8. Many rows are multiplied in bf16 where the processor has AMX, and in bytes
elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.cache import SequenceCache
from lfm2_mm.config import BackboneConfig
from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import Ready

__all__ = ["AttentionPart", "ConvolutionPart", "DecodeStep", "SparsePart", "StepLayer"]

_FORWARD = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
_FORWARD += [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
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
class SparsePart:
    """Experts of which a router chooses some for each row.

    Attributes:
        router: Weight of the router.
        bias: Added to the scores to choose by, not to weigh by; None for none.
        experts: How many there are.
        uniform: Whether all are quantised in one way, as the native call needs it.
        ready: Gate, up and down of one of them; asked for when it is first chosen.
    """

    router: Float[Tensor, "experts d"]
    bias: Float[Tensor, " experts"] | None
    experts: int
    uniform: bool
    ready: Callable[[int], tuple[Ready, Ready, Ready]]


@dataclass(frozen=True, slots=True)
class StepLayer:
    """One block: norm, operator, norm, SwiGLU (`w2(silu(w1 x) * w3 x)`) or experts of that kind."""

    operator_norm: Float[Tensor, " d"]
    operator: ConvolutionPart | AttentionPart
    ffn_norm: Float[Tensor, " d"]
    w1: Ready | None
    w3: Ready | None
    w2: Ready | None
    sparse: SparsePart | None = None

    def weights(self) -> tuple[Ready, ...]:
        """All of its quantised weights but the experts'."""
        part = self.operator
        if isinstance(part, ConvolutionPart):
            own: tuple[Ready, ...] = (part.in_proj, part.out_proj)
        else:
            own = (part.q_proj, part.k_proj, part.v_proj, part.out_proj)
        return (*own, *(one for one in (self.w1, self.w3, self.w2) if one is not None))


class DecodeStep:
    """The layers of one backbone, their weights where `Ready` has them.

    Args:
        config: Of a causal backbone; see `can_run`.
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
        self._sparse = [layer.sparse for layer in layers]
        self._tables = [_experts(part) for part in self._sparse]
        self._weights = [weight for layer in layers for weight in layer.weights()]
        rows = [self._row(layer, table) for layer, table in zip(layers, self._tables, strict=True)]
        self._layers = torch.tensor(rows, dtype=torch.int64)
        even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
        most = max((part.experts for part in self._sparse if part is not None), default=0)
        self._resume = torch.zeros(1 + most, dtype=torch.int64)
        wide = [layer.w1.rows for layer in layers if layer.w1 is not None]
        numbers = [
            len(rows),
            self._layers.data_ptr(),
            config.hidden_size,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.conv_taps,
            max([*wide, config.expert_size if most else 0]),
            self._place(norm),
            self._place(frequencies),
            self._place(torch.tensor([config.norm_eps])),
            most,
            config.n_experts_per_token if most else 0,
            int(config.normalise_routing),
            self._place(torch.tensor([config.routing_scale], dtype=torch.float32)),
        ]
        self._model = torch.tensor(numbers, dtype=torch.int64)

    def __deepcopy__(self, memo: object) -> DecodeStep:
        return self  # the tables point into `_keep`

    def __getstate__(self) -> None:
        raise TypeError("a native step cannot be pickled; save the packed weights")

    @staticmethod
    def can_run(config: BackboneConfig, layers: Sequence[StepLayer]) -> bool:
        """Whether such a call exists: a causal backbone, native weights, known shapes."""
        return (
            native.function("lfm2_forward", _FORWARD, ctypes.c_int) is not None
            and config.causal
            and config.hidden_size % 16 == 0
            and len(layers) == config.n_layers > 0
            and all(layer.sparse is None or layer.sparse.uniform for layer in layers)
            and all(weight.native for layer in layers for weight in layer.weights())
        )

    def __call__(
        self, x: Float[Tensor, "n d"], caches: Sequence[SequenceCache]
    ) -> Float[Tensor, "n d"]:
        """Hidden states of one new row of each sequence; see `run`."""
        return self.run(x, caches, [1] * len(caches))[0]

    def run(
        self,
        x: Float[Tensor, "n d"],
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        marks: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Float[Tensor, "n d"], list[dict[int, dict[int, Tensor]]]]:
        """Hidden states behind the last norm, in the dtype of `x`, and states at the marks.

        Args:
            x: Embeddings of the next positions of each sequence, one sequence behind the other.
            caches: One for each sequence, all different, all in fp32 or all in bf16, each with
                its places reserved; keys, values and states are written, but count only after
                `advance`.
            counts: Rows of each sequence, at least 1.
            marks: Of each sequence the numbers of rows after which the states of its
                convolutions are wanted; none if None.

        Returns:
            The hidden states, and for each sequence: mark -> layer -> state `[k - 1, d]`.

        Raises:
            ValueError: the caches are not of that kind, or the numbers do not fit.
            MemoryError: there is no memory for what lies between the layers.
        """
        call = native.function("lfm2_forward", _FORWARD, ctypes.c_int)
        dtype = caches[0].dtype if caches else torch.float32
        fits = sum(counts) == len(x) and len(counts) == len(caches) and min(counts, default=1) >= 1
        fits = (
            fits
            and x.shape[1] == self.config.hidden_size
            and all(
                cache.dtype == dtype and cache.length + n <= cache.capacity
                for cache, n in zip(caches, counts, strict=True)
            )
        )
        if call is None or not fits or dtype not in _DTYPES:
            raise ValueError(
                f"a native call of {len(x)} rows over {len(caches)} caches in {dtype} is not "
                "possible; ask `can_run` and hand in caches in fp32 or bf16 for all rows, all in "
                "one number format and with places reserved"
            )
        if not len(x):
            return x, []
        groups = _alike(counts, sparse=any(part is not None for part in self._sparse))
        if len(groups) > 1:
            return self._in_turn(groups, x, caches, counts, marks)
        hidden = x.detach().to(torch.float32, copy=True).contiguous()
        wanted = [[*own, n] for own, n in zip(marks or [()] * len(counts), counts, strict=True)]
        table = _Sequences(self.config, caches, counts, wanted)
        half, used = int(dtype == torch.bfloat16), native.threads()
        place, resume = self._model.data_ptr(), self._resume.clone()
        resume[0] = -1
        arguments = [place, hidden.data_ptr(), len(x), table.place, len(caches), half]
        while (done := call(*arguments, resume.data_ptr(), used)) == 2:
            self._bring(int(resume[0]), resume[1:].nonzero().flatten().tolist())
            resume[1:] = 0
        if done:
            raise MemoryError("there is no memory left for a step of the backbone")
        return hidden.to(x.dtype), table.accept()

    def _in_turn(
        self,
        groups: Sequence[Sequence[int]],
        x: Tensor,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        marks: Sequence[Sequence[int]] | None,
    ) -> tuple[Tensor, list[dict[int, dict[int, Tensor]]]]:
        """`run` of each group of sequences, put together in the order of the sequences."""
        pieces = list(torch.split(x, list(counts)))
        states: list[dict[int, dict[int, Tensor]]] = [{} for _ in counts]
        for group in groups:
            own = [counts[i] for i in group]
            hidden, kept = self.run(
                torch.cat([pieces[i] for i in group]),
                [caches[i] for i in group],
                own,
                None if marks is None else [marks[i] for i in group],
            )
            for i, rows, found in zip(group, torch.split(hidden, own), kept, strict=True):
                pieces[i], states[i] = rows, found
        return torch.cat(pieces), states

    def _bring(self, layer: int, experts: Sequence[int]) -> None:
        """Lay out experts that are chosen for the first time."""
        part, table = self._sparse[layer], self._tables[layer]
        assert part is not None and table is not None
        for expert in experts:
            ready = part.ready(expert)
            if not all(weight.native for weight in ready):
                raise ValueError(
                    f"expert {expert} of layer {layer} was laid out for torch; switch native "
                    "kernels on before a model is used, not afterwards"
                )
            self._weights += ready
            table[expert] = torch.tensor([_table(one) for one in ready])

    def _place(self, tensor: Tensor | None) -> int:
        """Where the numbers lie, in fp32, for as long as this lives; 0 for none."""
        if tensor is None:
            return 0
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _row(self, layer: StepLayer, experts: Tensor | None) -> list[int]:
        """`lfm2_layer` of src/forward.h."""
        part, sparse = layer.operator, layer.sparse
        ffn = [_table(weight) for weight in (layer.w1, layer.w3, layer.w2)]
        norms = [self._place(layer.operator_norm), self._place(layer.ffn_norm)]
        last = [0, 0, 0, 0]
        if sparse is not None and experts is not None:
            routing = [self._place(sparse.router), self._place(sparse.bias)]
            last = [sparse.experts, experts.data_ptr(), *routing]
        if isinstance(part, ConvolutionPart):
            first = [0, *norms, _table(part.in_proj), 0, 0, _table(part.out_proj), *ffn]
            taps = self._place(part.taps.T)
            biases = (part.in_bias, part.conv_bias, part.out_bias)
            return [*first, 0, 0, taps, *(self._place(bias) for bias in biases), *last]
        own = [_table(part.q_proj), _table(part.k_proj), _table(part.v_proj), _table(part.out_proj)]
        heads = [self._place(part.q_norm), self._place(part.k_norm)]
        return [1, *norms, *own, *ffn, *heads, 0, 0, 0, 0, *last]


class _Sequences:
    """`lfm2_sequence` of src/forward.h for each cache, and the states that come of it."""

    def __init__(
        self,
        config: BackboneConfig,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        wanted: Sequence[Sequence[int]],
    ) -> None:
        self._convs = config.conv_layers
        self._caches, self._wanted = caches, wanted
        shape = (len(self._convs), config.conv_taps - 1, config.hidden_size)
        self._fresh: list[Tensor] = []  # of each sequence `[ends, convolutions, k - 1, d]`
        self._keep: list[object] = []
        words: list[int] = []
        for cache, n, ends in zip(caches, counts, wanted, strict=True):
            fresh = torch.empty(len(ends), *shape, dtype=cache.dtype)
            self._fresh.append(fresh)
            size = fresh[0, 0].nbytes if self._convs else 0
            states = [cache.conv_state(layer).contiguous() for layer in self._convs]
            start = fresh.data_ptr()
            next_places = [start + i * size for i in range(len(ends) * len(self._convs))]
            tables = [self._words([state.data_ptr() for state in states])]
            tables += [self._words(ends), self._words(next_places)]
            self._keep.append(states)
            places = [part.data_ptr() for part in cache.buffers]
            words += [cache.length, n, *places, *[0] * (4 - len(places)), cache.capacity]
            words += [tables[0], len(ends), *tables[1:]]
        self.place = self._words(words)

    def _words(self, numbers: Sequence[int]) -> int:
        """Where they lie."""
        table = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
        self._keep.append(table)
        return ctypes.addressof(table)

    def accept(self) -> list[dict[int, dict[int, Tensor]]]:
        """Propose the last states to the caches; the others by mark and layer."""
        found = []
        for cache, fresh, ends in zip(self._caches, self._fresh, self._wanted, strict=True):
            for layer, state in zip(self._convs, fresh[-1].unbind(), strict=True):
                cache.set_conv_state(layer, state if len(ends) == 1 else state.clone())
            found.append(
                {
                    mark: dict(zip(self._convs, states.clone().unbind(), strict=True))
                    for mark, states in zip(ends[:-1], fresh, strict=False)
                }
            )
        return found


def _experts(part: SparsePart | None) -> Tensor | None:
    """Places of the experts' tables, none of which was asked for yet."""
    return None if part is None else torch.zeros(part.experts, 3, dtype=torch.int64)


def _table(ready: Ready | None) -> int:
    return 0 if ready is None or ready.table is None else ready.table.data_ptr()


_MANY_ROWS = 24
"""From so many rows on products may be tiles in bf16 (`kAmxRows` of src/linear.h)."""


def _alike(counts: Sequence[int], *, sparse: bool) -> list[list[int]]:
    """Sequences that may share a call and still get the numbers that each gets alone.

    Long prompts may be multiplied in tiles, other rows never, however many come together; which
    rows of experts are depends on all rows of a call, so that there each prompt has its own.
    """
    groups: list[list[int]] = []
    short: list[int] = []
    rows = 0
    for i, count in enumerate(counts):
        if count >= _MANY_ROWS:
            continue
        if short and rows + count >= _MANY_ROWS:
            groups.append(short)
            short, rows = [], 0
        short.append(i)
        rows += count
    groups += [short] if short else []
    long = [i for i, count in enumerate(counts) if count >= _MANY_ROWS]
    if sparse:
        return groups + [[i] for i in long]
    return groups + ([long] if long else [])
