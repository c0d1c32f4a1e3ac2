"""Tiny random retrievers on disk, in the layouts of PyLate and sentence-transformers.

Nothing is downloaded. `folder(name)` makes a variant once per run; `write(folder, name)` puts one
where the caller wants it. Needs transformers 5 and nothing of ours, so that oracles in other
environments can be handed the same files.
"""

from __future__ import annotations

import atexit
import json
import shutil
import string
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Lfm2Config, Lfm2Model, PreTrainedTokenizerFast

QUERIES = [
    "What is the capital of France?",
    "¿Dónde está la biblioteca?",
    "短いクエリ",
    ("a very long query " * 20).strip(),
    "",
]
DOCUMENTS = [
    "Paris is the capital, of France!!!",
    "La biblioteca (está) en el centro.",
    "東京は日本の首都です。",
    ("LFM2: hybrid, short-conv + attention; 350M. " * 60).strip(),
    "x",
    ("the capital of France, in the centre of a very long document about libraries " * 5).strip(),
]
SPECIALS = [
    *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>"),
    *("<|im_start|>", "<|im_end|>"),
]
HIDDEN, DIM = 64, 32
VARIANTS = ("causal", "bidirectional", "chain", "plain", "attend", "embedding")

_IDENTITY = "torch.nn.modules.linear.Identity"
_BACKBONE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
_SETTINGS: dict[str, Any] = {
    "model_type": "ColBERT",
    "__version__": {"sentence_transformers": "5.1.1", "transformers": "4.56.2", "pytorch": "2.8.0"},
    "prompts": {"query": "", "document": ""},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 32,
    "document_length": 256,
    "attend_to_expansion_tokens": False,
    "skiplist_words": list(string.punctuation),
    "do_query_expansion": True,
}

_home = Path(tempfile.mkdtemp(prefix="lfm2-colbert-"))
atexit.register(shutil.rmtree, _home, ignore_errors=True)


@cache
def folder(name: str) -> Path:
    """A variant on disk; not to be changed."""
    write(_home / name, name)
    return _home / name


def write(place: Path, name: str) -> None:
    """Write a variant.

    `causal` is LFM2-ColBERT's layout, `bidirectional` LFM2.5-ColBERT's; `chain` has three Dense
    modules with bias, activation and residual; `plain` neither prefix nor expansion nor skiplist,
    but prompts; `attend` attends to the expansion; `embedding` is LFM2.5-Embedding's layout.
    """
    place.mkdir(parents=True)
    tokenizer = write_tokenizer(place)
    torch.manual_seed(VARIANTS.index(name))
    net = Lfm2Model(Lfm2Config(vocab_size=len(tokenizer), **_BACKBONE))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # the default start is too small to show differences
    net.save_pretrained(str(place))
    settings = dict(_SETTINGS)
    if name in ("bidirectional", "embedding"):
        config = json.loads((place / "config.json").read_text())
        dump({**config, "architectures": ["Lfm2BidirectionalModel"]}, place / "config.json")
    if name == "attend":
        settings["attend_to_expansion_tokens"] = True
    if name == "plain":
        settings |= {"query_prefix": "", "document_prefix": "", "do_query_expansion": False}
        settings |= {"skiplist_words": [], "query_length": 24}
        settings["prompts"] = {"query": "find: ", "document": "text: "}
    if name == "embedding":
        write_embedding(place)
        return
    layers = [(HIDDEN, DIM, False, _IDENTITY, False)]
    if name == "chain":
        layers = [
            (HIDDEN, 48, True, "torch.nn.modules.activation.Tanh", True),
            (48, 48, False, "torch.nn.modules.activation.GELU", True),
            (48, DIM, True, _IDENTITY, False),
        ]
    write_dense(place, layers)
    dump({"max_seq_length": 255, "do_lower_case": False}, place / "sentence_bert_config.json")
    dump(settings, place / "config_sentence_transformers.json")


def write_tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with LFM2's special ids and the two prefixes as added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([*QUERIES, *DOCUMENTS, string.printable], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.save_pretrained(str(place))
    path = place / "tokenizer_config.json"  # transformers 4 does not know the class that 5 writes
    dump({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, path)
    return tokenizer


def write_dense(place: Path, layers: Sequence[tuple[int, int, bool, str, bool]]) -> None:
    """Dense modules (in, out, bias, activation, residual) and their `modules.json`."""
    modules = [module(0, "", "sentence_transformers.models.Transformer")]
    for number, (wide, narrow, bias, activation, residual) in enumerate(layers, start=1):
        path = place / f"{number}_Dense"
        path.mkdir()
        tensors = {"linear.weight": torch.randn(narrow, wide) * 0.2}
        if bias:
            tensors["linear.bias"] = torch.randn(narrow) * 0.2
        if residual and wide != narrow:
            tensors["residual.weight"] = torch.randn(narrow, wide) * 0.2
        save_file(tensors, path / "model.safetensors")
        dump(
            {
                "in_features": wide,
                "out_features": narrow,
                "bias": bias,
                "activation_function": activation,
                "use_residual": residual,
            },
            path / "config.json",
        )
        modules.append(module(number, path.name, "pylate.models.Dense.Dense"))
    dump(modules, place / "modules.json")


def write_embedding(place: Path) -> None:
    """One vector per text: the state of the begin token, normalised."""
    dump(
        [
            module(0, "", "sentence_transformers.models.Transformer"),
            module(1, "1_Pooling", "sentence_transformers.models.Pooling"),
            module(2, "2_Normalize", "sentence_transformers.models.Normalize"),
        ],
        place / "modules.json",
    )
    modes = ("mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    (place / "1_Pooling").mkdir()
    dump(
        {
            "word_embedding_dimension": HIDDEN,
            "pooling_mode_cls_token": True,
            **{f"pooling_mode_{mode}": False for mode in modes},
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
        place / "1_Pooling" / "config.json",
    )
    dump({"max_seq_length": 128, "do_lower_case": False}, place / "sentence_bert_config.json")
    dump(
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "query: ", "document": "document: "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        place / "config_sentence_transformers.json",
    )


def module(number: int, path: str, kind: str) -> dict[str, Any]:
    """One entry of `modules.json`."""
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def dump(value: Any, path: Path) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=2))


def edit(place: Path, file: str, **changes: Any) -> None:
    """Change keys of a JSON object on disk; a value of None takes the key away."""
    path = place / file
    value = {**json.loads(path.read_text()), **changes}
    dump({k: v for k, v in value.items() if v is not None}, path)
