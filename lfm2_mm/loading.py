"""`load(name)`: a name becomes a model.

Finds the folder, asks the frontends who claims it, and lets that one build; what nobody
claims and is a text LFM2 the core builds itself. Knows no modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lfm2_mm import settings
from lfm2_mm.backbone import Backbone
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import DENSE, SPARSE, BackboneConfig
from lfm2_mm.errors import (
    CheckpointError,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
)
from lfm2_mm.frontends import Frontend, frontends
from lfm2_mm.heads import TextHead
from lfm2_mm.locate import Located, locate
from lfm2_mm.model import Model
from lfm2_mm.tokenizer import Tokenizer
from lfm2_mm.weights import (
    BACKBONE_RULES,
    HEAD,
    HEAD_RULES,
    Rule,
    backbone_tensors,
    head_tensors,
    load_weights,
    unclaimed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_mm.quantize.layers import Packed
    from lfm2_mm.quantize.recipes import Recipe, Schemes

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
        quantize: How weights are packed while they are loaded; None takes them as they are.
    """

    device: torch.device
    dtype: torch.dtype
    extra: Mapping[str, Any] = field(default_factory=dict)
    quantize: Recipe | None = None

    @property
    def backbone_schemes(self) -> Schemes | None:
        """For `load_weights(quantize=)` of a text backbone."""
        return None if self.quantize is None else self.quantize.backbone

    @property
    def encoder_schemes(self) -> Schemes | None:
        """For `load_weights(quantize=)` of any other module."""
        return None if self.quantize is None else self.quantize.encoder


def load(
    name: str | PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    kv_cache_dtype: str | None = None,
    keep_packed: bool = False,
    progress: Callable[[str], None] | None = None,
    **extra: Any,
) -> Any:
    """Load a model by embedded name, folder or Hub id.

    Args:
        name: `nano-vl`, a local folder or GGUF file, or `org/name[@revision]`; None takes
            `LFM2_MM_MODEL` or the embedded default.
        device: "cpu", "cuda", "mps" or "auto".
        dtype: "float32", "bfloat16", "float16" or "auto": the stored format where this machine
            computes it natively, else fp32; fp32 for models under 20M weights.
        threads: CPU threads; by default one per physical core.
        revision: Branch, tag or commit of a Hub id.
        quantize: "int4" or "int8" packs the weights while they are loaded, which takes seconds to
            minutes (`lfm2-mm quantize` keeps the result); "none" and None take them as they are.
            Packed models compute in fp32 unless `dtype` says otherwise.
        kv_cache_dtype: "int8" keeps keys and values of earlier positions in bytes, a quarter of
            fp32's memory; "auto" and None keep them in the dtype. Models that keep none, as
            retrievers, take no notice.
        keep_packed: Keep what `quantize` packed in the user's cache folder, so that later calls
            with the same choices load it from there in a moment; packed anew when the original's
            files have changed. GGUF files are not kept.
        progress: Told the name of every weight that was packed.
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
        model=None if name is None else str(name),
        device=device,
        dtype=wanted,
        threads=threads,
        quantize=quantize,
        kv_cache_dtype=kv_cache_dtype,
    )
    found = locate(name if name is not None else resolved.model, revision=revision)
    checkpoint = _open(found)
    where = _device(resolved.device)
    recipe = _recipe(resolved.quantize, checkpoint, where, progress)
    if not isinstance(dtype, torch.dtype):
        small = recipe is not None and resolved.dtype == "auto"
        dtype = torch.float32 if small else _dtype(resolved.dtype, checkpoint, where)
    elif dtype not in _DTYPES.values():
        raise SettingError(f"the dtype is {dtype}; use one of {', '.join(_DTYPES)}")
    settings.apply_threads(resolved)
    options = LoadOptions(device=where, dtype=dtype, extra=extra, quantize=recipe)
    folder = found.folder.is_dir()
    build = _kept if keep_packed and folder and recipe is not None else _built
    model = build(checkpoint, options, frontends() if folder else ())
    engine = getattr(model, "engine", None)  # of models that generate
    if engine is not None:
        engine.kv_cache_dtype = resolved.kv_cache_dtype
    return model


def _built(checkpoint: Checkpoint, options: LoadOptions, claimants: Sequence[Frontend]) -> Any:
    """What the frontend that claims a checkpoint makes of it; nobody's is a text model."""
    for frontend in claimants:
        if frontend.claims(checkpoint):
            _check_options(options.extra, frontend.options, frontend.name)
            return frontend.load(checkpoint, options)
    _check_options(options.extra, frozenset(), "text")
    return text_model(checkpoint, options)


