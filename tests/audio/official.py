"""Tiny checkpoints in the official LFM2-Audio layout, the same on every machine and in every run.

No weight is stored: every number comes from its tensor's name, through a bit generator whose stream
NumPy keeps stable. The driver of the official code (`tools/audio_oracle.py`) loads the same
numbers, so what it wrote into `golden/` belongs to these checkpoints. This module imports nothing
of ours: the driver runs without this package.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
RATE, N_CODEBOOKS, CODES, CLASSES = 16000, 8, 2048, 2049
PAD, BOS, IM_START, IM_END = 0, 1, 6, 7
AUDIO_START, TEXT_START, TEXT_END = 128, 129, 130

_NAMED = {
    PAD: "<|pad|>",
    BOS: "<|startoftext|>",
    2: "<|endoftext|>",
    IM_START: "<|im_start|>",
    IM_END: "<|im_end|>",
    AUDIO_START: "<|audio_start|>",
    TEXT_START: "<|text_start|>",
    TEXT_END: "<|text_end|>",
    131: "<|mixed_start|>",
    132: "<|mixed_end|>",
}
SPECIALS = tuple(_NAMED.get(i, f"<|reserved_{i}|>") for i in range(140))
N_VOCAB = 400  # 140 specials, 256 bytes, and ids that no text has
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2AudioForConditionalGeneration"],
    "codebooks": N_CODEBOOKS,
    "tie_audio_embeddings": False,
    "semantic_codebook_factor": 100,
    "codebook_weight": "log",
    "interleaved_n_text": 6,
    "interleaved_n_audio": 12,
    "preprocessor": {
        "sample_rate": RATE,
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 128,
        "n_fft": 512,
        "log": True,
        "frame_splicing": 1,
        "dither": 1e-05,
        "pad_to": 0,
        "pad_value": 0.0,
    },
    "encoder": {
        "feat_in": 128,
        "feat_out": -1,
        "n_layers": 2,
        "d_model": 32,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 16,
        "causal_downsampling": False,
        "reduction": None,
        "reduction_position": None,
        "reduction_factor": 1,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": 4,
        "att_context_size": [-1, -1],
        "xscaling": False,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm",
        "conv_context_size": None,
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
    },
    "lfm": {
        "vocab_size": N_VOCAB,
        "hidden_size": 64,
        "block_ff_dim": 192,
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "conv_L_cache": 3,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 2048,
        "eos_token_id": IM_END,
    },
    "depthformer": {"layers": 2, "dim": 64, "tie": True},
}

# Heads of four pairs each, whose angles depend on the base and on what counts as a pair; those of
# CONFIG have one. Every so many-eth class of its scores is golden.
WIDE_DEPTHFORMER: dict[str, Any] = {"layers": 2, "dim": 256, "tie": True}
EVERY = 32

DETOKENIZER_CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2Model"],
    "model_type": "lfm2",
    "vocab_size": 32,  # dead weight in every released detokenizer
    "hidden_size": 512,
    "block_ff_dim": 192,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": ["conv", "sliding_attention", "conv", "sliding_attention"],
    "sliding_window": 30,
    "conv_L_cache": 3,
    "rope_theta": 1000000.0,
}

# The shapes of a Mimi, as keyword arguments of transformers' MimiConfig.
MIMI_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_filters": 4,
    "codebook_size": CODES,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 8,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 20,
}

_LOUD = {IM_END: 1.4, AUDIO_START: 2.0, TEXT_END: 1.4}  # so that greedy generation meets them


def numbers(name: str, *shape: int) -> Tensor:
    """Numbers that only the name decides: uniform, mean 0, variance 1, fp32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw((math.prod(shape) + 1) // 2).view(np.uint32)
    unit = raw[: math.prod(shape)].astype(np.float64) / 2**32
    return torch.from_numpy(((2 * unit - 1) * math.sqrt(3)).astype(np.float32)).reshape(shape)


def signal(name: str, n: int, peak: float = 0.3) -> Tensor:
    """A made-up recording at 16 kHz, `[n]`: bursts of noise and chirps, at most `peak` loud."""
    t = np.arange(n) / RATE
    hum = np.sin(2 * np.pi * (180 + 60 * np.sin(2 * np.pi * 1.7 * t)) * t)
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * 2.3 * t)
    noise = numbers("signal:" + name, n).numpy() / math.sqrt(3)
    mixed = peak * swell * (0.7 * hum + 0.3 * noise)
    return torch.from_numpy(mixed.astype(np.float32))


def signals() -> dict[str, Tensor]:
    """Recordings whose features are golden: whole and broken frames, and very few of them."""
    return {
        "second": signal("second", 16000),
        "odd": signal("odd", 12345),
        "loud": signal("loud", 4801, peak=1.0),
        "frames9": signal("frames9", 1280),
        "frames2": signal("frames2", 320),
        "frames1": signal("frames1", 170),
        "frames0": signal("frames0", 100),
    }


