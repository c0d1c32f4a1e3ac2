"""Towers of transformers, timm and open_clip in our encoder; none of their packages but the first.

timm's layouts are made here by hand from a random tower of ours; the real packages are compared in
tests/interop/oracle_towers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import lfm2_mm
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    InputError,
    ModelNotFound,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
)
from lfm2_vision import nano
from lfm2_vision.config import TowerConfig
from lfm2_vision.encoder import Siglip2Tower
from lfm2_vision.tower_names import tower_layout
from lfm2_vision.towers import N_HEADS, convert_tower, read_tower, replace_tower
from lfm2_vision.weights import OFFICIAL_TOWER

State = dict[str, Tensor]
P, GRID, WIDTH, HEADS = 4, 3, 24, 3
CONFIG = TowerConfig(
    hidden_size=WIDTH, ffn_size=40, n_layers=2, n_heads=HEADS, patch_size=P, grid=GRID
)


def stirred(module: nn.Module) -> nn.Module:
    """Every parameter matters: biases are not zero, norms not one."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return module.eval()


@pytest.fixture(scope="module")
def tower() -> Siglip2Tower:
    made = stirred(Siglip2Tower(CONFIG))
    assert isinstance(made, Siglip2Tower)
    return made


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def timm_blocks(state: State, prefix: str) -> State:
    out = {}
    for i in range(CONFIG.n_layers):
        ours, theirs = f"encoder.layers.{i}.", f"{prefix}blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{theirs}attn.qkv.{kind}"] = torch.cat(parts)
            for a, b in (
                ("self_attn.out_proj", "attn.proj"),
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                out[f"{theirs}{b}.{kind}"] = state[f"{ours}{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"{prefix}norm.{kind}"] = state[f"post_layernorm.{kind}"]
    for name in ("latent", "q.weight", "kv.weight", "mlp.fc1.weight"):
        out[f"{prefix}attn_pool.{name}"] = torch.ones(2)
    return out


def timm_naflex(state: State, prefix: str = "") -> State:
    table = state["embeddings.position_embedding.weight"]
    return {
        f"{prefix}embeds.proj.weight": state["embeddings.patch_embedding.weight"],
        f"{prefix}embeds.proj.bias": state["embeddings.patch_embedding.bias"],
        f"{prefix}embeds.pos_embed": table.reshape(1, GRID, GRID, -1),
        **timm_blocks(state, prefix),
    }


def kernel(state: State) -> Tensor:
    flat = state["embeddings.patch_embedding.weight"]
    return flat.reshape(WIDTH, P, P, 3).permute(0, 3, 1, 2).contiguous()


def timm_fixed(state: State, prefix: str = "") -> State:
    return {
        f"{prefix}patch_embed.proj.weight": kernel(state),
        f"{prefix}patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
        f"{prefix}pos_embed": state["embeddings.position_embedding.weight"][None],
        **timm_blocks(state, prefix),
    }


def open_clip(state: State) -> State:
    text = {"text.token_embedding.weight": torch.ones(3, 2), "logit_scale": torch.ones(())}
    return timm_fixed(state, "visual.trunk.") | text | {"logit_bias": torch.ones(())}


def trunk(state: State) -> State:
    return timm_fixed(state, "trunk.")


def convolved(state: State) -> State:
    return {**state, "embeddings.patch_embedding.weight": kernel(state)}


def under(*prefixes: str) -> Callable[[State], State]:
    def renamed(state: State) -> State:
        out = {prefixes[0] + name: tensor for name, tensor in state.items()}
        out[prefixes[0] + "head.probe"] = torch.ones(1, 1, WIDTH)
        return out | {f"{prefix}x.weight": torch.ones(2) for prefix in prefixes[1:]}

    return renamed


LAYOUTS: dict[str, Callable[[State], State]] = {
    "bare": dict,
    "bare conv": convolved,
    "vision_model": under("vision_model.", "text_model.", "logit_scale."),
    "official": under("model.vision_tower.vision_model.", "model.language_model.", "lm_head."),
    "saved by transformers 5": under("model.vision_tower.", "model.multi_modal_projector."),
    "vision_tower": under("vision_tower.", "language_model.model."),
    "timm NaFlex": timm_naflex,
    "timm": timm_fixed,
    "open_clip": open_clip,
    "open_clip trunk": trunk,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tower(
    layout: str, tower: Siglip2Tower, tmp_path: Path
) -> None:
    file = tmp_path / "tower.safetensors"
    save_file(LAYOUTS[layout](tower.state_dict()), file)
    read = read_tower(file, n_heads=HEADS)
    assert read.config == CONFIG
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    for name, tensor in tower.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    patches = torch.randn(9 + 10, 3 * P * P)
    shapes = [(3, 3), (2, 5)]
    assert torch.equal(read(patches, shapes), tower(patches, shapes))


def test_the_layout_says_what_is_left_out(tower: Siglip2Tower) -> None:
    found = tower_layout(open_clip(tower.state_dict()))
    assert (found.family, found.prefix) == ("timm fixed-resolution", "visual.trunk.")
    assert found.n_layers == 2
    assert found.dropped == tuple(
        f"visual.trunk.attn_pool.{n}" for n in ("kv.weight", "latent", "mlp.fc1.weight", "q.weight")
    )
    assert found.others == ("logit_bias", "logit_scale", "text.token_embedding.weight")
    q = "encoder.layers.1.self_attn.q_proj.bias"
    assert found.stored[q] == "visual.trunk.blocks.1.attn.qkv.bias"


def test_a_convolution_becomes_rows_of_row_column_channel(tower: Siglip2Tower) -> None:
    state = convolved(tower.state_dict())
    stored = torch.arange(WIDTH * 3 * P * P).reshape(WIDTH, 3, P, P).float()
    state["embeddings.patch_embedding.weight"] = stored
    _, tensors = convert_tower(state, n_heads=HEADS)
    flat = tensors["embeddings.patch_embedding.weight"]
    assert flat.shape == (WIDTH, 3 * P * P)
    for row, column, channel in ((0, 0, 0), (0, 0, 2), (0, 1, 0), (3, 2, 1)):
        at = (row * P + column) * 3 + channel
        assert torch.equal(flat[:, at], stored[:, channel, row, column])


@pytest.mark.parametrize(("grid", "patch"), [(16, 14), (24, 16), (27, 14), (8, 32), (1, 1)])
def test_any_square_of_positions_fills_the_grid(grid: int, patch: int) -> None:
    made = Siglip2Tower(replace(CONFIG, n_layers=1, grid=grid, patch_size=patch))
    config, _ = convert_tower(made.state_dict(), n_heads=2)
    assert (config.grid, config.patch_size, config.n_heads) == (grid, patch, 2)


def test_the_heads_of_the_released_widths_are_known() -> None:
    assert {width: width // heads for width, heads in N_HEADS.items()} == {
        768: 64,
        1024: 64,
        1152: 72,
        1536: 96,
    }
    with torch.device("meta"):
        so400m = Siglip2Tower(TowerConfig(hidden_size=1152, ffn_size=4304, n_layers=27, n_heads=16))
    config, tensors = convert_tower(so400m.state_dict())
    assert config == so400m.config
    assert set(tensors) == set(so400m.state_dict())


def flat(pixels: Tensor) -> Tensor:
    """Patches `[n, 3PP]` of one picture `[3, h, w]`."""
    _, height, width = pixels.shape
    cells = pixels.reshape(3, height // P, P, width // P, P)
    return cells.permute(1, 3, 2, 4, 0).reshape(-1, 3 * P * P)


SHAPES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "patch_size": P,
}


def test_a_fixed_resolution_tower_equals_transformers(tmp_path: Path) -> None:
    config = SiglipVisionConfig(**SHAPES, image_size=P * GRID)
    model = stirred(SiglipVisionModel(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        SiglipVisionConfig(**SHAPES, image_size=P * GRID).to_json_string()
    )
    read = read_tower(tmp_path)  # the heads are in config.json
    assert read.config == CONFIG
    pixels = torch.randn(3, P * GRID, P * GRID)
    theirs = model(pixels[None]).last_hidden_state[0]
    torch.testing.assert_close(read(flat(pixels), [(GRID, GRID)]), theirs, atol=1e-5, rtol=0)


def test_a_naflex_tower_equals_transformers_on_every_grid(tmp_path: Path) -> None:
    model = stirred(Siglip2VisionModel(Siglip2VisionConfig(**SHAPES, num_patches=GRID**2)))
    save_file(model.state_dict(), tmp_path / "tower.safetensors")
    read = read_tower(tmp_path, n_heads=HEADS)  # a folder with one file and no config.json
    grids = [(3, 3), (2, 5), (6, 6)]
    rows = [torch.randn(h * w, 3 * P * P) for h, w in grids]
    padded = torch.zeros(3, 36, 3 * P * P)
    mask = torch.zeros(3, 36, dtype=torch.int32)
    for i, part in enumerate(rows):
        padded[i, : len(part)], mask[i, : len(part)] = part, 1
    theirs = model(padded, mask, torch.tensor(grids)).last_hidden_state[mask.bool()]
    torch.testing.assert_close(read(torch.cat(rows), grids), theirs, atol=1e-5, rtol=0)


def test_dtype_and_eps_are_what_was_asked_for(tower: Siglip2Tower, tmp_path: Path) -> None:
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    stated = '{"vision_config": {"num_attention_heads": 3, "layer_norm_eps": 1e-5}}'
    (tmp_path / "config.json").write_text(stated)
    read = read_tower(str(tmp_path), dtype=torch.bfloat16)
    assert read.config == replace(CONFIG, norm_eps=1e-5)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}
    assert read_tower(tmp_path, n_heads=6).config.n_heads == 6


# What cannot be read


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    assert not re.search(r"\.\s+[A-Z]", text)
    return text


def test_unknown_and_missing_tensors_are_named_as_stored(tower: Siglip2Tower) -> None:
    state = timm_fixed(tower.state_dict())
    del state["blocks.1.attn.qkv.bias"], state["norm.weight"]
    state["cls_token"] = state["blocks.0.ls1.gamma"] = torch.ones(1)
    with pytest.raises(TensorMismatch) as error:
        convert_tower(state, n_heads=HEADS, where="a.safetensors")
    assert message(error) == (
        "the tensors of the vision tower in a.safetensors are not those of a SigLIP2 tower: "
        "2 missing (blocks.1.attn.qkv.bias, norm.weight), 2 unknown (blocks.0.ls1.gamma, "
        "cls_token); use a complete SigLIP2 checkpoint of transformers, timm or open_clip"
    )


def test_many_names_are_shortened(tower: Siglip2Tower) -> None:
    state = {n: t for n, t in tower.state_dict().items() if ".layers.0." not in n}
    with pytest.raises(TensorMismatch, match=r": 16 missing \(([^,]+, ){3}…\), 16 unknown \("):
        convert_tower(state, n_heads=HEADS)  # one layer, called 1


def test_tensors_of_another_form_are_named(tower: Siglip2Tower) -> None:
    state = timm_fixed(tower.state_dict())
    state["blocks.0.attn.qkv.weight"] = torch.ones(WIDTH, WIDTH)
    state["norm.bias"] = torch.ones(WIDTH, dtype=torch.int8)
    state["blocks.0.mlp.fc2.weight"] = torch.ones(())
    with pytest.raises(TensorMismatch) as error:
        convert_tower(state, n_heads=HEADS)
    text = message(error)
    assert "norm.bias is int8 [24]" in text
    assert "blocks.0.mlp.fc2.weight is float32 []" in text
    state = timm_fixed(tower.state_dict()) | {"blocks.0.attn.qkv.weight": torch.ones(WIDTH, WIDTH)}
    with pytest.raises(TensorMismatch) as error:
        convert_tower(state, n_heads=HEADS)
    assert "1 of another form (blocks.0.attn.qkv.weight is float32 [24, 24])" in message(error)


@pytest.mark.parametrize(
    "shape", [(WIDTH, 47), (WIDTH, 4, 4, 4), (WIDTH, 3, 4, 5), (WIDTH, 3, 0, 0), (WIDTH,), (0, 48)]
)
def test_patches_must_be_square_and_rgb(tower: Siglip2Tower, shape: tuple[int, ...]) -> None:
    state = {**tower.state_dict(), "embeddings.patch_embedding.weight": torch.ones(shape)}
    with pytest.raises(TensorMismatch) as error:
        convert_tower(state, n_heads=HEADS)
    assert message(error) == (
        "the patch embedding embeddings.patch_embedding.weight of the state dict is "
        f"{list(shape)}, neither [d, 3·P·P] nor [d, 3, P, P]; use a SigLIP2 tower with square "
        "patches of RGB pictures"
    )


@pytest.mark.parametrize("shape", [(1, 10, WIDTH), (1, 9, 5), (1, 3, 4, WIDTH), (WIDTH,), (2, 2)])
def test_positions_must_be_a_square(tower: Siglip2Tower, shape: tuple[int, ...]) -> None:
    state = {**timm_fixed(tower.state_dict()), "pos_embed": torch.ones(shape)}
    with pytest.raises(TensorMismatch) as error:
        convert_tower(state, n_heads=HEADS)
    assert message(error) == (
        f"the position table pos_embed of the state dict is {list(shape)}, no square of positions "
        "of width 24; use a SigLIP2 tower without class token, trained on square pictures"
    )


def test_an_unknown_width_needs_its_heads(tower: Siglip2Tower) -> None:
    with pytest.raises(CheckpointError) as error:
        convert_tower(tower.state_dict())
    assert message(error) == (
        "the tower in the state dict has width 24, which is none of the released ones (768, 1024, "
        "1152, 1536), so its number of attention heads cannot be inferred; say it with n_heads"
    )
    for n_heads in (0, 7, -3):
        with pytest.raises(SettingError) as other:
            convert_tower(tower.state_dict(), n_heads=n_heads)
        assert message(other) == (
            f"n_heads {n_heads} does not divide the width 24 of the tower in the state dict; give "
            "the number of attention heads it was trained with"
        )


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("conv1.weight", "layer1.0.bn1.bias"),
        (
            "visual.conv1.weight",
            "visual.class_embedding",
            "visual.transformer.resblocks.0.ln_1.bias",
        ),
        ("model.layers.0.conv.conv.weight", "model.embed_tokens.weight"),
        ("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"),
    ],
)
def test_another_model_is_one_sentence(names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.ones(2) for name in names}, file)
    with pytest.raises(UnsupportedArchitecture) as error:
        read_tower(file)
    first = f", the first {min(names)!r}" if names else ""
    assert message(error) == (
        f"{file} holds no SigLIP2 vision tower as transformers, timm or open_clip save it "
        f"({len(names)} tensors{first}); use a SigLIP2 checkpoint of one of them"
    )


