"""Names in LFM2-Audio checkpoints: every official key has its place, read and written."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lfm2_audio.adapter import Adapter
from lfm2_audio.checkpoint import (
    ADAPTER,
    AUDIO_EMBEDDING,
    CONFORMER,
    DEPTHFORMER,
    LFM_RULES,
    RULES,
    check_names,
    part_tensors,
)
from lfm2_audio.config import AudioConfig
from lfm2_audio.conformer import Conformer
from lfm2_audio.depthformer import Depthformer
from lfm2_audio.frames import FrameEmbedding
from lfm2_audio.saving import save_model
from lfm2_mm.backbone import Backbone
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import TensorMismatch
from lfm2_mm.loading import LoadOptions, build_backbone
from lfm2_mm.weights import load_weights
from tests.audio import official

UNREAD = {
    "audio_embedding.embedding_norm.weight",
    "audio_embedding.to_logits.weight",
    "audio_loss_weights",
    "codebook_offsets",
    "conformer.layers.0.conv.batch_norm.num_batches_tracked",
    "conformer.layers.1.conv.batch_norm.num_batches_tracked",
}
COPIES = {f"depth_embeddings.{k}.to_logits.weight" for k in range(8)}


def build(checkpoint: Checkpoint) -> tuple[Backbone, dict[str, nn.Module]]:
    config = AudioConfig.from_dict(checkpoint.config)
    check_names(checkpoint)
    options = LoadOptions(device=torch.device("cpu"), dtype=torch.float32)
    backbone, _ = build_backbone(checkpoint, options, rules=LFM_RULES)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            CONFORMER: Conformer(config.encoder),
            ADAPTER: Adapter(config.encoder.hidden_size, config.backbone.hidden_size),
            AUDIO_EMBEDDING: FrameEmbedding(config),
            DEPTHFORMER: Depthformer(config),
        }
    for part, module in parts.items():
        tensors = part_tensors(checkpoint, part, tied=config.depthformer.tie)
        load_weights(
            module.eval(), tensors, dtype=torch.float32, device="cpu", where=checkpoint.name
        )
    return backbone, parts


def values(backbone: Backbone, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    found = {f"lfm.{name}": t for name, t in backbone.state_dict().items()}
    for part, module in parts.items():
        found |= {f"{part}|{name}": t for name, t in module.state_dict().items()}
    return found


@cache
def released() -> tuple[Backbone, dict[str, nn.Module]]:
    return build(Checkpoint.open(official.folder()))


def test_every_official_tensor_is_read_or_known_to_be_spare() -> None:
    checkpoint = Checkpoint.open(official.folder())
    assert UNREAD | COPIES <= set(checkpoint.names)
    read = sum(len(part_tensors(checkpoint, part, tied=True)) for part in RULES)
    backbone = [name for name in checkpoint.names if name.startswith("lfm.")]
    assert read + len(backbone) + len(UNREAD | COPIES) == len(checkpoint.names)


def test_stored_copies_change_nothing(tmp_path: Path) -> None:
    """Trap 5: tied copies, counters and the audio head may be stored or not."""
    lean = Checkpoint.open(official.write(tmp_path / "lean", copies=False))
    assert not (UNREAD | COPIES) & set(lean.names)
    mine, wanted = values(*build(lean)), values(*released())
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, atol=0, rtol=0)


def test_a_nonsense_audio_head_changes_nothing(tmp_path: Path) -> None:
    """Trap 5: nothing reads it."""
    noise = official.numbers("nonsense", 3, 5)
    spare = [*sorted(UNREAD), "conformer.pos_enc.pe"]
    folder = official.write(tmp_path / "odd", tensors=dict.fromkeys(spare, noise))
    mine = values(*build(Checkpoint.open(folder)))
    for name, tensor in values(*released()).items():
        torch.testing.assert_close(mine[name], tensor, atol=0, rtol=0)


def test_the_backbone_is_wide_as_its_weights_are() -> None:
    """Trap 4: the config says 192, the weights are 128 wide (released: 12288 and 8192)."""
    backbone, _ = released()
    assert official.CONFIG["lfm"]["block_ff_dim"] == 192
    assert backbone.config.ffn_size == 128


def test_untied_codebooks_have_matrices_of_their_own(tmp_path: Path) -> None:
    other = official.numbers("own head", 2049, 64)
    folder = official.write(
        tmp_path / "untied",
        config={"depthformer": {"layers": 2, "dim": 64, "tie": False}},
        tensors={"depth_embeddings.3.to_logits.weight": other},
    )
    _, parts = build(Checkpoint.open(folder))
    state = parts[DEPTHFORMER].state_dict()
    stored = state["depth_embeddings.3.to_logits.weight"]
    torch.testing.assert_close(stored, other.bfloat16().float(), atol=0, rtol=0)
    assert not torch.equal(stored, state["depth_embeddings.3.embedding.weight"])


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    folder = official.write(
        tmp_path / "torn",
        tensors={"depth_embeddings.3.to_logits.weight": official.numbers("own head", 2049, 64)},
    )
    with pytest.raises(
        TensorMismatch,
        match=r"torn stores depth_embeddings\.3\.to_logits\.weight with other values than "
        r"depth_embeddings\.3\.embedding\.weight, but its config ties them; set depthformer\.tie",
    ):
        build(Checkpoint.open(folder))


@pytest.mark.parametrize("name", ["conformer.layers.2.norm_out.weight", "vocoder.weight"])
def test_an_unknown_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = official.write(tmp_path / "more", tensors={name: torch.zeros(32)})
    with pytest.raises(TensorMismatch, match=name.removeprefix("conformer.")):
        build(Checkpoint.open(folder))


@pytest.mark.parametrize(
    "name",
    [
        "lfm.layers.0.operator_norm.weight",
        "conformer.layers.1.self_attn.pos_bias_u",
        "conformer.layers.0.conv.batch_norm.running_var",
        "audio_adapter.model.3.bias",
        "audio_embedding.embedding.weight",
        "depth_linear.bias",
        "depth_embeddings.7.embedding_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = official.write(tmp_path / "less", tensors={name: None})
    own = name.partition(".")[2].removeprefix("model.")
    with pytest.raises(TensorMismatch, match=rf"1 tensor is missing \(.*{own.split('.')[-1]}"):
        build(Checkpoint.open(folder))


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    name = "conformer.layers.0.conv.pointwise_conv1.weight"
    folder = official.write(tmp_path / "bent", tensors={name: torch.zeros(64, 31, 1)})
    with pytest.raises(TensorMismatch, match=r"is \[64, 31\], the model needs \[64, 32\]"):
        build(Checkpoint.open(folder))


def save(folder: Path) -> Path:
    backbone, parts = released()
    source = Checkpoint.open(official.folder())
    save_model(
        folder, backbone=backbone, parts=parts, config=source.config, copy_from=source.folder
    )
    return folder


def test_what_is_saved_is_the_official_layout(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path / "saved") / "model.safetensors")
    layout = official.layout()["model"]
    assert set(stored) == set(layout) - UNREAD - COPIES
    wanted = official.state("model")
    for name, tensor in stored.items():
        assert list(tensor.shape) == layout[name]
        torch.testing.assert_close(tensor, wanted[name], atol=0, rtol=0)


def test_what_is_saved_loads_again_with_config_tokenizer_and_codec(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text()) == official.CONFIG  # no model_type
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "audio_detokenizer"} <= names
    assert (folder / "audio_detokenizer" / "model.safetensors").is_file()
    mine = values(*build(Checkpoint.open(folder)))
    for name, tensor in values(*released()).items():
        torch.testing.assert_close(mine[name], tensor, atol=0, rtol=0)


def test_mimi_travels_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    official.write(source, mimi=True)
    backbone, parts = build(Checkpoint.open(source))
    for target in (tmp_path / "saved", source):  # into its own place as well
        save_model(target, backbone=backbone, parts=parts, config=official.CONFIG, copy_from=source)
        assert (target / official.MIMI_FILE).stat().st_size > 10_000
        check_names(Checkpoint.open(target))
