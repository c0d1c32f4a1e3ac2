"""Stored tensors become a module's weights: whose name is whose, which head is tied, what fits.

It knows key layouts and the names of the text backbone; it deliberately knows nothing of files, of
how a module computes, or of any modality: frontends bring rules for their own names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import TensorMismatch

if TYPE_CHECKING:
    from lfm2_mm.quantize.recipes import Schemes

__all__ = [
    "BACKBONE_RULES",
    "EMBEDDING",
    "HEAD",
    "HEAD_RULES",
    "PACKED",
    "Rule",
    "backbone_rules",
    "backbone_tensors",
    "claimed_tensors",
    "head_is_tied",
    "head_tensors",
    "is_part",
    "load_weights",
    "rename",
    "same_values",
    "split_experts",
    "stored_head",
    "unclaimed",
]

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PACKED = ".weight.codes"
"""How the name ends under which a packed weight's first part is stored (`lfm2_mm.quantize`)."""
_PARTS = (PACKED, ".weight.scales", ".weight.minimums")


class Rule(NamedTuple):
    """Names that begin with `stored` in a file begin with `own` in a module."""

    stored: str
    own: str


def backbone_rules(*prefixes: str) -> tuple[Rule, ...]:
    """Rules that map the text backbone, stored under any of these prefixes, to `Backbone`'s names.

    They match its three children only, so they never take another module's tensors.
    """
    children = ("embed_tokens.", "embedding_norm.", "layers.")
    return tuple(Rule(prefix + child, child) for prefix in prefixes for child in children)


BACKBONE_RULES = backbone_rules("model.language_model.", "language_model.model.", "model.", "")
"""Official vision-language files, old remote code and MLX, text models, bare `Lfm2Model`."""

HEAD_RULES = tuple(
    Rule(prefix + "lm_head.", "lm_head.") for prefix in ("", "language_model.", "model.")
)