def test_a_clip_tower_is_told_by_its_further_tensors(tower: Siglip2Tower) -> None:
    state = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    state["vision_model.embeddings.class_embedding"] = torch.ones(WIDTH)
    state["vision_model.pre_layrnorm.weight"] = torch.ones(WIDTH)
    with pytest.raises(TensorMismatch, match=r"2 unknown \(vision_model.embeddings.class_emb"):
        convert_tower(state, n_heads=HEADS)


def test_files_that_are_no_safetensors_are_refused(tower: Siglip2Tower, tmp_path: Path) -> None:
    pickled = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(tower.state_dict(), pickled)
    with pytest.raises(CorruptWeights) as error:
        read_tower(pickled)
    assert message(error) == (
        f"{pickled} is of a pickle format, which can run code when opened and is never read here; "
        "use the .safetensors file of the same tower"
    )
    disguised = pickled.rename(tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeights, match="cannot be read as safetensors"):
        read_tower(disguised)
    disguised.write_bytes(b"")
    with pytest.raises(CorruptWeights, match="cannot be read as safetensors"):
        read_tower(disguised)
    with pytest.raises(ModelNotFound) as other:
        read_tower(tmp_path / "absent.safetensors")
    assert message(other) == (
        f"there is no file or folder {tmp_path / 'absent.safetensors'}; check the path"
    )


