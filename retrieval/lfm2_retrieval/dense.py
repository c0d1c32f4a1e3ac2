"""The chain of Dense modules behind a backbone: hidden states become short vectors.

Knows the layers and their files; deliberately nothing of tokens or of normalising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import CorruptWeights, TensorMismatch
from lfm2_mm.loading import LoadOptions
from lfm2_mm.weights import load_weights
from lfm2_retrieval.layout import ACTIVATIONS, DENSE_WEIGHTS, DenseSpec

__all__ = ["Dense", "build_head", "head_tensors"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": F.gelu,
    "Identity": lambda x: x,
    "ReLU": F.relu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}
assert frozenset(_FUNCTIONS) == ACTIVATIONS


class Dense(nn.Module):
    """`activation(linear(x))`, plus the input where the module is residual."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.in_features, spec.out_features, bias=spec.bias)
        self.activation = _FUNCTIONS[spec.activation]
        self.residual = (
            nn.Linear(spec.in_features, spec.out_features, bias=False)
            if spec.residual and spec.in_features != spec.out_features
            else None
        )

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Project the last dimension."""
        out = self.activation(self.linear(x))
        if not self.spec.residual:
            return out
        return out + (x if self.residual is None else self.residual(x))


def build_head(
    checkpoint: Checkpoint, specs: Sequence[DenseSpec], hidden: int, options: LoadOptions
) -> nn.Sequential:
    """The Dense modules of a checkpoint with their weights, one behind the other.

    Args:
        checkpoint: Where they lie.
        specs: What their configs say.
        hidden: Width of what goes in.
        options: Device and number format.

    Raises:
        TensorMismatch: if sizes or tensors do not fit together.
        CorruptWeights: if a file cannot be read.
    """
    width = hidden
    modules = []
    for spec in specs:
        if spec.in_features != width:
            raise TensorMismatch(
                f"the Dense module {spec.folder} of {checkpoint.name} takes {spec.in_features} "
                f"features, but gets {width}; use a checkpoint whose modules belong together"
            )
        with torch.device("meta"):
            module = Dense(spec)
        load_weights(
            module,
            _tensors(checkpoint, spec),
            dtype=options.dtype,
            device=options.device,
            where=f"{checkpoint.name}/{spec.folder}",
        )
        modules.append(module.eval())
        width = spec.out_features
    return nn.Sequential(*modules)


def head_tensors(
    checkpoint: Checkpoint, specs: Sequence[DenseSpec]
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of the Dense modules under the names of `build_head`, with `head.` ahead.

    Raises:
        CorruptWeights: if a file cannot be read.
    """
    for number, spec in enumerate(specs):
        for name, tensor in _tensors(checkpoint, spec).items():
            yield f"head.{number}.{name}", tensor


def _tensors(checkpoint: Checkpoint, spec: DenseSpec) -> dict[str, Tensor]:
    path = checkpoint.folder / spec.folder / DENSE_WEIGHTS
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptWeights(
            f"{path} cannot be read as safetensors ({error}); download it again"
        ) from error
