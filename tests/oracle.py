"""Tiny random checkpoints written by transformers, and what transformers makes of them.

Everything is made once per run and kept: `folder(name)` is a checkpoint on disk, `theirs(name)` the
same weights in transformers, `ours(name)` the same weights in this package. Variants cover dense
and sparse backbones, tied and untied heads, vision-language models with and without LayerNorm, and
odd shapes (conv length 4, four query heads on one key/value head, head_dim not hidden / heads).
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import lfm2_mm
from lfm2_mm.chat import Prompt
from lfm2_mm.model import Model
from lfm2_mm.request import Handle, Request
from tests.core.tiny_tokenizer import LFM25_TEMPLATE

CLOSE = 1e-4
TEXT_VARIANTS = ("dense", "untied", "odd", "legacy", "moe", "moe_untied")
VISION_VARIANTS = ("vl", "vl_odd", "vl_moe")
VARIANTS = (*TEXT_VARIANTS, *VISION_VARIANTS)

LAYERS = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
_BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 7,
    "layer_types": LAYERS,
}
_ODD = {
    "conv_L_cache": 4,
    "conv_bias": True,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "tie_word_embeddings": False,
}
_MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_dense_layers": 2,
}
_DENSE = {**_BASE, "block_multiple_of": 16}
_TEXT: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "untied": {**_DENSE, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False},
    "odd": {**_DENSE, **_ODD},
    "legacy": _DENSE,
    "moe": {**_BASE, **_MOE},
    "moe_untied": {
        **_BASE,
        **_MOE,
        "tie_word_embeddings": False,
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
    },
}
_VISION: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_patches": 36,
    "patch_size": 8,
    "vision_use_head": False,
}
# views of 4 to 16 positions; tiles of 64 pixels are 8 x 8 patches
IMAGES: dict[str, Any] = {
    "encoder_patch_size": 8,
    "downsample_factor": 2,
    "tile_size": 64,
    "max_tiles": 4,
    "min_image_tokens": 4,
    "max_image_tokens": 16,
    "resample": 3,
}

SPECIALS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|reserved|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5)),
)
IMAGE_ID, EOS_ID = SPECIALS.index("<image>"), SPECIALS.index("<|im_end|>")


@cache
def workplace() -> Path:
    """A folder that goes when the run ends."""
    made = tempfile.mkdtemp(prefix="lfm2-mm-oracle-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@cache
def hf_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML and picture markers before them, LFM2.5's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    made.chat_template = LFM25_TEMPLATE
    return made


def randomized(net: Any) -> Any:
    """Seeded weights that make every part count: norms and biases too."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            r = torch.randn(p.shape, generator=draw)
            norm = name.endswith("weight") and "norm" in name
            p.copy_(1 + 0.1 * r if norm else r * (0.2 if p.dim() > 1 else 0.05))
        for name, b in net.named_buffers():
            if "expert_bias" in name:
                b.copy_(0.3 * torch.randn(b.shape, generator=draw))
    return net.eval()


@cache
def theirs(name: str) -> Any:
    """The variant in transformers; its generation never ends by itself."""
    net: Any
    if name.startswith("vl"):
        text = {
            "vl": {"model_type": "lfm2", **_TEXT["dense"]},
            "vl_odd": {"model_type": "lfm2", **_TEXT["odd"]},
            "vl_moe": {"model_type": "lfm2_moe", **_TEXT["moe"]},
        }[name]
        config = Lfm2VlConfig(
            vision_config=_VISION,
            text_config=text,
            projector_hidden_size=48,
            projector_use_layernorm=name == "vl_odd",
            image_token_id=IMAGE_ID,
            tie_word_embeddings=text.get("tie_word_embeddings", True),
        )
        net = Lfm2VlForConditionalGeneration(config)
    elif name.startswith("moe"):
        net = Lfm2MoeForCausalLM(Lfm2MoeConfig(**_TEXT[name]))
    else:
        net = Lfm2ForCausalLM(Lfm2Config(**_TEXT[name]))
    net = randomized(net)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = 0
    return net