def rename(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Own name -> stored name, for every name that a rule's prefix matches; the first rule wins.

    Raises:
        TensorMismatch: if two stored names map to the same own name.
    """
    found: dict[str, str] = {}
    for name in names:
        rule = next((rule for rule in rules if name.startswith(rule.stored)), None)
        if rule is None:
            continue
        own = rule.own + name.removeprefix(rule.stored)
        if own in found:
            raise TensorMismatch(
                f"the tensors {found[own]} and {name} both stand for {own}; "
                "use a checkpoint that stores every weight once"
            )
        found[own] = name
    return found


def is_part(name: str) -> bool:
    """Whether a name is that of a part of a packed weight."""
    return name.endswith(_PARTS)


def unclaimed(names: Iterable[str], rules: Sequence[Rule]) -> list[str]:
    """The stored names that no rule matches."""
    return [n for n in names if not any(n.startswith(rule.stored) for rule in rules)]


def claimed_tensors(checkpoint: Checkpoint, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The stored tensors that the rules claim, under the module's own names; all mapped."""
    return {own: checkpoint.tensor(name) for own, name in rename(checkpoint.names, rules).items()}


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace fused expert tensors by views of one expert each; other tensors pass through.

    `experts.gate_up_proj` `[e, 2i, h]` holds w1 above w3, `experts.down_proj` `[e, h, i]` holds w2
    (the form transformers 5 keeps in memory).

    Raises:
        TensorMismatch: if a fused tensor has another number of dimensions or an odd width.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            split[name] = tensor
            continue
        if tensor.dim() != 3 or (last == "gate_up_proj" and tensor.shape[1] % 2):
            raise TensorMismatch(
                f"the fused experts {name} have the shape {list(tensor.shape)}, not "
                "[experts, width, width] with an even first width; use a checkpoint of an LFM2-MoE"
            )
        for e, expert in enumerate(tensor):
            if last == "gate_up_proj":
                split[f"{stem}.{e}.w1.weight"], split[f"{stem}.{e}.w3.weight"] = expert.chunk(2)
            else:
                split[f"{stem}.{e}.w2.weight"] = expert
    return split


def backbone_tensors(
    checkpoint: Checkpoint, rules: Sequence[Rule] = BACKBONE_RULES
) -> dict[str, Tensor]:
    """All weights of the text backbone under `Backbone`'s names, mapped, experts one by one.

    Where only the head is stored and the config ties it, it serves as the embedding too, as in
    transformers 5.23.
    """
    tensors = split_experts(claimed_tensors(checkpoint, rules))
    if EMBEDDING not in tensors and head_is_tied(checkpoint.config, ()):
        head = rename(checkpoint.names, HEAD_RULES).get(HEAD)
        if head is not None:
            tensors[EMBEDDING] = checkpoint.tensor(head)
    return tensors


def head_is_tied(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether the embedding serves as the head, as far as the config and the stored names tell.

    At the top level of the config `tie_embedding` overrides `tie_word_embeddings`; silence means
    tied. transformers 5.23 (`PreTrainedModel.tie_weights`) keeps a stored head that differs from
    the embedding even where the config ties them, and ties one that is equal. So a head stored
    beside the embedding counts as untied here, which gives the right scores in both cases;
    `stored_head` compares the values and saves the memory. What a text section says about tying
    changes nothing in transformers, so it is not read here either.

    Args:
        config: The whole `config.json` as a dict.
        names: The stored tensor names.
    """
    heads = rename(names, HEAD_RULES)
    packed = HEAD.removesuffix(".weight") + PACKED
    stored = (EMBEDDING, EMBEDDING.removesuffix(".weight") + PACKED)
    both = (HEAD in heads or packed in heads) and any(name.endswith(stored) for name in names)
    key = "tie_embedding" if "tie_embedding" in config else "tie_word_embeddings"
    return bool(config.get(key, True)) and not both


def stored_head(
    checkpoint: Checkpoint, rules: Sequence[Rule] = BACKBONE_RULES
) -> Shaped[Tensor, "v d"] | None:
    """The head's own weight, mapped; None where the embedding serves as head.

    Raises:
        TensorMismatch: if the config asks for a head of its own and none is stored.
    """
    if head_is_tied(checkpoint.config, checkpoint.names):
        return None
    name = rename(checkpoint.names, HEAD_RULES).get(HEAD)
    if name is None:
        raise TensorMismatch(
            f"the config of {checkpoint.name} unties the output head, but no {HEAD} is stored; "
            "set tie_word_embeddings to true or use a complete checkpoint"
        )
    head = checkpoint.tensor(name)
    embedding = rename(checkpoint.names, rules).get(EMBEDDING)
    ties = head_is_tied(checkpoint.config, ())
    if ties and embedding is not None and same_values(head, checkpoint.tensor(embedding)):
        return None
    return head


def head_tensors(
    checkpoint: Checkpoint, rules: Sequence[Rule] = BACKBONE_RULES
) -> dict[str, Tensor]:
    """The head's own weight under `lm_head.…`, mapped, or its parts where it is stored packed.

    Empty where the embedding serves as head; raises as `stored_head`.
    """
    own = rename(checkpoint.names, HEAD_RULES)
    if HEAD.removesuffix(".weight") + PACKED in own:
        return {name: checkpoint.tensor(stored) for name, stored in own.items()}
    head = stored_head(checkpoint, rules)
    return {} if head is None else {HEAD: head}


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: str,
    keep_dtype: Collection[str] = ("expert_bias",),
    quantize: Schemes | None = None,
) -> None:
    """Assign tensors to a module's parameters and persistent buffers, in place.

    A tensor whose dtype and device already fit is used as it is, mapped or not; the module may
    have been built on the meta device. Parameters come out with `requires_grad=False`. Buffers
    that are not persistent are left alone, and so is a stored `inv_freq`, which is derived. Where
    weights are stored packed, or shall be packed, their layers are replaced.

    Args:
        module: What is filled.
        tensors: Own name -> tensor; any mapping, so it may make its tensors when asked.
        dtype: Number format of floating-point weights; None keeps the stored one.
        device: Where the weights shall live.
        where: What the user calls the source; used in messages.
        keep_dtype: Ends of names that are fp32 whatever `dtype` says.
        quantize: How to pack weights that are not packed yet; None leaves them.

    Raises:
        TensorMismatch: if tensors are missing, unknown or of another shape; names them.
    """
    if quantize is not None or any(name.endswith(PACKED) for name in tensors):
        from lfm2_mm.quantize.fitting import fit

        tensors = fit(module, tensors, quantize, dtype=dtype, where=where)
    wanted = {name: value for name, value in module.state_dict().items() if not is_part(name)}
    given = {
        name: tensors[name] for name in tensors if name in wanted or not name.endswith(".inv_freq")
    }
    _check_fit({name: tuple(t.shape) for name, t in wanted.items()}, given, where)
    for name, tensor in given.items():
        kind = torch.float32 if name.endswith(tuple(keep_dtype)) else dtype
        if not tensor.dtype.is_floating_point:
            kind = None
        given[name] = tensor.detach().to(device=device, dtype=kind or tensor.dtype)
    module.requires_grad_(False)
    module.load_state_dict(given, strict=True, assign=True)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and values."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _check_fit(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], where: str
) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} is {list(given[name].shape)}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    clauses = [
        _count(names, *verbs)
        for names, verbs in (
            (missing, ("is missing", "are missing")),
            (unknown, ("is unknown", "are unknown")),
            (misshapen, ("has another shape", "have another shape")),
        )
        if names
    ]
    if clauses:
        raise TensorMismatch(
            f"the weights of {where} do not fit: {'; '.join(clauses)}; "
            "use a checkpoint whose weights belong to its config.json"
        )


def _count(items: Sequence[str], one: str, many: str, shown: int = 3) -> str:
    more = ", …" if len(items) > shown else ""
    subject = f"1 tensor {one}" if len(items) == 1 else f"{len(items)} tensors {many}"
    return f"{subject} ({', '.join(items[:shown])}{more})"
