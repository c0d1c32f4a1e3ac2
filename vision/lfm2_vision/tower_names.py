"""The names of a SigLIP2 tower in files of transformers, timm and open_clip.

Recognises which of them saved a state dict, by its names alone; knows no tensor and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lfm2_mm.errors import TensorMismatch, UnsupportedArchitecture
from lfm2_vision.config import TowerConfig
from lfm2_vision.encoder import Siglip2Tower
from lfm2_vision.weights import TOWER_RULES

__all__ = ["FC1", "PATCH", "TABLE", "TowerLayout", "parameter_shapes", "refuse", "tower_layout"]

PATCH = "embeddings.patch_embedding.weight"
TABLE = "embeddings.position_embedding.weight"
FC1 = "encoder.layers.0.mlp.fc1.weight"
_PREFIXES = (
    "visual.trunk.",
    "trunk.",
    *(rule.stored for rule in TOWER_RULES),
    "vision_model.",
    "",
)


class _Family(NamedTuple):
    """How one package names the parts: pieces of our names and what stands for them."""

    name: str
    pieces: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]

    def stored(self, own: str) -> str:
        """The stored name of one of our parameters; q, k and v may share one."""
        for ours, theirs in self.pieces:
            own = own.replace(ours, theirs)
        return own


_TIMM = (
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.out_proj.", ".attn.proj."),
    *((f".self_attn.{part}_proj.", ".attn.qkv.") for part in "qkv"),
    ("post_layernorm.", "norm."),
)
_FAMILIES = (
    _Family("transformers", (), ("head.", "embeddings.position_ids")),
    _Family(
        "timm NaFlex",
        (
            ("embeddings.patch_embedding.", "embeds.proj."),
            (TABLE, "embeds.pos_embed"),
            *_TIMM,
        ),
        ("attn_pool.", "head."),
    ),
    _Family(
        "timm fixed-resolution",
        (("embeddings.patch_embedding.", "patch_embed.proj."), (TABLE, "pos_embed"), *_TIMM),
        ("attn_pool.", "head."),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerLayout:
    """Where a tower lies in a state dict.

    Attributes:
        family: "transformers", "timm NaFlex" or "timm fixed-resolution"; open_clip's is timm's.
        prefix: What stands before the tower's names.
        n_layers: Depth of the tower.
        stored: Our parameter name -> stored name, for every parameter of the tower.
        dropped: Stored names that the tower has and ours does not: the pooling or class head.
        others: Stored names of other parts, such as a text tower; they are not read.
    """

    family: str
    prefix: str
    n_layers: int
    stored: Mapping[str, str]
    dropped: tuple[str, ...]
    others: tuple[str, ...]


def tower_layout(names: Iterable[str], *, where: str = "the state dict") -> TowerLayout:
    """Recognise the layout of a state dict by its names.

    Args:
        names: All stored names.
        where: What the user calls the source; used in messages.

    Raises:
        UnsupportedArchitecture: if the names are no SigLIP2 tower's.
        TensorMismatch: if tensors of the tower are missing or unknown; names them as stored.
    """
    known = set(names)
    found = next(
        (
            (family, prefix)
            for prefix in _PREFIXES
            for family in _FAMILIES
            if {prefix + family.stored(name) for name in (PATCH, TABLE)} & known
            and _layers(known, prefix + family.stored("encoder.layers."))
        ),
        None,
    )
    if found is None:
        first = f", the first {min(known)!r}" if known else ""
        raise UnsupportedArchitecture(
            f"{where} holds no SigLIP2 vision tower as transformers, timm or open_clip save it "
            f"({len(known)} tensors{first}); use a SigLIP2 checkpoint of one of them"
        )
    family, prefix = found
    depth = _layers(known, prefix + family.stored("encoder.layers."))
    stored = {
        own: prefix + family.stored(own) for own in parameter_shapes(TowerConfig(n_layers=depth))
    }
    inside = {name for name in known if name.startswith(prefix)}
    dropped = {name for name in inside if name.removeprefix(prefix).startswith(family.dropped)}
    missing = sorted(set(stored.values()) - known)
    unknown = sorted(inside - dropped - set(stored.values()))
    refuse(where, [("missing", missing), ("unknown", unknown)])
    return TowerLayout(
        family=family.name,
        prefix=prefix,
        n_layers=depth,
        stored=stored,
        dropped=tuple(sorted(dropped)),
        others=tuple(sorted(known - inside)),
    )


def _layers(names: Iterable[str], start: str) -> int:
    """How many different indices follow `start`."""
    indices = {n.removeprefix(start).split(".")[0] for n in names if n.startswith(start)}
    return sum(index.isdecimal() for index in indices)


def parameter_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `Siglip2Tower`."""
    with torch.device("meta"):
        state = Siglip2Tower(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def refuse(where: str, findings: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise a TensorMismatch that counts and names what was found, if anything was.

    Args:
        where: What the user calls the source.
        findings: What is wrong with tensors, and which they are.
    """
    clauses = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in findings
        if names
    ]
    if clauses:
        raise TensorMismatch(
            f"the tensors of the vision tower in {where} are not those of a SigLIP2 tower: "
            f"{', '.join(clauses)}; use a complete SigLIP2 checkpoint of transformers, timm or "
            "open_clip"
        )