def test_a_folder_must_say_which_file(tower: Siglip2Tower, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(tower.state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptWeights) as error:
        read_tower(tmp_path)
    assert message(error) == (
        f"{tmp_path} has no config.json and 2 safetensors files; name the file that holds the "
        "vision tower"
    )


def test_another_activation_is_refused(tower: Siglip2Tower, tmp_path: Path) -> None:
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    stated = '{"model_type": "siglip_vision_model", "hidden_act": "quick_gelu"}'
    (tmp_path / "config.json").write_text(stated)
    with pytest.raises(CheckpointError) as error:
        read_tower(tmp_path)
    assert message(error) == (
        f"the config of {tmp_path} asks for the activation 'quick_gelu', which our vision tower "
        "does not compute; use a SigLIP2 checkpoint, whose activation is 'gelu_pytorch_tanh'"
    )


# In place of a loaded model's own


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vl") / "model"
    with torch.no_grad():
        nano.export(nano.build(), folder)
    return folder


def test_a_tower_takes_the_place_of_another(checkpoint: Path, tmp_path: Path) -> None:
    model = lfm2_mm.load(checkpoint)
    before = model.encoders["image"].tower
    shapes = replace(before.config, grid=GRID, n_layers=CONFIG.n_layers)
    other = stirred(Siglip2Tower(shapes))
    file = tmp_path / "tower.safetensors"
    save_file(timm_naflex(other.state_dict()), file)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    picture = Image.linear_gradient("L").convert("RGB")
    old = model.logits(question, [picture])
    replace_tower(model, file, n_heads=shapes.n_heads)
    encoder = model.encoders["image"]
    assert encoder.tower.config == shapes
    assert all(model.encoders[kind] is encoder for kind in encoder.types)
    for name, tensor in other.state_dict().items():
        assert torch.equal(encoder.tower.state_dict()[name], tensor)
    new = model.logits(question, [picture])
    assert not torch.equal(old, new)  # the features kept of the first tower are not used again

    model.save(tmp_path / "saved")
    saved = lfm2_mm.load(tmp_path / "saved")
    assert saved.encoders["image"].tower.config == shapes
    assert torch.equal(saved.logits(question, [picture]), new)
    replace_tower(model, checkpoint)
    assert torch.equal(model.logits(question, [picture]), old)
    assert model.parts[OFFICIAL_TOWER] is model.encoders["image"].tower


def test_a_tower_that_does_not_fit_is_refused(
    checkpoint: Path, tower: Siglip2Tower, tmp_path: Path
) -> None:
    model = lfm2_mm.load(checkpoint)
    own = model.encoders["image"]
    file = tmp_path / "tower.safetensors"
    save_file(tower.state_dict(), file)
    with pytest.raises(TensorMismatch) as error:
        replace_tower(model, file, n_heads=HEADS)
    width, side = own.tower.config.hidden_size, own.tower.config.patch_size
    assert message(error) == (
        f"the tower in {file} has width 24 and patches of 4 pixels, but {model.name} needs width "
        f"{width} and patches of {side}; use a tower of that width and patch size"
    )
    assert model.encoders["image"] is own
    model.encoders.clear()
    with pytest.raises(InputError) as other:
        replace_tower(model, file)
    assert message(other) == (
        f"the model {model.name} has no vision tower that could be replaced; load an LFM2-VL"
    )
