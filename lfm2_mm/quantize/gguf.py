"""A GGUF file of a text LFM2, dense or sparse, as if it were a checkpoint folder.

Blocks of Q4_0 and Q8_0 become packed weights with the very same values; F32, F16 and BF16 are
mapped as they are; what other types mean, the `gguf` library computes. Names as llama.cpp writes
them (`gguf.constants`). Knows the file; nothing of how a model is put together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import DENSE, SPARSE
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    MissingExtra,
    TensorMismatch,
    UnsupportedArchitecture,
)
from lfm2_mm.kernels.packed import pack_codes
from lfm2_mm.quantize.files import ENTRY, GGUF_RECIPE, config_entry
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["GgufCheckpoint"]

_ARCHITECTURES = {"lfm2": DENSE, "lfm2moe": SPARSE}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXACT, _BLOCK = ("Q4_0", "Q8_0"), 32
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",
    "output_norm.weight": "model.embedding_norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "operator_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.out_proj.weight",
    "attn_q_norm.weight": "self_attn.q_layernorm.weight",
    "attn_k_norm.weight": "self_attn.k_layernorm.weight",
    "shortconv.conv.weight": "conv.conv.weight",
    "shortconv.in_proj.weight": "conv.in_proj.weight",
    "shortconv.out_proj.weight": "conv.out_proj.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "ffn_gate_inp.weight": "feed_forward.gate.weight",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}
_EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_down_exps.weight": "w2", "ffn_up_exps.weight": "w3"}
_NUMBERED = re.compile(r"blk\.(\d+)\.(.+)")


class _Place(NamedTuple):
    """Where a tensor comes from: which of the file's, which expert of it, which part."""

    tensor: int
    expert: int | None
    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class GgufCheckpoint(Checkpoint):
    """A GGUF file that answers like a checkpoint folder.

    Attributes:
        path: The file.
    """

    path: Path
    _reader: Any
    _places: dict[str, _Place]

    @classmethod
    def open(cls, folder: Path | str, name: str | None = None) -> GgufCheckpoint:
        """Read the metadata of a file; no tensor is read.

        Raises:
            MissingExtra: if the `gguf` library is not installed.
            CorruptWeights: if the file is damaged or cut short.
            UnsupportedArchitecture: if it is no text LFM2.
            TensorMismatch: if it holds a tensor that no LFM2 has.
        """
        path = Path(folder)
        reader = _read(path)
        self = object.__new__(cls)
        self.path, self.folder, self.name = path, path.parent, name or path.name
        self._reader = reader
        with _understood(path):
            self.config = _config(reader, self.name)
            self._places = _places(reader, self.name)
        if any(tensor.tensor_type.name not in _PLAIN for tensor in reader.tensors):
            self.config[ENTRY] = config_entry(GGUF_RECIPE)
        self.names = tuple(sorted(self._places))
        self.nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """See `Checkpoint.dtype`."""
        return self._place(name).dtype

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`; those of other types than F32, F16 and BF16 are made anew."""
        place = self._place(name)
        stored = self._reader.tensors[place.tensor]
        data = stored.data if place.expert is None else stored.data[place.expert]
        kind = stored.tensor_type.name
        if kind in _PLAIN:
            return _plain(data, kind).view(place.shape)
        if kind in _EXACT and place.part:
            return _parts(data, kind)[place.part]
        from gguf import quants

        try:
            numbers = np.ascontiguousarray(quants.dequantize(data, stored.tensor_type))
        except (NotImplementedError, quants.QuantError):
            raise CheckpointError(
                f"{self.name} stores {stored.name} as {kind}, which the gguf library cannot read; "
                "use a file in Q4_0, Q8_0 or BF16"
            ) from None
        return torch.from_numpy(numbers).view(place.shape)

    def json(self, filename: str) -> dict[str, Any] | None:
        """Side files there are none, but what one of them would say may be known."""
        if filename != "generation_config.json":
            return None
        fields = {"eos_token_id": "eos_token_id", "bos_token_id": "bos_token_id"}
        with _understood(self.path):
            said = {key: _value(self._reader, f"tokenizer.ggml.{k}") for key, k in fields.items()}
        return {key: value for key, value in said.items() if value is not None}

    def file(self, filename: str) -> Path | None:
        """There are none."""
        return None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the file, or the one its metadata describe.

        Raises:
            CheckpointError: if there is none that can be read.
        """
        if (self.folder / "tokenizer.json").is_file():
            return Tokenizer.load(self.folder)
        from lfm2_mm.quantize.gguf_tokenizer import tokenizer_of

        with _understood(self.path):
            return tokenizer_of(lambda key: _value(self._reader, key), self.name)

    def _place(self, name: str) -> _Place:
        if (place := self._places.get(name)) is None:
            raise TensorMismatch(f"{self.name} stores no tensor {name!r}; use a complete file")
        return place


def _read(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra(
            f"reading {path.name} needs the gguf library; pip install 'lfm2-mm[gguf]'"
        ) from None

    class Reader(GGUFReader):
        """Stops at the end of the file: behind it the library finds as many numbers as asked."""

        def _get(self, *args: Any, **options: Any) -> Any:
            found = super()._get(*args, **options)
            if not len(found) and (len(args) < 3 or args[2]):
                raise ValueError("it ends within its metadata")
            return found

    with _understood(path):
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a header")
        reader = Reader(path)
        for tensor in reader.tensors:
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} is cut short")
    if sys.byteorder != "little" or str(getattr(reader, "byte_order", "I")) == "S":
        raise CorruptWeights(f"{path} is of another byte order; use a little-endian file")
    return reader


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes of reading it becomes one sentence."""
    try:
        yield
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise CorruptWeights(
            f"{path} cannot be read as GGUF ({why}); download the file again"
        ) from None


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _config(reader: Any, where: str) -> dict[str, Any]:
    """The metadata in the words of an official `config.json`."""
    arch = _value(reader, "general.architecture")
    if arch not in _ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{where} is a GGUF file of the architecture {arch!r}, but only those of text LFM2 "
            f"({', '.join(_ARCHITECTURES)}) are read; use the safetensors checkpoint"
        )

    def need(key: str) -> Any:
        value = _value(reader, f"{arch}.{key}")
        if value is None:
            raise CorruptWeights(
                f"{where} lacks the metadata {arch}.{key}; use a file written by llama.cpp"
            )
        return value

    def may(key: str, default: Any) -> Any:
        value = _value(reader, f"{arch}.{key}")
        return default if value is None else value

    heads = need("attention.head_count_kv")
    layers = int(need("block_count"))
    heads = [int(n) for n in heads] if isinstance(heads, list) else [int(heads)] * layers
    names = {tensor.name for tensor in reader.tensors}
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    rows = int(embedding.shape[1]) if embedding is not None else int(need("vocab_size"))
    config: dict[str, Any] = {
        "model_type": _ARCHITECTURES[arch],
        "vocab_size": rows,
        "hidden_size": int(need("embedding_length")),
        "intermediate_size": int(need("feed_forward_length")),
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if n else "conv" for n in heads],
        "num_attention_heads": int(need("attention.head_count")),
        "num_key_value_heads": max(heads),
        "conv_L_cache": int(need("shortconv.l_cache")),
        "conv_bias": False,
        "norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_theta": float(need("rope.freq_base")),
            "rope_type": "default",
        },
        "max_position_embeddings": int(need("context_length")),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if (width := _value(reader, f"{arch}.attention.key_length")) is not None:
        config["head_dim"] = int(width)
    for key in ("bos", "eos", "padding"):
        token = _value(reader, f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config["pad_token_id" if key == "padding" else f"{key}_token_id"] = int(token)
    if arch == "lfm2moe":
        config |= {
            "num_experts": int(need("expert_count")),
            "num_experts_per_tok": int(need("expert_used_count")),
            "moe_intermediate_size": int(need("expert_feed_forward_length")),
            "num_dense_layers": int(may("leading_dense_block_count", 0)),
            "use_expert_bias": any("exp_probs_b" in name for name in names),
            "norm_topk_prob": bool(may("expert_weights_norm", True)),
            "routed_scaling_factor": float(may("expert_weights_scale", 1.0) or 1.0),
        }
    return config


def _places(reader: Any, where: str) -> dict[str, _Place]:
    """Official name, or that of a part of a packed weight -> where it comes from."""
    found: dict[str, _Place] = {}
    for number, tensor in enumerate(reader.tensors):
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        kind = tensor.tensor_type.name
        for name, expert in _own_names(tensor.name, shape, where).items():
            one = shape if expert is None else shape[1:]
            if name.endswith("conv.conv.weight"):
                one = (shape[0], 1, shape[1])
            if kind in _EXACT and len(one) == 2:
                for part, (size, dtype) in _part_shapes(kind, one).items():
                    found[f"{name}.{part}"] = _Place(number, expert, part, size, dtype)
                continue
            dtype = _PLAIN.get(kind, torch.float32)
            found[name] = _Place(number, expert, "", one, dtype)
    return found


def _own_names(name: str, shape: tuple[int, ...], where: str) -> dict[str, int | None]:
    """Official names of one tensor of the file, and which expert each is of."""
    if name in _TOP:
        return {_TOP[name]: None}
    if match := _NUMBERED.fullmatch(name):
        layer, rest = f"model.layers.{match[1]}", match[2]
        if rest in _LAYER:
            return {f"{layer}.{_LAYER[rest]}": None}
        if rest in _EXPERTS and len(shape) == 3:
            stem = f"{layer}.feed_forward.experts"
            return {f"{stem}.{e}.{_EXPERTS[rest]}.weight": e for e in range(shape[0])}
    if name == "rope_freqs.weight":  # derived
        return {}
    raise TensorMismatch(
        f"{where} holds the tensor {name}, which no text LFM2 has; use a file of a text model"
    )


def _plain(data: np.ndarray[Any, Any], kind: str) -> Tensor:
    flat = np.ascontiguousarray(data).reshape(-1)
    if not flat.flags.writeable:  # mapped read-only: torch would warn of writes that never come
        flat = flat.copy()
    return torch.from_numpy(flat.view(np.uint8)).view(_PLAIN[kind])


def _part_shapes(
    kind: str, shape: tuple[int, ...]
) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    rows, cols = shape
    width = cols // 2 if kind == "Q4_0" else cols
    return {
        "codes": ((rows, width), torch.uint8),
        "scales": ((rows, cols // _BLOCK), torch.float16),
    }


def _parts(data: np.ndarray[Any, Any], kind: str) -> dict[str, Tensor]:
    """Blocks of 32 numbers, a scale in fp16 before the codes, as a packed weight's buffers."""
    rows = data.shape[0]
    blocks = torch.from_numpy(np.array(data)).view(rows, -1, 18 if kind == "Q4_0" else 34)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    codes = blocks[..., 2:]
    if kind == "Q8_0":  # from -127 to 127; here around 128
        return {"codes": (codes ^ 128).flatten(1), "scales": scales}
    whole = torch.cat([codes & 15, codes >> 4], dim=-1)  # low halves are the first 16 numbers
    return {"codes": pack_codes(whole.flatten(1)), "scales": scales}