@cache
def folder(name: str) -> Path:
    """The variant as a checkpoint, written by transformers."""
    path = workplace() / name
    theirs(name).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    hf_tokenizer().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    if name == "legacy":  # the same shapes as the first files on the Hub spelled them
        attention = [i for i, kind in enumerate(config.pop("layer_types")) if kind != "conv"]
        config |= {
            "full_attn_idxs": attention,
            "block_ff_dim": config["intermediate_size"],
            "intermediate_size": 9999,
            "block_norm_eps": 0.5,
            "rope_theta": config.pop("rope_parameters")["rope_theta"],
            "tie_embedding": config.pop("tie_word_embeddings"),
            "num_heads": config["num_attention_heads"],
        }
        (path / "config.json").write_text(json.dumps(config))
    if name.startswith("vl"):
        processor = {"processor_class": "Lfm2VlProcessor", "image_processor": IMAGES}
        (path / "processor_config.json").write_text(json.dumps(processor))
    return path


def ours(name: str, **options: Any) -> Model:
    """The variant in this package, with an engine and caches of its own."""
    model = lfm2_mm.load(folder(name), **{"threads": 1, "dtype": "float32", **options})
    assert isinstance(model, Model)
    return model


def changed(name: str, path: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A copy of a variant with other config keys and tensors (None takes one away)."""
    shutil.copytree(folder(name), path)
    told = json.loads((path / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(told))
    stored = load_file(path / "model.safetensors") | tensors
    kept = {key: value for key, value in stored.items() if value is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


@cache
def shared(name: str) -> Model:
    """`ours`, for tests that leave no trace in it."""
    return ours(name)


def endless(model: Model) -> Model:
    """The model without end tokens, as `theirs` is."""
    model.head.eos_ids = frozenset()
    return model


def ids(n: int, seed: int = 0) -> Tensor:
    """Random tokens that are no specials, int64 `[n]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), 280, (n,), generator=draw)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, so that every pixel counts."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def image_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """What transformers' processor would hand over for the prompt's pictures, padded."""
    if not prompt.slots:
        return {}
    shapes = torch.cat([slot.prepared.tensors["shapes"] for slot in prompt.slots])
    patches = torch.cat([slot.prepared.tensors["patches"] for slot in prompt.slots])
    sizes = shapes.prod(-1).tolist()
    most = max(sizes) + 3
    values = torch.zeros(len(sizes), most, patches.shape[1])
    mask = torch.zeros(len(sizes), most, dtype=torch.int32)
    for i, rows in enumerate(torch.split(patches, sizes)):
        values[i, : len(rows)], mask[i, : len(rows)] = rows, 1
    return {"pixel_values": values, "spatial_shapes": shapes, "pixel_attention_mask": mask}


@torch.no_grad()
def their_logits(name: str, prompt: Prompt) -> Tensor:
    """Scores at every position, `[n, v]`."""
    scores: Tensor = theirs(name)(prompt.ids[None], **image_inputs(prompt)).logits[0]
    return scores


@torch.no_grad()
def their_tokens(name: str, prompt: Prompt, n: int = 64, **options: Any) -> list[int]:
    """What greedy `generate` adds to a prompt."""
    out = theirs(name).generate(
        prompt.ids[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        **image_inputs(prompt),
        **options,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


class Recorder:
    """Listens to a model: the tokens of each request, in order of submission, and their scores."""

    def __init__(self, model: Model) -> None:
        self._states: list[Any] = []
        self._scores: dict[int, list[Tensor]] = {}
        engine, head = model.engine, model.head
        submit, step, logits = engine.submit, head.step, head.logits

        def note(request: Request) -> Handle:
            handle = submit(request)
            self._states.append(engine._waiting[-1].state)
            return handle

        def listen(hidden: Tensor, states: Sequence[Any]) -> Any:
            for state, row in zip(states, logits(hidden), strict=True):
                self._scores.setdefault(id(state), []).append(row.float().clone())
            return step(hidden, states)

        engine.submit = note  # type: ignore[method-assign]
        head.step = listen  # type: ignore[method-assign]

    def tokens(self, which: int = 0) -> list[int]:
        """Tokens of one sequence."""
        found: list[int] = self._states[which].tokens
        return found

    def scores(self, which: int = 0) -> Tensor:
        """Scores of one sequence, `[tokens, v]`."""
        return torch.stack(self._scores[id(self._states[which])])


def chat(model: Model, text: str, *pictures: Image.Image) -> Prompt:
    """A question about pictures, rendered by the template."""
    parts = [{"type": "image", "image": image} for image in pictures]
    return model.prompt([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
