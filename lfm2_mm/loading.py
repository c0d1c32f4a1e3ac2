"""`load(name)`: a name becomes a model.

Finds the folder, asks the frontends who claims it, and lets that one build; what nobody
claims and is a text LFM2 the core builds itself. Knows no modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from lfm2_mm import settings
from lfm2_mm.backbone import Backbone
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import DENSE, SPARSE, BackboneConfig
from lfm2_mm.errors import SettingError, TensorMismatch, UnsupportedArchitecture
from lfm2_mm.frontends import frontends
from lfm2_mm.heads import TextHead
from lfm2_mm.locate import locate
from lfm2_mm.model import Model
from lfm2_mm.tokenizer import Tokenizer
from lfm2_mm.weights import (
    BACKBONE_RULES,
    HEAD_RULES,
    Rule,
    backbone_tensors,
    load_weights,
    stored_head,
    unclaimed,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoadOptions", "build_backbone", "check_claimed", "load", "text_model"]

_SMALL = 20_000_000  # below so many weights bf16 saves nothing worth its rounding
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Choices that every frontend gets.

    Attributes:
        device: Where the weights live.
        dtype: Number format of the weights and of the computation.
        extra: The frontend's own options, by name.
    """

    device: torch.device
    dtype: torch.dtype
    extra: Mapping[str, Any] = field(default_factory=dict)


def load(
    name: str | PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    revision: str | None = None,
    **extra: Any,
) -> Any:
    """Load a model by embedded name, folder or Hub id.

    Args:
        name: `nano-vl`, a local folder, or `org/name[@revision]`; None takes `LFM2_MM_MODEL` or
            the embedded default.
        device: "cpu", "cuda", "mps" or "auto".
        dtype: "float32", "bfloat16", "float16" or "auto": the stored format where this machine
            computes it natively, else fp32; fp32 for models under 20M weights.
        threads: CPU threads; by default one per physical core.
        revision: Branch, tag or commit of a Hub id.
        **extra: Options of the frontend that claims the checkpoint, for instance
            `max_image_tokens` and `max_tiles` of the vision frontend.

    Returns:
        What the claiming frontend builds; for text and vision an `lfm2_mm.Model`.

    Raises:
        ModelNotFound: if nothing has this name.
        CheckpointError: if the checkpoint is damaged or of another family.
        SettingError: if an option is unknown or has an unusable value.

    Example:
        >>> import lfm2_mm
        >>> model = lfm2_mm.load("nano-vl")                              # doctest: +SKIP
        >>> model.ask("What colour is the circle?", images=["a.png"])    # doctest: +SKIP
        'red'
    """
    wanted = None if isinstance(dtype, torch.dtype) else dtype
    resolved = settings.resolve(
        model=None if name is None else str(name), device=device, dtype=wanted, threads=threads
    )
    found = locate(name if name is not None else resolved.model, revision=revision)
    checkpoint = Checkpoint.open(found.folder, name=found.name)
    where = _device(resolved.device)
    if not isinstance(dtype, torch.dtype):
        dtype = _dtype(resolved.dtype, checkpoint, where)
    elif dtype not in _DTYPES.values():
        raise SettingError(f"the dtype is {dtype}; use one of {', '.join(_DTYPES)}")
    settings.apply_threads(resolved)
    for frontend in frontends():
        if frontend.claims(checkpoint):
            _check_options(extra, frontend.options, frontend.name)
            return frontend.load(checkpoint, LoadOptions(device=where, dtype=dtype, extra=extra))
    _check_options(extra, frozenset(), "text")
    return text_model(checkpoint, LoadOptions(device=where, dtype=dtype))


def text_model(checkpoint: Checkpoint, options: LoadOptions) -> Model:
    """Build a text LFM2, dense or sparse."""
    kind = checkpoint.config.get("model_type")
    if kind not in (DENSE, SPARSE):
        raise UnsupportedArchitecture(
            f"{checkpoint.name} has model_type {kind!r}, which no installed frontend runs; this "
            "package runs the LFM2 family (lfm2, lfm2_moe, lfm2_vl)"
        )
    check_claimed(checkpoint, (*BACKBONE_RULES, *HEAD_RULES))
    backbone, head = build_backbone(checkpoint, options)
    return Model.assemble(checkpoint, backbone, head, Tokenizer.load(checkpoint.folder))


def check_claimed(checkpoint: Checkpoint, rules: tuple[Rule, ...]) -> None:
    """Refuse a checkpoint with tensors that no rule knows.

    Raises:
        TensorMismatch: names the first few of them.
    """
    if unknown := unclaimed(checkpoint.names, rules):
        shown = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        plural = "s" if len(unknown) != 1 else ""
        raise TensorMismatch(
            f"{checkpoint.name} stores {len(unknown)} unknown tensor{plural} ({shown}); use a "
            "checkpoint whose weights belong to its config.json"
        )


def build_backbone(
    checkpoint: Checkpoint, options: LoadOptions, *, causal: bool | None = None
) -> tuple[Backbone, Tensor]:
    """The backbone with its weights, and the head's matrix `[v, d]` (the embedding when tied)."""
    config = BackboneConfig.from_dict(checkpoint.config, causal=causal)
    with torch.device("meta"):
        backbone = Backbone(config)
    load_weights(
        backbone,
        backbone_tensors(checkpoint),
        dtype=options.dtype,
        device=options.device,
        where=checkpoint.name,
    )
    head = stored_head(checkpoint)
    if head is None:
        weight: Tensor = backbone.embed_tokens.weight
    else:
        weight = head.to(device=options.device, dtype=options.dtype)
    if weight.shape != backbone.embed_tokens.weight.shape:
        raise TensorMismatch(
            f"the output head of {checkpoint.name} is {list(weight.shape)}, the config says "
            f"{list(backbone.embed_tokens.weight.shape)}; use weights that belong to the config"
        )
    return backbone.eval(), weight


def text_head(backbone: Backbone, weight: Tensor, checkpoint: Checkpoint) -> TextHead:
    """The text head, ended by every id that the config or `generation_config.json` names."""
    ends = set(backbone.config.eos_ids)
    more = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    ends |= set(more) if isinstance(more, list) else {more} if isinstance(more, int) else set()
    return TextHead(backbone, weight, sorted(ends))


def _check_options(extra: Mapping[str, Any], allowed: frozenset[str], frontend: str) -> None:
    for name in extra:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise SettingError(
                f"{frontend} models have no option {name!r}; the options beyond device, dtype, "
                f"threads and revision are: {known}"
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable[name]:
        raise SettingError(
            f"the device {name!r} is not available to torch {torch.__version__}; use device 'cpu' "
            "or install a torch build for it"
        )
    return torch.device(name)


def _dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if not checkpoint.names:
        return torch.float32
    stored = checkpoint.dtype(max(checkpoint.names, key=lambda n: prod(checkpoint.shape(n))))
    small = checkpoint.nbytes // stored.itemsize < _SMALL
    if small or stored not in _DTYPES.values() or (device.type == "cpu" and not _cpu_has(stored)):
        return torch.float32
    return stored


def _cpu_has(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies this format natively."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