ENCODED = ("second", "odd", "frames9")  # of `signals`: what went through the encoder


def prompt_text(which: int) -> Tensor:
    """Ten text tokens of a golden prompt: five before the recording, five after it; int64."""
    return (numbers(f"prompt text {which}", 10).abs() * 140).long() % 250 + 140


def codes(name: str, n: int) -> Tensor:
    """Frames of codes, int64 `[n, codebooks]`, none of them the end."""
    unit = numbers(name, n, N_CODEBOOKS) / (2 * math.sqrt(3)) + 0.5
    return (unit * CODES).long().clamp(0, CODES - 1)


# Prompts whose greedy answers are golden, by mode. Together they meet the start, the end and the
# second start of speech, the end of text and of the turn, and answers cut short by the limit.
CHOSEN: dict[str, tuple[int, ...]] = {"sequential": (18, 20, 26, 7), "interleaved": (12, 29, 1, 15)}


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of this name: of a size that keeps activations alive, exact in bf16 or integer."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.tensor(7)
    if last == "codebook_offsets":
        return torch.arange(shape[0]) * CLASSES
    if last == "audio_loss_weights":
        return (torch.linspace(1, 0, shape[0]) * math.log(100)).exp()
    if last == "_initialized":
        return torch.ones(shape)
    if name == "istft.window":
        return torch.hann_window(shape[0])
    source = name.replace("to_logits", "embedding") if "depth_embeddings" in name else name
    r = numbers(source, *shape)
    if last in ("running_var", "cluster_usage"):
        r = 1 + 0.3 * r.abs()
    elif "norm" in name and last == "weight":
        r = 1 + 0.1 * r
    elif len(shape) < 2:
        r = 0.1 * r
    elif "embed_tokens" in name:
        r = 0.4 * r
        for token, gain in _LOUD.items():
            if token < shape[0]:
                r[token] *= gain
    elif "embedding" in name or name.startswith("emb."):
        r = 0.4 * r
        if source == "depth_embeddings.0.embedding.weight":
            r[CODES] *= 2  # the end of speech, which only the first codebook says
    else:
        r = r * math.sqrt(1.5 / math.prod(shape[1:]))
    return r.bfloat16().float()


@cache
def layout() -> dict[str, dict[str, list[int]]]:
    """Official names and shapes of `model`, `detokenizer` and `mimi`."""
    made: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "layout.json").read_text())
    return made


def state(part: str) -> dict[str, Tensor]:
    """All tensors of `model`, `detokenizer` or `mimi`, under their official names."""
    return {name: tensor(name, tuple(shape)) for name, shape in layout()[part].items()}


@cache
def golden(name: str) -> dict[str, Tensor]:
    """What the official code made, by name."""
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def facts() -> dict[str, Any]:
    """What the official code made, as far as it is no tensor."""
    made: dict[str, Any] = json.loads((GOLDEN / "facts.json").read_text())
    return made


@cache
def workplace() -> Path:
    """A folder that goes when the run ends."""
    made = tempfile.mkdtemp(prefix="lfm2-mm-audio-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens after 140 specials, ChatML's and the audio ones at their official ids."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[IM_END],
        pad_token=SPECIALS[PAD],
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def write(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    copies: bool = True,
    detokenizer: bool = False,
    mimi: bool = False,
) -> Path:
    """Write the checkpoint as it would lie on the Hub.

    Args:
        folder: Where.
        config: Keys that `config.json` has instead.
        tensors: Tensors that the file has instead; None takes one away.
        dtype: Stored format of floating-point weights; the numbers are exact in bf16.
        copies: Whether tied copies and unused parts are stored, as in the released files.
        detokenizer: Whether `audio_detokenizer/` is there.
        mimi: Whether the Mimi file is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    stored: dict[str, Tensor | None] = {**state("model"), **(tensors or {})}
    if not copies:
        stored = {name: t for name, t in stored.items() if not _spare(name)}
    _save({k: t for k, t in stored.items() if t is not None}, folder / "model.safetensors", dtype)
    write_tokenizer(folder)
    if detokenizer:
        inner = folder / "audio_detokenizer"
        inner.mkdir(exist_ok=True)
        (inner / "config.json").write_text(json.dumps(DETOKENIZER_CONFIG))
        _save(state("detokenizer"), inner / "model.safetensors", torch.float32)
    if mimi:
        _save(state("mimi"), folder / MIMI_FILE, torch.float32)
    return folder


def _spare(name: str) -> bool:
    """Whether a tensor is a copy of another, or nothing reads it."""
    return (
        "to_logits" in name
        or name.startswith("audio_embedding.embedding_norm.")
        or name.rpartition(".")[2]
        in ("num_batches_tracked", "codebook_offsets", "audio_loss_weights")
    )


def _save(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    kept = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    save_file(kept, path, {"format": "pt"})


@cache
def folder() -> Path:
    """The checkpoint as released: copies stored, detokenizer in it; not to be written to."""
    return write(workplace() / "official", detokenizer=True)
