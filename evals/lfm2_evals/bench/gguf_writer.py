"""A text LFM2 as a GGUF file that llama.cpp loads: for comparing with it, and for tests.

Names and metadata as in llama.cpp's conversion script; matrices are rounded by the `gguf` library,
which gives the bits that llama.cpp itself would. Knows the file format and nothing of speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import MissingExtra

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_mm.checkpoint import Checkpoint

__all__ = ["write_gguf"]

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
}
_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def write_gguf(
    checkpoint: Checkpoint, config: BackboneConfig, path: Path, body: str, head: str
) -> None:
    """Write a dense checkpoint of a text model.

    Args:
        checkpoint: In the official layout, its tokenizer beside it.
        config: What its `config.json` says.
        path: The file.
        body: GGUF type of the matrices, such as "Q4_0", "Q8_0", "BF16", "F16" or "F32".
        head: The same for the embedding and the head.

    Raises:
        MissingExtra: if the `gguf` library is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtra(
            "writing GGUF files needs the gguf library; pip install 'lfm2-mm[gguf]'"
        ) from None
    out = GGUFWriter(path, "lfm2moe" if config.n_experts else "lfm2", use_temp_file=True)
    _metadata(out, config)
    _tokens(out, checkpoint, config.vocab_size)
    for name, tensor in _tensors(checkpoint):
        _add(out, name, tensor, head if name in ("token_embd.weight", "output.weight") else body)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _metadata(out: Any, config: BackboneConfig) -> None:
    attends = [kind == "full_attention" for kind in config.layer_types]
    out.add_context_length(config.max_positions)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.n_layers)
    out.add_feed_forward_length(config.ffn_size)
    out.add_head_count(config.n_heads)
    out.add_head_count_kv([config.n_kv_heads if yes else 0 for yes in attends])
    if config.head_dim * config.n_heads != config.hidden_size:
        out.add_key_length(config.head_dim)
        out.add_value_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_rope_freq_base(config.rope_theta)
    out.add_shortconv_l_cache(config.conv_taps)
    out.add_vocab_size(config.vocab_size)
    if config.n_experts:
        from gguf import ExpertGatingFuncType

        out.add_expert_count(config.n_experts)
        out.add_expert_used_count(config.n_experts_per_token)
        out.add_expert_feed_forward_length(config.expert_size)
        out.add_leading_dense_block_count(config.n_dense_layers)
        out.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _tokens(out: Any, checkpoint: Checkpoint, rows: int) -> None:
    """Vocabulary, merges and template; rows without a token are filled up as unused."""
    from gguf import TokenType

    from lfm2_mm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint.folder)
    model = json.loads(tokenizer.hf.backend_tokenizer.to_str())["model"]
    by_id = {number: token for token, number in tokenizer.hf.get_vocab().items()}
    added = tokenizer.hf.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(rows):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(TokenType.UNUSED)
        elif number in added:
            special = added[number].special
            kinds.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("lfm2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges(merges)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    for name, known in ids.items():
        if known is not None:
            getattr(out, f"add_{name}_token_id")(known)
    if isinstance(tokenizer.chat_template, str):
        out.add_chat_template(tokenizer.chat_template)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """GGUF name and tensor, one after the other; experts of a layer together."""
    import torch

    from lfm2_mm.weights import backbone_tensors, head_tensors

    own = {**backbone_tensors(checkpoint), **head_tensors(checkpoint)}
    experts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in own.items():
        if name in _TOP:
            yield _TOP[name], tensor
            continue
        layer, _, rest = name.removeprefix("layers.").partition(".")
        if rest == "feed_forward.expert_bias":
            yield f"blk.{layer}.exp_probs_b.bias", tensor
        elif rest.startswith("feed_forward.experts."):
            number, which = rest.split(".")[2:4]
            place = f"blk.{layer}.{_EXPERTS[which]}.weight"
            experts.setdefault(place, []).append((int(number), tensor))
        else:
            stem = rest.removesuffix(".weight")
            taps = stem == "conv.conv"
            yield f"blk.{layer}.{_LAYER[stem]}.weight", tensor[:, 0] if taps else tensor
    for place, parts in experts.items():
        yield place, torch.stack([one for _, one in sorted(parts, key=lambda part: part[0])])


def _add(out: Any, name: str, tensor: Tensor, kind: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    data = np.ascontiguousarray(tensor.float().numpy())
    small = data.ndim == 1 or "shortconv.conv" in name or "ffn_gate_inp" in name
    if small or kind == "F32":
        out.add_tensor(name, data)
    elif kind == "F16":
        out.add_tensor(name, data.astype(np.float16))
    else:
        own = GGMLQuantizationType[kind]
        out.add_tensor(name, quants.quantize(data, own), raw_dtype=own)
