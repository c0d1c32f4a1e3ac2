"""Checkpoints out: the official layout, written whole or not at all."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfm2_mm import saving
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import CheckpointError, InputError
from lfm2_mm.saving import official_names, save_checkpoint
from lfm2_mm.weights import backbone_tensors, stored_head

CONFIG = {"model_type": "lfm2", "hidden_size": 4, "note": "größer"}
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.embedding_norm.weight"


def state() -> dict[str, Tensor]:
    return {EMBED: torch.randn(6, 4), NORM: torch.ones(4)}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_official_names() -> None:
    own = {"embedding_norm.weight": torch.ones(4), HEAD: torch.ones(1)}
    assert list(official_names(own, "text")) == [NORM, HEAD]
    assert list(official_names(own, "vl")) == ["model.language_model.embedding_norm.weight", HEAD]


def test_round_trip(tmp_path: Path) -> None:
    tensors = state()
    save_checkpoint(
        tmp_path / "a" / "b", tensors, CONFIG, extra_files={"1_Dense/config.json": "{}"}
    )
    assert files(tmp_path) == [
        "a/b/1_Dense/config.json",
        "a/b/config.json",
        "a/b/model.safetensors",
    ]
    point = Checkpoint.open(tmp_path / "a" / "b")
    assert point.config == CONFIG
    assert all(torch.equal(point.tensor(name), tensor) for name, tensor in tensors.items())
    with safe_open(point.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for path in (point.folder, point.folder / "model.safetensors"):  # as open as its neighbours
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "file").touch()
        neighbour = tmp_path / ("plain" if path.is_dir() else "file")
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(neighbour.stat().st_mode)


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(5)}  # 32 bytes each
    tensors["big"] = torch.ones(100)
    save_checkpoint(tmp_path / "t", tensors, CONFIG, max_shard_bytes=64, metadata={"by": "test"})
    index = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 140, "total_size": 560}
    one, two, three, four = (f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4))
    assert index["weight_map"] == {
        "big": four, "t0": one, "t1": one, "t2": two, "t3": two, "t4": three
    }  # fmt: skip
    assert len(files(tmp_path / "t")) == 6
    point = Checkpoint.open(tmp_path / "t")
    assert all(torch.equal(point.tensor(name), tensor) for name, tensor in tensors.items())


def test_tied_head_is_left_out(tmp_path: Path) -> None:
    tensors = state()
    for head in (tensors[EMBED], tensors[EMBED].clone()):
        save_checkpoint(tmp_path / "t", {HEAD: head, **tensors}, CONFIG)
        assert Checkpoint.open(tmp_path / "t").names == (EMBED, NORM)


def test_untied_head_is_written_even_when_equal(tmp_path: Path) -> None:
    tensors = state()
    config = {**CONFIG, "tie_word_embeddings": False}
    save_checkpoint(tmp_path / "t", {**tensors, HEAD: tensors[EMBED]}, config)
    head = stored_head(Checkpoint.open(tmp_path / "t"))
    assert head is not None
    assert torch.equal(head, tensors[EMBED])
    with pytest.raises(InputError, match=r"lm_head\.weight differs from .* the config ties them"):
        save_checkpoint(tmp_path / "t", {**tensors, HEAD: torch.randn(6, 4)}, CONFIG)


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    views = {"all": base, "rows": base[1:3], "turned": base.T, "same": base, "copy": base[:, ::2]}
    save_checkpoint(tmp_path / "t", views, CONFIG)
    point = Checkpoint.open(tmp_path / "t")
    assert all(torch.equal(point.tensor(name), tensor) for name, tensor in views.items())


def test_side_files_travel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "processor_config.json",
        "LICENSE",
        "additional_chat_templates/rag.jinja",
        "model.safetensors",
        "config.json",
        "pytorch_model.bin",
        "modeling_custom.py",
    ):
        (source / name).write_text(name)
    extra: dict[str, str | bytes] = {"tokenizer.json": "mine", "README.md": b"# hi"}
    save_checkpoint(tmp_path / "t", state(), CONFIG, copy_from=source, extra_files=extra)
    assert files(tmp_path / "t") == [
        "LICENSE",
        "README.md",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "t" / "tokenizer.json").read_text() == "mine"
    assert (tmp_path / "t" / "LICENSE").read_text() == "LICENSE"
    with pytest.raises(InputError, match="there is no folder .*absent to copy the tokenizer from"):
        save_checkpoint(tmp_path / "u", state(), CONFIG, copy_from=tmp_path / "absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "t"]


def test_overwriting_a_checkpoint_it_maps(tmp_path: Path) -> None:
    folder, tensors = tmp_path / "t", state()
    save_checkpoint(folder, tensors, CONFIG, max_shard_bytes=20)
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("mine")
    (folder / "tokenizer.json").write_text("old")
    mapped = {name: Checkpoint.open(folder).tensor(name) for name in tensors}
    save_checkpoint(folder, mapped, {**CONFIG, "note": "new"})
    assert files(folder) == ["config.json", "model.safetensors", "runs/log.txt", "tokenizer.json"]
    point = Checkpoint.open(folder)
    assert point.config["note"] == "new"
    assert all(torch.equal(point.tensor(name), tensor) for name, tensor in tensors.items())

    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.json").write_text("{}")
    save_checkpoint(folder, tensors, CONFIG, copy_from=other)  # another tokenizer: no mixture
    assert files(folder) == ["config.json", "model.safetensors", "runs/log.txt", "vocab.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "t"]


def test_saving_through_a_link(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "real", state(), CONFIG)
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(tmp_path / "link", state(), {**CONFIG, "note": "new"})
    assert (tmp_path / "link").is_symlink()
    assert Checkpoint.open(tmp_path / "real").config["note"] == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_interruption_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    folder, tensors = tmp_path / "t", state()
    if existing:
        save_checkpoint(folder, tensors, CONFIG)
    calls: list[Any] = []

    def stop_at_the_second(*args: Any) -> None:
        calls.append(args)
        assert not (args[1].parent / "config.json").exists()
        if len(calls) == 2:
            raise error
        save_file(*args)

    monkeypatch.setattr(saving, "save_file", stop_at_the_second)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_checkpoint(folder, {n: t + 1 for n, t in tensors.items()}, {}, max_shard_bytes=20)
    if isinstance(error, OSError):
        assert "could not be written ([Errno 28] No space left on device); check the free" in str(
            caught.value
        )
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == (["t"] if existing else [])
    if existing:
        point = Checkpoint.open(folder)
        assert point.config == CONFIG
        assert torch.equal(point.tensor(EMBED), tensors[EMBED])


def test_a_failed_move_restores_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    save_checkpoint(folder, state(), CONFIG)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".saving-" in self.name:
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_checkpoint(folder, state(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert Checkpoint.open(folder).config == CONFIG


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="docs is not empty and holds no checkpoint, so it is not"):
        save_checkpoint(tmp_path / "docs", state(), CONFIG)
    with pytest.raises(InputError, match=r"thesis\.txt is a file, not a folder; choose another"):
        save_checkpoint(tmp_path / "docs" / "thesis.txt", state(), CONFIG)
    with pytest.raises(InputError, match="there are no tensors to save; pass"):
        save_checkpoint(tmp_path / "t", {}, CONFIG)
    with pytest.raises(
        InputError, match="a and 0 other tensors have no values yet; load the weights"
    ):
        save_checkpoint(tmp_path / "t", {"a": torch.empty(1, device="meta")}, CONFIG)
    with pytest.raises(InputError, match="the config cannot be written as JSON .* plain values"):
        save_checkpoint(tmp_path / "t", state(), {"dtype": torch.bfloat16})
    for name in ("../x", "/x", "", "a\\b"):
        with pytest.raises(InputError, match="is not inside the checkpoint; rename it"):
            save_checkpoint(tmp_path / "t", state(), CONFIG, extra_files={name: ""})
    for name in ("config.json", "./config.json", "model.safetensors"):
        with pytest.raises(InputError, match="is written from the config and the state; leave it"):
            save_checkpoint(tmp_path / "t", state(), CONFIG, extra_files={name: ""})
    assert [p.name for p in tmp_path.iterdir()] == ["docs"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", state(), CONFIG)
    assert files(tmp_path / "empty") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_transformers_loads_what_we_save(tmp_path: Path, tied: bool, moe: bool) -> None:
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": tied,
    }
    if moe:
        experts: dict[str, Any] = {
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        config: Any = hf.Lfm2MoeConfig(**sizes, **experts, num_dense_layers=1)
    else:
        config = hf.Lfm2Config(**sizes, block_multiple_of=16)
    torch.manual_seed(0)
    kind: Any = hf.Lfm2MoeForCausalLM if moe else hf.Lfm2ForCausalLM
    theirs: Any = kind(config).eval().requires_grad_(False)
    theirs.save_pretrained(tmp_path / "theirs")
    point = Checkpoint.open(tmp_path / "theirs")
    own = backbone_tensors(point)
    if (head := stored_head(point)) is not None:
        own[HEAD] = head
    save_checkpoint(
        tmp_path / "ours",
        official_names(own, "text"),
        point.config,
        copy_from=point.folder,
        max_shard_bytes=20_000,
    )
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(1, 12)[None]
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
