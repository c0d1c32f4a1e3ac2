"""Checkpoints in: opening folders, refusing damage, mapping names, filling modules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import CheckpointError, CorruptWeights, ModelNotFound, TensorMismatch
from lfm2_mm.mixing import Whole
from lfm2_mm.weights import (
    BACKBONE_RULES,
    Rule,
    backbone_rules,
    backbone_tensors,
    claimed_tensors,
    head_is_tied,
    load_weights,
    rename,
    split_experts,
    stored_head,
    unclaimed,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "lfm2", **config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path, weight_map: dict[str, Any], **files: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- opening


def test_opens_single_file(tmp_path: Path) -> None:
    stored = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
    point = Checkpoint.open(write(tmp_path / "tiny", stored, hidden_size=3))
    assert (point.name, point.folder, point.names) == ("tiny", tmp_path / "tiny", ("a", "b"))
    assert point.config == {"model_type": "lfm2", "hidden_size": 3}
    assert point.nbytes == 6 * 4 + 4 * 2
    assert point.shape("b") == (2, 3)
    assert point.dtype("a") is torch.bfloat16
    assert torch.equal(point.tensor("b"), stored["b"])
    assert Checkpoint.open(tmp_path / "tiny", name="org/tiny").name == "org/tiny"


def test_opens_shards_and_any_single_file(tmp_path: Path) -> None:
    one, two = torch.zeros(2), torch.ones(3)
    point = Checkpoint.open(
        shard(
            tmp_path / "s",
            {"one": "x.safetensors", "two": "y.safetensors"},
            x={"one": one, "two": -two},  # the index decides where a tensor comes from
            y={"two": two},
        )
    )
    assert point.names == ("one", "two")
    assert torch.equal(point.tensor("two"), two)
    folder = write(tmp_path / "odd", {"one": one})
    (folder / "model.safetensors").rename(folder / "weights-v2.safetensors")
    assert Checkpoint.open(str(folder)).names == ("one",)


def test_side_files(tmp_path: Path) -> None:
    point = Checkpoint.open(write(tmp_path / "t", {"a": torch.zeros(1)}))
    (point.folder / "generation_config.json").write_text('\ufeff{"temperature": 0.1}')
    (point.folder / "list.json").write_text("[1]")
    (point.folder / "broken.json").write_text("{")
    (point.folder / "deep.json").write_text("[" * 100_000)
    assert point.json("generation_config.json") == {"temperature": 0.1}
    assert point.json("absent.json") is None
    assert point.file("list.json") == point.folder / "list.json"
    assert point.file("absent") is None
    with pytest.raises(CheckpointError, match=r"list\.json holds a JSON list, not an object; down"):
        point.json("list.json")
    for name in ("broken.json", "deep.json"):
        with pytest.raises(CheckpointError, match=rf"{name} is not readable JSON .*; download"):
            point.json(name)
    for name in ("../config.json", "/etc/hostname", "a\\..\\b"):
        with pytest.raises(CheckpointError, match="outside its folder; use a checkpoint from"):
            point.file(name)


def test_json_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = Checkpoint.open(write(tmp_path / "t", {"a": torch.zeros(1)}))
    monkeypatch.setattr("lfm2_mm.checkpoint._JSON_LIMIT", 10)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, over the limit of 10 for JSON"):
        point.json("config.json")


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no checkpoint folder .*nowhere; check"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json; point to a folder as"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds an adapter, so load its base model"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.bin"]
)
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x02")
    message = f"as {re.escape(name)}, a pickle format .* never read here; convert it to safetensors"
    with pytest.raises(CorruptWeights, match=message):
        Checkpoint.open(tmp_path)


def test_pickles_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", {"a": torch.zeros(1)})
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert Checkpoint.open(folder).names == ("a",)


def test_no_usable_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptWeights, match=r"has a config\.json but no weight file; use"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(CorruptWeights, match=r"but only model-Q4_0\.gguf; use the safetensors"):
        Checkpoint.open(tmp_path)
    for name in ("x", "y"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptWeights, match=r"holds 2 safetensors files \(x\.safetensors, …\)"):
        Checkpoint.open(tmp_path)


# --- damage


def damaged(kind: str, whole: bytes) -> bytes:
    header = int.from_bytes(whole[:8], "little")
    return {
        "empty": b"",
        "short": whole[:4],
        "header cut": whole[: 8 + header // 2],
        "data cut": whole[:-5],
        "data added": whole + b"123",
        "absurd header": (2**62).to_bytes(8, "little") + whole[8:],
        "huge header": (10**9).to_bytes(8, "little") + whole[8:],
        "no json": whole[:8] + b"\x00" * header + whole[8 + header :],
        "lfs": b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 1\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", r"\(the file is empty\); download it again"),
        ("lfs", r"\(it is a Git LFS pointer, not the weights\); fetch the file with"),
        *(
            (kind, r"\(.+\); download it again")
            for kind in (
                "short",
                "header cut",
                "data cut",
                "data added",
                "absurd header",
                "huge header",
                "no json",
            )
        ),
    ],
)
def test_damaged_file(tmp_path: Path, kind: str, words: str) -> None:
    folder = write(tmp_path / "t", {"a": torch.arange(12.0)})
    path = folder / "model.safetensors"
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(CorruptWeights, match=rf"model\.safetensors cannot be read .*{words}") as e:
        Checkpoint.open(folder)
    assert "\n" not in str(e.value)


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CorruptWeights, match=r"\(Is a directory\); check the file"):
        Checkpoint.open(tmp_path)


def test_strange_number_format(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", {"a": torch.arange(3, dtype=torch.uint8)})
    path = folder / "model.safetensors"
    header = b'{"a":{"dtype":"F8_E8M0","shape":[3],"data_offsets":[0,3]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(CorruptWeights, match="stores a in the number format F8_E8M0, which is not"):
        Checkpoint.open(folder)


def test_broken_index(tmp_path: Path) -> None:
    x = {"a": torch.zeros(1)}
    where = {"a": "x.safetensors"}
    with pytest.raises(CorruptWeights, match=r"names the shard y\.safetensors, which is not there"):
        Checkpoint.open(shard(tmp_path / "1", where | {"b": "y.safetensors"}, x=x))
    with pytest.raises(CorruptWeights, match=r"says that b is in x\.safetensors, but .* \(1 such"):
        Checkpoint.open(shard(tmp_path / "2", where | {"b": "x.safetensors"}, x=x))
    with pytest.raises(CorruptWeights, match="has no weight_map; download"):
        Checkpoint.open(shard(tmp_path / "3", {}))
    for bad in ("../1/x.safetensors", "/x.safetensors", "..\\x.safetensors", "x.bin", 7):
        with pytest.raises(CorruptWeights, match="points to .*, which is no safetensors file in"):
            Checkpoint.open(shard(tmp_path / "4", {"a": bad}, x=x))


# --- mapping


def resident(path: Path) -> tuple[list[range], int]:
    """Address ranges at which a file is mapped, and how many of its bytes are in memory."""
    ranges, kib, inside = [], 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = line.endswith(str(path))
            if inside:
                ranges.append(range(int(match[1], 16), int(match[2], 16)))
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return ranges, kib * 1024


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    n, size = 200, 2**20  # a sparse file: 200 MB long, next to nothing on the disk
    entry = '"t{0}":{{"dtype":"F32","shape":[512,512],"data_offsets":[{1},{2}]}}'
    entries = ",".join(entry.format(i, i * size, (i + 1) * size) for i in range(n))
    header = ("{" + entries + "}").encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "config.json").write_text("{}")
    path = (tmp_path / "model.safetensors").resolve()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n * size)

    point = Checkpoint.open(tmp_path)
    assert point.nbytes == n * size
    assert resident(path)[1] < 2 * size
    module = nn.Linear(512, 512, bias=False, device="meta")
    fill(module, {"weight": point.tensor("t7")})
    assert module.weight.sum() == 0.0  # touches one tensor
    ranges, in_memory = resident(path)
    assert any(module.weight.data_ptr() in r for r in ranges)
    assert size <= in_memory < 20 * size
    for tensor in claimed_tensors(point, [Rule("t", "")]).values():
        assert any(tensor.data_ptr() in r for r in ranges)


def test_writes_stay_out_of_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", {"a": torch.ones(4)})
    Checkpoint.open(folder).tensor("a").mul_(3)
    assert torch.equal(Checkpoint.open(folder).tensor("a"), torch.ones(4))


def test_unknown_name(tmp_path: Path) -> None:
    point = Checkpoint.open(write(tmp_path / "tiny", {"a": torch.zeros(1)}))
    with pytest.raises(TensorMismatch, match="tiny stores no tensor 'b' among its 1; use"):
        point.tensor("b")


# --- names


def test_first_matching_rule_wins() -> None:
    rules = [Rule("model.tower.inner.", "t."), Rule("model.tower.", "t."), Rule("model.", "m.")]
    names = ["model.tower.inner.x", "model.tower.y", "model.z", "other"]
    assert rename(names, rules) == {"t.x": names[0], "t.y": names[1], "m.z": names[2]}
    assert unclaimed(names, rules) == ["other"]


def test_two_names_for_one() -> None:
    with pytest.raises(TensorMismatch, match=r"model\.layers\.0\.x and layers\.0\.x both stand"):
        rename(["model.layers.0.x", "layers.0.x"], BACKBONE_RULES)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
def test_backbone_layouts(prefix: str) -> None:
    own = ["embed_tokens.weight", "embedding_norm.weight", "layers.3.conv.conv.weight"]
    others = ["model.vision_tower.layers.0.w", "vision_tower.layers.0.w", HEAD]
    stored = [prefix + name for name in own]
    assert rename([*stored, *others], BACKBONE_RULES) == dict(zip(own, stored, strict=True))


def test_backbone_under_a_prefix_of_its_own() -> None:
    names = ["lfm.layers.0.x", "conformer.layers.0.x"]
    assert rename(names, backbone_rules("lfm.")) == {"layers.0.x": "lfm.layers.0.x"}


def test_fused_experts_are_sliced_without_a_copy() -> None:
    up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    stem = "layers.2.feed_forward.experts"
    split = split_experts({f"{stem}.gate_up_proj": up, f"{stem}.down_proj": down, "x": up})
    assert len(split) == 10
    assert torch.equal(split[f"{stem}.1.w1.weight"], up[1, :4])
    assert torch.equal(split[f"{stem}.1.w3.weight"], up[1, 4:])
    assert torch.equal(split[f"{stem}.2.w2.weight"], down[2])
    assert split[f"{stem}.1.w1.weight"].data_ptr() == up[1].data_ptr()
    with pytest.raises(TensorMismatch, match=r"gate_up_proj have the shape \[3, 7, 5\], not"):
        split_experts({f"{stem}.gate_up_proj": up[:, :7]})


# --- heads


@pytest.mark.parametrize(
    ("config", "stored", "tied"),
    [
        ({}, [EMBED], True),
        ({"tie_word_embeddings": False}, [EMBED], False),
        ({"tie_word_embeddings": False, "tie_embedding": True}, [EMBED], True),
        ({"tie_word_embeddings": True, "tie_embedding": False}, [EMBED], False),
        ({"text_config": {"tie_embedding": False}}, [EMBED], True),
        ({}, [EMBED, HEAD], False),
        ({}, [EMBED, "language_model.lm_head.weight"], False),
        ({}, ["model.lm_head.weight"], True),
    ],
)
def test_head_is_tied(config: dict[str, Any], stored: list[str], tied: bool) -> None:
    assert head_is_tied(config, stored) is tied


def test_stored_head(tmp_path: Path) -> None:
    embed, head = torch.randn(6, 4), torch.randn(6, 4)

    def opened(tensors: dict[str, Tensor], **config: Any) -> Checkpoint:
        return Checkpoint.open(write(tmp_path / "t", tensors, **config))

    assert stored_head(opened({EMBED: embed})) is None
    assert stored_head(opened({EMBED: embed, HEAD: embed.clone()})) is None
    for config in ({}, {"tie_word_embeddings": False}):
        found = stored_head(opened({EMBED: embed, HEAD: head}, **config))
        assert found is not None
        assert torch.equal(found, head)
    own = stored_head(opened({EMBED: embed, HEAD: embed.clone()}, tie_embedding=False))
    assert own is not None
    with pytest.raises(TensorMismatch, match=r"unties the output head, but no lm_head\.weight is"):
        stored_head(opened({EMBED: embed}, tie_word_embeddings=False))
    only_head = opened({HEAD: head})
    assert stored_head(only_head) is None
    assert torch.equal(backbone_tensors(only_head)["embed_tokens.weight"], head)


# --- filling a module


class Small(nn.Module):
    expert_bias: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.register_buffer("expert_bias", torch.zeros(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def state() -> dict[str, Tensor]:
    return {
        "lin.weight": torch.randn(2, 3),
        "lin.bias": torch.randn(2),
        "expert_bias": torch.randn(2),
    }


def fill(module: nn.Module, tensors: dict[str, Tensor], **options: Any) -> None:
    options = {"dtype": torch.float32, "device": "cpu", "where": "tiny", **options}
    load_weights(module, tensors, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fitting_tensors_are_used_as_they_are(device: str) -> None:
    module, tensors = Small().to(device), state()
    table = module.table
    fill(module, tensors)
    assert module.lin.weight.data_ptr() == tensors["lin.weight"].data_ptr()
    assert module.expert_bias.data_ptr() == tensors["expert_bias"].data_ptr()
    assert isinstance(module.lin.weight, nn.Parameter)
    assert not any(p.requires_grad for p in module.parameters())
    assert module.table is table


def test_dtype_and_what_keeps_it() -> None:
    module = Small()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state().items()}
    fill(module, tensors, dtype=torch.float16)
    assert module.lin.weight.dtype is torch.float16
    assert module.expert_bias.dtype is torch.float32
    fill(module, tensors, dtype=None, keep_dtype=())
    assert module.lin.weight.dtype is module.expert_bias.dtype is torch.bfloat16


def test_integers_keep_their_dtype() -> None:
    module = nn.Module()
    module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    fill(module, {"count": torch.tensor([5])}, dtype=torch.bfloat16)
    assert module.state_dict()["count"].tolist() == [5]
    assert module.state_dict()["count"].dtype is torch.int64


def test_derived_frequencies_are_passed_over() -> None:
    fill(Small(), {**state(), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})


def test_every_misfit_is_named() -> None:
    tensors = {**state(), "lin.weight": torch.zeros(3, 2), "bogus": torch.zeros(1)}
    del tensors["lin.bias"]
    module = Small()
    before = module.lin.weight
    with pytest.raises(TensorMismatch) as caught:
        fill(module, tensors)
    assert str(caught.value) == (
        "the weights of tiny do not fit: 1 tensor is missing (lin.bias); "
        "1 tensor is unknown (bogus); 1 tensor has another shape (lin.weight is [3, 2], the model "
        "needs [2, 3]); use a checkpoint whose weights belong to its config.json"
    )
    assert module.lin.weight is before


def test_many_misfits_are_counted() -> None:
    extra = {f"x{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(TensorMismatch, match=r": 5 tensors are unknown \(x0, x1, x2, …\); use"):
        fill(Small(), {**state(), **extra})


# --- checkpoints that transformers wrote

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "layer_types": ["conv", "full_attention", "conv"],
}
VISION: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vision_use_head": False,
}


def reference(kind: str, **options: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "moe":
        sizes: dict[str, Any] = {
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        config: Any = hf.Lfm2MoeConfig(**TEXT, **sizes, num_dense_layers=1, **options)
        model: Any = hf.Lfm2MoeForCausalLM(config)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_()
    elif kind == "vl":
        text = {"model_type": "lfm2", "block_multiple_of": 16, **TEXT}
        config = hf.Lfm2VlConfig(
            text_config=text, vision_config=VISION, projector_hidden_size=16, **options
        )
        model = hf.Lfm2VlForConditionalGeneration(config)
    else:
        model = hf.Lfm2ForCausalLM(hf.Lfm2Config(**TEXT, block_multiple_of=16, **options))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["dense", "moe", "vl"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_transformers_checkpoints(tmp_path: Path, kind: str, tied: bool, shards: bool) -> None:
    theirs = reference(kind, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, max_shard_size=20_000 if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards

    point = Checkpoint.open(tmp_path)
    with torch.device("meta"):
        ours = Backbone(BackboneConfig.from_dict(point.config))
    fill(ours, backbone_tensors(point))
    ids = torch.arange(1, 12)[None]
    hidden = ours(ours.embed(ids), Whole(1, 11))
    head = stored_head(point)
    assert (head is None) is tied
    logits = hidden @ (ours.embed_tokens.weight if head is None else head).T
    assert torch.allclose(logits, theirs(ids).logits, atol=1e-5)


def test_old_language_model_layout(tmp_path: Path) -> None:
    theirs = reference("dense", tie_word_embeddings=False)
    stored = {f"language_model.{name}": t.clone() for name, t in theirs.state_dict().items()}
    point = Checkpoint.open(write(tmp_path / "t", stored, tie_word_embeddings=False))
    ours: Any = Backbone(BackboneConfig.from_dict(theirs.config.to_dict()))
    fill(ours, backbone_tensors(point))
    assert torch.equal(
        ours.layers[0].conv.in_proj.weight, theirs.model.layers[0].conv.in_proj.weight
    )
    assert stored_head(point) is not None
    assert unclaimed(point.names, BACKBONE_RULES) == ["language_model.lm_head.weight"]


def test_fused_experts_equal_separate_ones(tmp_path: Path) -> None:
    theirs = reference("moe")
    theirs.save_pretrained(tmp_path / "apart")
    fused = {name: t.clone() for name, t in theirs.state_dict().items() if name != HEAD}
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in fused
    apart = backbone_tensors(Checkpoint.open(tmp_path / "apart"))
    together = backbone_tensors(Checkpoint.open(write(tmp_path / "fused", fused)))
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in apart)


@pytest.mark.parametrize("case", ["differs", "equal", "only head"])
def test_tying_as_transformers_does(tmp_path: Path, case: str) -> None:
    import transformers as hf

    theirs = reference("dense")
    theirs.save_pretrained(tmp_path)
    stored = {n: t.clone() for n, t in theirs.state_dict().items() if n != HEAD}
    stored[HEAD] = torch.randn(96, 32) if case == "differs" else stored[EMBED].clone()
    if case == "only head":
        del stored[EMBED]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    again = hf.Lfm2ForCausalLM.from_pretrained(tmp_path)
    point = Checkpoint.open(tmp_path)
    head = stored_head(point)
    assert (head is None) is (again.lm_head.weight is again.model.embed_tokens.weight)
    embedding = backbone_tensors(point)["embed_tokens.weight"]
    assert torch.equal(embedding if head is None else head, again.lm_head.weight)
