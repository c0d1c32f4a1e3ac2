"""A retriever is written in the layout that PyLate and sentence-transformers load.

A bidirectional one takes along a small model file, since `transformers` has only the causal one:
those libraries then want `trust_remote_code=True`, as for the official checkpoint. Knows names and
files; deliberately nothing of encoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.saving import save_checkpoint
from lfm2_retrieval.layout import DENSE_WEIGHTS, DenseSpec, RetrieverSpec

if TYPE_CHECKING:
    from lfm2_retrieval.encoder import Encoder

__all__ = ["save_retriever", "side_files"]

_REMOTE = "modeling_lfm2_bidirectional"
_TRANSFORMER = "sentence_transformers.models.Transformer"


def save_retriever(
    folder: Path | str, encoder: Encoder, *, extra_files: Mapping[str, str | bytes] | None = None
) -> None:
    """Write an encoder: weights in their number format, rules, tokenizer.

    Args:
        folder: Where to write; missing, empty, or an older checkpoint.
        encoder: What to write; its `folder` gives the tokenizer files.
        extra_files: Further files, relative name -> content (a model card, a licence).

    Raises:
        InputError: if the folder holds something else, the encoder has no tokenizer files, or its
            rules cannot be said in this layout.
        CheckpointError: if writing fails.
    """
    if encoder.folder is None:
        raise InputError(
            f"the encoder {encoder.name} has no folder with tokenizer files; build it with folder="
        )
    spec = _portable(encoder)
    dense = [module.state_dict() for module in encoder.head]
    weight = encoder.backbone.embed_tokens.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    save_checkpoint(
        folder,
        encoder.backbone.state_dict(),  # the names of a bare `Lfm2Model` are ours
        {**_config(encoder), **_architecture(spec), "dtype": dtype},
        copy_from=encoder.folder,
        extra_files={
            **side_files(spec, dense, hidden=encoder.backbone.config.hidden_size),
            **_tokenizer_config(encoder.folder),
            **(extra_files or {}),
        },
    )


def side_files(
    spec: RetrieverSpec, dense: list[dict[str, Tensor]], *, hidden: int
) -> dict[str, str | bytes]:
    """All files of the layout beside config, backbone and tokenizer: relative name -> content.

    Args:
        spec: The rules.
        dense: The state of each Dense module.
        hidden: Width of the backbone.
    """
    modules = [_module(0, "", _TRANSFORMER)]
    files: dict[str, str | bytes] = {}
    if spec.kind == "dense":
        modules.append(_module(1, "1_Pooling", "sentence_transformers.models.Pooling"))
        files["1_Pooling/config.json"] = _dump(
            {
                "word_embedding_dimension": hidden,
                "pooling_mode_cls_token": spec.pooling == "cls",
                "pooling_mode_mean_tokens": spec.pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
                "pooling_mode_weightedmean_tokens": False,
                "pooling_mode_lasttoken": spec.pooling == "lasttoken",
                "include_prompt": True,
            }
        )
    own = "sentence_transformers.models.Dense" if spec.kind == "dense" else "pylate.models.Dense"
    for module, state in zip(spec.dense, dense, strict=True):
        path = f"{len(modules)}_Dense"
        modules.append(_module(len(modules), path, f"{own}.Dense"))
        files[f"{path}/config.json"] = _dump(_dense(module))
        files[f"{path}/{DENSE_WEIGHTS}"] = save({k: v.contiguous() for k, v in state.items()})
    if spec.kind == "dense":
        path = f"{len(modules)}_Normalize"
        modules.append(_module(len(modules), path, "sentence_transformers.models.Normalize"))
        files[f"{path}/config.json"] = _dump({})
    longest = spec.document_length
    if longest is not None and spec.kind == "late-interaction":
        longest -= bool(spec.document_prefix)
    files["modules.json"] = _dump(modules)
    files["sentence_bert_config.json"] = _dump(
        {"max_seq_length": longest, "do_lower_case": spec.lower_case}
    )
    files["config_sentence_transformers.json"] = _dump(_settings(spec))
    if spec.bidirectional:
        source = resources.files("lfm2_retrieval").joinpath("remote_model.py")
        files[f"{_REMOTE}.py"] = source.read_text(encoding="utf-8")
    return files


def _config(encoder: Encoder) -> dict[str, Any]:
    """The encoder's own; where weights are packed, it says of which model."""
    from lfm2_retrieval.encoder import PACKED_FROM

    config = {key: value for key, value in encoder.config.items() if key != PACKED_FROM}
    return {**config, PACKED_FROM: encoder.origin} if encoder.packed else config


def _settings(spec: RetrieverSpec) -> dict[str, Any]:
    """`config_sentence_transformers.json`; what was read and is not ours to say stays."""
    common = {
        **spec.settings,
        "prompts": {
            **(spec.settings.get("prompts") or {}),
            "query": spec.query_prompt,
            "document": spec.document_prompt,
        },
        "default_prompt_name": spec.settings.get("default_prompt_name"),
    }
    if spec.kind == "dense":
        return {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", **common}
    return {
        **common,
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "query_prefix": spec.query_prefix,
        "document_prefix": spec.document_prefix,
        "query_length": spec.expansion.length if spec.expansion else spec.query_length,
        "document_length": spec.document_length,
        "attend_to_expansion_tokens": bool(spec.expansion and spec.expansion.attend),
        "skiplist_words": list(spec.skiplist),
        "do_query_expansion": spec.expansion is not None,
    }


def _portable(encoder: Encoder) -> RetrieverSpec:
    """The spec in PyLate's terms: a prompt that is one added token becomes the prefix it is."""
    from dataclasses import replace

    spec = encoder.spec
    if spec.kind == "dense":
        return spec
    if spec.expansion and (spec.expansion.token is not None or not spec.expansion.cut):
        raise InputError(
            f"the query expansion of {encoder.name} ({spec.expansion}) cannot be said in PyLate's "
            "layout; copy the checkpoint's files instead"
        )
    for side in ("query", "document"):
        prompt = getattr(spec, f"{side}_prompt")
        if not getattr(spec, f"{side}_prefix") and prompt in encoder.tokenizer.added_strings:
            spec = replace(spec, **{f"{side}_prefix": prompt, f"{side}_prompt": ""})
    return spec


def _architecture(spec: RetrieverSpec) -> dict[str, Any]:
    if not spec.bidirectional:
        return {"architectures": ["Lfm2Model"]}
    name = "Lfm2BidirectionalModel"
    return {
        "architectures": [name],
        "auto_map": {"AutoModel": f"{_REMOTE}.{name}"},
        "is_causal": False,
    }


def _dense(spec: DenseSpec) -> dict[str, Any]:
    place = "linear" if spec.activation == "Identity" else "activation"
    return {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "bias": spec.bias,
        "activation_function": f"torch.nn.modules.{place}.{spec.activation}",
        "use_residual": spec.residual,
    }


def _tokenizer_config(folder: Path) -> dict[str, str]:
    """`tokenizer_config.json` under a class name that transformers 4 knows too."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") != "TokenizersBackend":
        return {}
    return {path.name: _dump({**said, "tokenizer_class": "PreTrainedTokenizerFast"})}


def _module(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