def _kept(checkpoint: Checkpoint, options: LoadOptions, claimants: Sequence[Frontend]) -> Any:
    """The same from its packed copy, which is made where there is none that is whole."""
    from lfm2_mm.quantize.kept import forget, keep, kept_folder

    assert options.quantize is not None
    kind = str(options.dtype)
    copy = kept_folder(checkpoint.folder, options.quantize.name, kind, options.extra)
    packed = replace(options, quantize=None)
    if copy.is_dir():
        try:
            return _built(Checkpoint.open(copy, name=checkpoint.name), packed, claimants)
        except CheckpointError:
            forget(copy)
    model = _built(checkpoint, options, claimants)
    if not keep(model, copy):
        return model
    return _built(Checkpoint.open(copy, name=checkpoint.name), packed, claimants)


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
    return Model.assemble(checkpoint, backbone, head, _tokenizer(checkpoint))


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
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    causal: bool | None = None,
    rules: Sequence[Rule] = BACKBONE_RULES,
) -> tuple[Backbone, Tensor | Packed]:
    """The backbone with its weights, and the head's matrix `[v, d]` (the embedding when tied)."""
    config = BackboneConfig.from_dict(checkpoint.config, causal=causal)
    with torch.device("meta"):
        backbone = Backbone(config)
    load_weights(
        backbone,
        backbone_tensors(checkpoint, rules),
        dtype=options.dtype,
        device=options.device,
        where=checkpoint.name,
        quantize=options.backbone_schemes,
    )
    embedding: Tensor | Packed = backbone.embed_tokens.weight
    tensors = head_tensors(checkpoint, rules)
    if not tensors:
        return backbone.eval(), embedding
    stored = tensors.get(HEAD)
    if stored is not None and stored.shape != embedding.shape:
        raise TensorMismatch(
            f"the output head of {checkpoint.name} is {list(stored.shape)}, the config says "
            f"{list(embedding.shape)}; use weights that belong to the config"
        )
    with torch.device("meta"):
        own = nn.ModuleDict({"lm_head": nn.Linear(config.hidden_size, config.vocab_size, False)})
    schemes = options.backbone_schemes
    load_weights(
        own,
        tensors,
        dtype=options.dtype,
        device=options.device,
        where=checkpoint.name,
        quantize=None if schemes is None else replace(schemes, linear=schemes.embedding),
    )
    head: Any = own["lm_head"].weight
    return backbone.eval(), head


def text_head(backbone: Backbone, weight: Tensor | Packed, checkpoint: Checkpoint) -> TextHead:
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
                f"threads, quantize, kv_cache_dtype, keep_packed and revision are: {known}"
            )


def _open(found: Located) -> Checkpoint:
    if found.folder.is_dir():
        return Checkpoint.open(found.folder, name=found.name)
    from lfm2_mm.quantize.gguf import GgufCheckpoint

    return GgufCheckpoint.open(found.folder, name=found.name)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    own: Tokenizer | None = getattr(checkpoint, "tokenizer", None)
    return Tokenizer.load(checkpoint.folder) if own is None else own


def _recipe(
    name: str, checkpoint: Checkpoint, device: torch.device, progress: Callable[[str], None] | None
) -> Recipe | None:
    """How to pack what is loaded; None where that was not asked for, or is done already."""
    from lfm2_mm.quantize.files import GGUF_RECIPE, packed_as
    from lfm2_mm.quantize.recipes import recipe

    done = packed_as(checkpoint.config, checkpoint.name)
    if done is None and name == "none":
        return None
    if device.type != "cpu":
        raise SettingError(
            f"packed weights are for the CPU, but the device is {device.type}; use device 'cpu', "
            "or load the model as it is"
        )
    if done is None:
        return recipe(name).reporting(progress)
    if done == GGUF_RECIPE and name == "none":  # what is of another type than Q4_0 and Q8_0
        return recipe("int8").reporting(progress)
    if name not in ("none", done):
        raise SettingError(
            f"{checkpoint.name} is packed as {done} already, so it cannot be packed as {name}; use "
            "the checkpoint it was made of"
        )
    return None


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
