"""The files beside a retriever's weights become a `RetrieverSpec`: PyLate's and ST's layouts, read.

Class names in `modules.json` and activations map through an allow-list onto our own code; nothing
is imported by name and no pickle is opened. Knows files and rules; deliberately imports no torch
and knows nothing of how anything is computed.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lfm2_mm.errors import CheckpointError, CorruptWeights, UnsupportedArchitecture

__all__ = [
    "ACTIVATIONS",
    "DENSE_WEIGHTS",
    "MODULES",
    "DenseSpec",
    "Expansion",
    "RetrieverSpec",
    "is_bidirectional",
    "is_retriever",
    "read_spec",
]

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
DENSE_WEIGHTS = "model.safetensors"

Kind = Literal["late-interaction", "dense"]

# Class name in modules.json -> what it is here. Only names below these packages count.
_PACKAGES = ("sentence_transformers", "pylate")
_ROLES = {
    "Transformer": "transformer",
    "Dense": "dense",
    "Pooling": "pooling",
    "Normalize": "normalize",
    "MultiVectorMask": "mask",
}
_POOLING = ("cls", "mean", "lasttoken")
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
ACTIVATIONS = frozenset({"GELU", "Identity", "ReLU", "SiLU", "Sigmoid", "Tanh"})
"""Names of `torch.nn` activations that a Dense module may ask for."""

_JSON_LIMIT = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """One Dense module: `activation(W x + b)`, plus `x` (projected where sizes differ) if residual.

    Attributes:
        folder: Its folder below the checkpoint, for instance `1_Dense`.
        activation: A name of `ACTIVATIONS`.
    """

    folder: str
    in_features: int
    out_features: int
    bias: bool = False
    activation: str = "Identity"
    residual: bool = False


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """How queries are filled up with further tokens, whose vectors are scored too.

    Attributes:
        length: Tokens in all, special tokens and prefix included.
        attend: Whether the other positions attend to the filling.
        token: The token filled in; None for mask, else end, else padding token.
        cut: Whether longer queries are cut to `length` (PyLate's way).
    """

    length: int = 32
    attend: bool = False
    token: str | None = None
    cut: bool = True


@dataclass(frozen=True, kw_only=True)
class RetrieverSpec:
    """All that a retriever's side files say.

    Attributes:
        kind: One vector per token, or one per text.
        dense: Modules behind the backbone, in order.
        pooling: How a dense retriever makes one vector: "cls", "mean" or "lasttoken".
        query_prefix: One added token behind the begin token; "" for none. Likewise for documents.
        query_prompt: Text put in front of the query before it is tokenized; likewise.
        query_length: Most tokens of a query, special tokens and prefix included; None: no limit
            but the context. Likewise for documents.
        expansion: How queries are filled up; None if they are not.
        skiplist: Tokens of documents whose vectors are dropped.
        lower_case: Whether texts are lower-cased first.
        bidirectional: Whether attention and convolutions see both sides.
        settings: `config_sentence_transformers.json` as it was, for saving.
    """

    kind: Kind = "late-interaction"
    dense: tuple[DenseSpec, ...] = ()
    pooling: str | None = None
    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_prompt: str = ""
    document_prompt: str = ""
    query_length: int | None = 32
    document_length: int | None = 180
    expansion: Expansion | None = field(default_factory=Expansion)
    skiplist: tuple[str, ...] = tuple(string.punctuation)
    lower_case: bool = False
    bidirectional: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


def is_retriever(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds an LFM2 in the layout of sentence-transformers or PyLate."""
    return config.get("model_type") in ("lfm2", "lfm2_moe") and (folder / MODULES).is_file()


def is_bidirectional(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes the encoder that sees both sides.

    LFM2.5 retrievers keep `model_type` `lfm2` and say it by the name of their architecture,
    `Lfm2BidirectionalModel`; what we save says `is_causal: false` too.
    """
    if "is_causal" in config:
        return not config["is_causal"]
    return any("Bidir" in str(name) for name in config.get("architectures") or ())


def read_spec(folder: Path | str, config: Mapping[str, Any], *, name: str = "") -> RetrieverSpec:
    """Read the side files of a retriever.

    Keys that PyLate leaves out have its defaults: `"[Q] "`, `"[D] "`, 32, 180, punctuation skipped,
    expansion on. Source: `pylate/models/colbert.py` 1.6 and `MultiVectorEncoder` of
    sentence-transformers 6.2.

    Args:
        folder: The checkpoint.
        config: Its `config.json`.
        name: What the user calls it; used in messages.

    Raises:
        UnsupportedArchitecture: if it asks for a module, pooling or activation not known here.
        CorruptWeights: if a Dense module has only pickled weights, or none.
        CheckpointError: if a file is damaged.
    """
    folder = Path(folder)
    name = name or str(folder)
    try:
        return _read(folder, config, name)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the retriever settings of {name} hold a value of the wrong kind ({error!r}); "
            "download the checkpoint again"
        ) from error


def _read(folder: Path, config: Mapping[str, Any], name: str) -> RetrieverSpec:
    modules = _modules(folder, name)
    settings = _object(folder / SETTINGS)
    transformer = _object(folder / _inside(modules[0][1], name) / TRANSFORMER_SETTINGS)
    roles = [role for role, _ in modules]
    dense = tuple(_dense(folder, path, name) for role, path in modules if role == "dense")
    prompts = {str(k): str(v or "") for k, v in (settings.get("prompts") or {}).items()}
    default = prompts.get(str(settings.get("default_prompt_name")), "")
    common: dict[str, Any] = {
        "dense": dense,
        "lower_case": bool(transformer.get("do_lower_case", False)),
        "bidirectional": is_bidirectional(config),
        "settings": settings,
        "query_prompt": prompts.get("query", default),
        "document_prompt": prompts.get(
            "document", prompts.get("passage", prompts.get("corpus", default))
        ),
    }
    if "pooling" in roles:
        if "dense" in roles[: roles.index("pooling")]:
            raise UnsupportedArchitecture(
                f"{name} has a Dense module before its Pooling in {MODULES}, which is not "
                "supported; use a checkpoint that pools first"
            )
        pooling = _object(folder / _inside(modules[roles.index("pooling")][1], name, "config.json"))
        limit = transformer.get("max_seq_length")
        return RetrieverSpec(
            **common,
            kind="dense",
            pooling=_pooling(pooling, name),
            query_prefix="",
            document_prefix="",
            query_length=_length(limit, "max_seq_length", name),
            document_length=_length(limit, "max_seq_length", name),
            expansion=None,
            skiplist=(),
        )
    if "mask" in roles:
        mask = _object(folder / _inside(modules[roles.index("mask")][1], name, "config.json"))
        return RetrieverSpec(**common, **_native(transformer, mask, name))
    return RetrieverSpec(**_pylate(settings, common, name))


def _pylate(settings: Mapping[str, Any], common: dict[str, Any], name: str) -> dict[str, Any]:
    """PyLate's flat keys; the prefix is a token of its own, ahead of any prompt."""

    def get(key: str, default: Any) -> Any:
        value = settings.get(key)
        return default if value is None else value

    query_length = _length(get("query_length", 32), "query_length", name)
    expand = bool(get("do_query_expansion", True))
    attend = get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    prefixes = {side: str(get(f"{side}_prefix", mark)) for side, mark in _MARKS.items()}
    prompts = {
        f"{side}_prompt": common[f"{side}_prompt"].removeprefix(prefix)
        for side, prefix in prefixes.items()
    }
    return {
        **common,
        **prompts,
        "query_prefix": prefixes["query"],
        "document_prefix": prefixes["document"],
        "query_length": query_length,
        "document_length": _length(get("document_length", 180), "document_length", name),
        "expansion": Expansion(length=query_length or 32, attend=bool(attend)) if expand else None,
        "skiplist": tuple(map(str, get("skiplist_words", string.punctuation))),
    }


_MARKS = {"query": "[Q] ", "document": "[D] "}


def _native(transformer: Mapping[str, Any], mask: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of a `MultiVectorEncoder`; its prefixes are prompts."""
    tasks = mask.get("skiplist_tasks") or ["document"]
    if list(tasks) != ["document"] or mask.get("keep_only_token_ids"):
        raise UnsupportedArchitecture(
            f"{name} masks tokens of {list(tasks)} by words and ids, but only a skiplist of "
            "document tokens is supported; use a text retriever in PyLate's layout"
        )
    said = transformer.get("query_expansion")
    limit = transformer.get("max_seq_length")
    expansion = None
    if said:
        expansion = Expansion(
            length=_length(said["length"], "query_expansion.length", name) or 32,
            attend=bool(said.get("attend", False)),
            token=said.get("token"),
            cut=said.get("strategy", "fixed") == "fixed",
        )
    return {
        "query_prefix": "",
        "document_prefix": "",
        "query_length": _length(transformer.get("query_length", limit), "query_length", name),
        "document_length": _length(
            transformer.get("document_length", limit), "document_length", name
        ),
        "expansion": expansion,
        "skiplist": tuple(map(str, mask.get("skiplist_words") or ())),
    }


def _modules(folder: Path, name: str) -> list[tuple[str, str]]:
    """(role, folder) of each module, the transformer first."""
    listed = _json(folder / MODULES)
    if not isinstance(listed, list) or not listed:
        raise CheckpointError(
            f"{folder / MODULES} holds no list of modules; download the checkpoint again"
        )
    found = []
    for entry in listed:
        reference = str(entry["type"])
        parts = reference.split(".")
        role = _ROLES.get(parts[-1]) if parts[0] in _PACKAGES else None
        if role is None:
            raise UnsupportedArchitecture(
                f"{name} asks for the module {reference!r} in {MODULES}, which is not on the list "
                f"of supported ones ({', '.join(_ROLES)}); no code named by a checkpoint is run"
            )
        found.append((role, str(entry.get("path", ""))))
    if [role for role, _ in found].count("transformer") != 1 or found[0][0] != "transformer":
        raise UnsupportedArchitecture(
            f"{name} has the modules {[role for role, _ in found]} in {MODULES}; a retriever has "
            "exactly one Transformer, and it comes first"
        )
    return found


def _dense(folder: Path, path: str, name: str) -> DenseSpec:
    path = _inside(path, name)
    said = _object(folder / path / "config.json")
    default = "torch.nn.modules.linear.Identity"
    reference = str(said.get("activation_function") or default)
    parts = reference.split(".")
    if parts[:2] != ["torch", "nn"] or parts[-1] not in ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"the Dense module {path} of {name} asks for the activation {reference!r}, which is "
            f"not on the list of supported ones ({', '.join(sorted(ACTIVATIONS))}); no code named "
            "by a checkpoint is run"
        )
    if not (folder / path / DENSE_WEIGHTS).is_file():
        pickled = (folder / path / "pytorch_model.bin").is_file()
        seen = (
            "only as pytorch_model.bin, a pickle format that can run code when opened and is "
            "never read here; convert it to safetensors or ask its author to"
            if pickled
            else f"nowhere: {DENSE_WEIGHTS} is missing; download the checkpoint again"
        )
        raise CorruptWeights(f"{name} stores the weights of {path} {seen}")
    return DenseSpec(
        folder=path,
        in_features=int(said["in_features"]),
        out_features=int(said["out_features"]),
        bias=bool(said.get("bias", True)),
        activation=parts[-1],
        residual=bool(said.get("use_residual", False)),
    )


def _pooling(said: Mapping[str, Any], name: str) -> str:
    mode = said.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    if not modes:
        modes = [own for key, own in _LEGACY_POOLING.items() if said.get(key)] or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLING or not said.get("include_prompt", True):
        raise UnsupportedArchitecture(
            f"{name} pools by {' + '.join(map(str, modes))}"
            f"{'' if said.get('include_prompt', True) else ' without the prompt'}, which is not "
            f"supported; use a checkpoint that pools by one of {', '.join(_POOLING)}"
        )
    return str(modes[0])


def _length(value: Any, key: str, name: str) -> int | None:
    if value is None:
        return None
    number = int(value)
    if not 4 <= number <= 1_000_000:
        raise CheckpointError(
            f"the settings of {name} give {key} = {number}; it must be between 4 and 1000000"
        )
    return number


def _inside(path: str, name: str, file: str = "") -> str:
    """A module's folder, which must lie inside the checkpoint."""
    inside = PurePosixPath(path)
    if inside.is_absolute() or ".." in inside.parts or "\\" in path or ":" in path:
        raise CheckpointError(
            f"{name} places a module at {path!r} outside its folder; "
            "use a checkpoint from a source you trust"
        )
    return str(inside / file) if file else path.rstrip("/")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    value = _json(path)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}, not an object; "
            "download the checkpoint again"
        )
    return value


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"over {_JSON_LIMIT} bytes")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}); download the checkpoint again"
        ) from error
