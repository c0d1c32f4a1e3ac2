"""Stored names of an LFM2-Audio: which prefix in a file means which of our modules, and back.

Released files store tied weights twice, counters, constants and an audio head that nothing reads;
all may be there or not. Knows names and shapes only; no module and no file beyond their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lfm2_mm.errors import TensorMismatch
from lfm2_mm.weights import Rule, backbone_rules, rename, same_values, unclaimed

if TYPE_CHECKING:
    from lfm2_mm.checkpoint import Checkpoint

__all__ = [
    "ADAPTER",
    "AUDIO_EMBEDDING",
    "BACKBONE",
    "CONFORMER",
    "DEPTHFORMER",
    "LFM_RULES",
    "RULES",
    "check_names",
    "official_state",
    "part_tensors",
]

BACKBONE, CONFORMER, ADAPTER = "lfm.", "conformer.", "audio_adapter."
AUDIO_EMBEDDING = "audio_embedding."
DEPTHFORMER = ""
"""The part that is stored under three prefixes of its own: the depthformer and what is around."""

LFM_RULES = backbone_rules(BACKBONE)

RULES: dict[str, tuple[Rule, ...]] = {
    CONFORMER: (Rule(CONFORMER, ""),),
    ADAPTER: (Rule(ADAPTER, ""),),
    AUDIO_EMBEDDING: (Rule(AUDIO_EMBEDDING, ""),),
    DEPTHFORMER: tuple(
        Rule(prefix, prefix) for prefix in ("depth_linear.", "depthformer.", "depth_embeddings.")
    ),
}
"""Part -> whose tensors are whose; beside the backbone's `LFM_RULES`."""

_ALL_RULES = (*LFM_RULES, *(rule for rules in RULES.values() for rule in rules))

# What files hold and nothing reads: the audio head, constants, tables, counters.
_UNREAD = (
    "conformer.pos_enc.",
    "audio_embedding.embedding_norm.",
    "audio_embedding.to_logits.",
    "audio_loss_weights",
    "codebook_offsets",
)
_COUNTER = ".num_batches_tracked"
_COPY, _TABLE = ".to_logits.weight", ".embedding.weight"
_ONE_TAP = (".pointwise_conv1.weight", ".pointwise_conv2.weight")


def check_names(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors that belong to no part of an LFM2-Audio.

    Raises:
        TensorMismatch: names the first few of them.
    """
    if unknown := unclaimed(_read(checkpoint.names), _ALL_RULES):
        shown = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        plural = "s" if len(unknown) != 1 else ""
        raise TensorMismatch(
            f"{checkpoint.name} stores {len(unknown)} unknown tensor{plural} ({shown}); use a "
            "checkpoint whose weights belong to its config.json"
        )


def part_tensors(checkpoint: Checkpoint, part: str, *, tied: bool = False) -> dict[str, Tensor]:
    """The stored tensors of one part, under the part's own names, mapped.

    What nothing reads is left out. The products of the conformer's convolution modules, stored as
    convolutions of one tap `[w, c, 1]`, come as matrices `[w, c]`.

    Args:
        checkpoint: Where they are stored.
        part: A prefix: `CONFORMER`, `ADAPTER`, …
        tied: Whether output matrices of codebooks are their embeddings: stored copies are left out.

    Raises:
        TensorMismatch: if a copy differs from its embedding.
    """
    names = rename(_read(checkpoint.names), RULES[part])
    tensors: dict[str, Tensor] = {}
    for own, stored in names.items():
        twin = stored.removesuffix(_COPY) + _TABLE
        if tied and stored.endswith(_COPY) and twin in names.values():
            if not same_values(checkpoint.tensor(stored), checkpoint.tensor(twin)):
                raise TensorMismatch(
                    f"{checkpoint.name} stores {stored} with other values than {twin}, but its "
                    "config ties them; set depthformer.tie to false or use an unchanged checkpoint"
                )
            continue
        tensor = checkpoint.tensor(stored)
        if stored.endswith(_ONE_TAP) and tensor.dim() == 3 and tensor.shape[2] == 1:
            tensor = tensor[:, :, 0]
        tensors[own] = tensor
    return tensors


def official_state(
    backbone: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of a model under the official names; tied copies and counters left out.

    Args:
        backbone: `state_dict` of the backbone.
        parts: Key of `RULES` -> `state_dict` of that part.
    """
    state = {BACKBONE + name: tensor for name, tensor in backbone.items()}
    for prefix, tensors in parts.items():
        for name, tensor in tensors.items():
            one_tap = name.endswith(_ONE_TAP) and tensor.dim() == 2
            state[prefix + name] = tensor[:, :, None] if one_tap else tensor
    return state


def _read(names: Iterable[str]) -> list[str]:
    return [n for n in names if not n.startswith(_UNREAD) and not n.endswith(_COUNTER)]
