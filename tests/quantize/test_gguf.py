"""GGUF files of LFM2: the very same numbers, names and ids; damage and strangers refused."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

import lfm2_mm
from lfm2_evals.bench.gguf_writer import write_gguf
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    MissingExtra,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
)
from lfm2_mm.kernels.linear import dequantize
from lfm2_mm.quantize.fitting import packed_weight
from lfm2_mm.quantize.gguf import GgufCheckpoint
from lfm2_mm.tokenizer import Tokenizer
from tests import oracle

IDS = list(range(40, 70))


def written(folder: Path, variant: str, body: str, head: str | None = None) -> Path:
    checkpoint = Checkpoint.open(oracle.folder(variant))
    config = BackboneConfig.from_dict(checkpoint.config)
    path = folder / f"{variant}-{body}.gguf"
    write_gguf(checkpoint, config, path, body, head or body)
    return path


@pytest.mark.parametrize("variant", ["dense", "untied", "moe"])
def test_fp32_gives_the_same_scores(variant: str, tmp_path: Path) -> None:
    wanted = lfm2_mm.load(oracle.folder(variant), threads=1)
    found = lfm2_mm.load(written(tmp_path, variant, "F32"), threads=1)
    a, b = wanted.backbone.config, found.backbone.config
    names = ("layer_types", "ffn_size", "n_kv_heads", "rope_theta", "conv_taps", "n_experts")
    assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]
    assert torch.equal(found.logits(IDS), wanted.logits(IDS))
    assert found.head.eos_ids == frozenset({7})


@pytest.mark.parametrize("body", ["F16", "BF16"])
def test_halves_are_taken_as_they_are(body: str, tmp_path: Path) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[body]
    path = written(tmp_path, "dense", body)
    own, stored = Checkpoint.open(oracle.folder("dense")), GgufCheckpoint.open(path)
    name = "model.layers.0.conv.in_proj.weight"
    assert stored.dtype(name) == dtype
    assert torch.equal(stored.tensor(name), own.tensor(name).to(dtype))
    assert stored.shape("model.layers.0.conv.conv.weight") == (64, 1, 3)
    assert lfm2_mm.load(path, threads=1).logits(IDS).isfinite().all()


@pytest.mark.parametrize("body", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_blocks_become_packed_weights_of_the_same_numbers(
    body: str, variant: str, tmp_path: Path
) -> None:
    own = Checkpoint.open(oracle.folder(variant))
    stored = GgufCheckpoint.open(written(tmp_path, variant, body, "Q8_0"))
    kind = GGMLQuantizationType[body]
    packed = [name for name in stored.names if name.endswith(".codes")]
    assert len(packed) > 10
    for name in packed:
        stem = name.removesuffix(".codes")
        if "embed_tokens" in stem or stem not in own.names:
            continue
        weight = own.tensor(stem).float().numpy()
        wanted = torch.from_numpy(quants.dequantize(quants.quantize(weight, kind), kind))
        parts = {part: stored.tensor(f"{stem}.{part}") for part in ("codes", "scales")}
        for part, buffer in parts.items():
            assert stored.shape(f"{stem}.{part}") == tuple(buffer.shape)
            assert stored.dtype(f"{stem}.{part}") == buffer.dtype
        found = dequantize(packed_weight(stem, parts, wanted.shape, "here"))
        assert torch.equal(found, wanted)


def test_a_packed_file_computes(tmp_path: Path) -> None:
    whole = lfm2_mm.load(oracle.folder("dense"), threads=1).logits(IDS)
    model = lfm2_mm.load(written(tmp_path, "dense", "Q8_0"), threads=1)
    a, b = whole.log_softmax(-1), model.logits(IDS).log_softmax(-1)
    assert float((a.exp() * (a - b)).sum(-1).mean()) < 0.02
    model.save(tmp_path / "packed")
    shutil.copy(oracle.folder("dense") / "tokenizer.json", tmp_path / "packed")
    again = lfm2_mm.load(tmp_path / "packed", threads=1)
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_other_types_are_packed_in_eight_bits(tmp_path: Path) -> None:
    model = lfm2_mm.load(written(tmp_path, "dense", "Q4_0", "Q5_1"), threads=1)
    assert model.backbone.embed_tokens.weight.scheme == "int8-g32"
    assert model.backbone.layers[0].conv.in_proj.weight.scheme == "int4-g32"
    with pytest.raises(SettingError, match="is packed as gguf already"):
        lfm2_mm.load(tmp_path / "dense-Q4_0.gguf", quantize="int4")


def test_plain_files_can_be_packed(tmp_path: Path) -> None:
    path = written(tmp_path, "dense", "BF16")
    model = lfm2_mm.load(path, quantize="int8", threads=1)
    assert model.backbone.layers[0].conv.in_proj.weight.scheme == "int8-g32"


def test_the_tokenizer_comes_from_the_metadata(tmp_path: Path) -> None:
    own = Tokenizer.load(oracle.folder("dense"))
    found = lfm2_mm.load(written(tmp_path, "dense", "BF16"), threads=1).tokenizer
    text = "What colour is it?\n\n  Größe 12345 <|im_end|> naïve 你好 🙂 we'll"
    assert found.encode(text) == own.encode(text)
    assert found.decode(found.encode(text), skip_special=False) == text
    assert found.special_strings == own.special_strings
    assert found.chat_template == own.chat_template
    assert (found.bos_id, found.eos_id, found.pad_id) == (own.bos_id, own.eos_id, own.pad_id)
    assert found.vocab_size == own.vocab_size


def test_a_tokenizer_beside_the_file_goes_first(tmp_path: Path) -> None:
    path = written(tmp_path, "dense", "BF16")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(oracle.folder("dense") / file, tmp_path)
    assert GgufCheckpoint.open(path).tokenizer.vocab_size == len(oracle.hf_tokenizer())


def small(path: Path, arch: str = "lfm2", extra: dict[str, Any] | None = None) -> Path:
    """A file with metadata and hardly a tensor."""
    out = GGUFWriter(path, arch)
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_block_count(1)
    out.add_feed_forward_length(32)
    out.add_head_count(2)
    out.add_head_count_kv([1])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(1e6)
    out.add_shortconv_l_cache(3)
    out.add_vocab_size(64)
    for name, tensor in {"token_embd.weight": torch.zeros(64, 32), **(extra or {})}.items():
        out.add_tensor(name, tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "a.gguf", "llama")
    with pytest.raises(UnsupportedArchitecture) as error:
        lfm2_mm.load(path)
    assert str(error.value) == (
        f"{path} is a GGUF file of the architecture 'llama', but only those of text LFM2 (lfm2, "
        "lfm2moe) are read; use the safetensors checkpoint"
    )


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "a.gguf", extra={"v.patch_embd.weight": torch.zeros(2, 2)})
    with pytest.raises(TensorMismatch) as error:
        lfm2_mm.load(path)
    assert str(error.value) == (
        f"{path} holds the tensor v.patch_embd.weight, which no text LFM2 has; use a file of a "
        "text model"
    )


def test_missing_weights_and_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match="are missing .*use a checkpoint whose weights"):
        lfm2_mm.load(small(tmp_path / "a.gguf"))
    with pytest.raises(CheckpointError) as error:
        _ = GgufCheckpoint.open(tmp_path / "a.gguf", "a.gguf").tokenizer
    assert str(error.value) == (
        "the tokenizer in a.gguf is of the kind None, None, which cannot be built from a GGUF "
        "file; put the tokenizer.json of the original checkpoint beside it"
    )


@pytest.mark.parametrize("keep", [0, 10, 200, 3000, 0.5, 0.99])
def test_cut_files_are_refused(keep: float, tmp_path: Path) -> None:
    path = written(tmp_path, "dense", "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptWeights, match="cannot be read as GGUF .*; download the file again"):
        lfm2_mm.load(path)


def test_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CorruptWeights, match="cannot be read as GGUF"):
        lfm2_mm.load(path)
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 4000)
    with pytest.raises(CorruptWeights, match="cannot be read as GGUF"):
        lfm2_mm.load(path)


def altered(path: Path, key: bytes, old: bytes, new: bytes) -> Path:
    """The file with other bytes behind a key of its metadata."""
    content = path.read_bytes()
    place = content.index(key) + len(key)
    assert content[place:].startswith(old) and len(old) == len(new)
    path.write_bytes(content[:place] + new + content[place + len(old) :])
    return path


@pytest.mark.parametrize(
    ("key", "old", "new", "why"),
    [
        # an array of bytes that would end far behind the file: the library takes it for endless
        (
            b"head_count_kv",
            b"\x09\0\0\0\x05\0\0\0\x01\0\0\0\0\0\0\0",
            b"\x09\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x40",
            "it ends within its metadata",
        ),
        # text that is none
        (b"general.architecture", b"\x08\0\0\0\4\0\0\0\0\0\0\0l",
         b"\x08\0\0\0\4\0\0\0\0\0\0\0\xff", "'utf-8' codec"),
        # text in the place of a number
        (b"lfm2.block_count", b"\x04\0\0\0\1\0\0\0", b"\x08\0\0\0\1\0\0\0", ""),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read_are_refused(
    key: bytes, old: bytes, new: bytes, why: str, tmp_path: Path
) -> None:
    path = altered(small(tmp_path / "a.gguf"), key, old, new)
    with pytest.raises(
        CorruptWeights, match=rf"cannot be read as GGUF \(.*{why}.*; download the f"
    ):
        lfm2_mm.load(path)


def test_types_that_the_library_cannot_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "dense", "Q8_0", "Q5_1")

    def cannot(*_: Any) -> Any:
        raise NotImplementedError("Dequantization for Q5_1 is not yet implemented")

    monkeypatch.setattr(quants, "dequantize", cannot)
    with pytest.raises(CheckpointError) as error:
        lfm2_mm.load(path, threads=1)
    assert str(error.value) == (
        f"{path} stores token_embd.weight as Q5_1, which the gguf library cannot read; use a file "
        "in Q4_0, Q8_0 or BF16"
    )


def test_the_library_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path / "a.gguf")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra) as error:
        lfm2_mm.load(path)
    assert str(error.value) == (
        "reading a.gguf needs the gguf library; pip install 'lfm2-mm[gguf]'"
    )
