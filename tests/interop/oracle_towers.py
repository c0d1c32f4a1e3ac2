"""Proof that towers of timm, open_clip and transformers compute the same in our encoder.

Runs in an environment of its own (`make test-interop`): timm and open_clip need torchvision, which
beside a CPU build of torch imports only once two operator schemas exist. All models are tiny, with
random weights; the released shapes are compared without weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "vision")]

import torch  # noqa: E402

_SCHEMAS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models import register_model  # noqa: E402
from timm.models.naflexvit import batch_patchify  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import SiglipConfig, SiglipModel  # noqa: E402

from lfm2_vision.encoder import ViewShape  # noqa: E402
from lfm2_vision.towers import convert_tower, read_tower  # noqa: E402

WITHIN = 1e-4
NAFLEX_GRIDS: list[ViewShape] = [(16, 16), (8, 8), (20, 13), (5, 40), (32, 32), (1, 3), (16, 17)]
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}


@register_model
def vit_oracle_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A small trunk that open_clip can name, since it passes no widths on."""
    return VisionTransformer(
        **TINY,
        patch_size=14,
        img_size=70,
        mlp_ratio=3.7362,
        act_layer="gelu_tanh",
        class_token=False,
        global_pool=options["global_pool"],
    )


def stirred(module: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model shows in its output."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = torch.randn(parameter.shape, generator=draw)
            size = 1.0 if "pos_embed" in name or "position_emb" in name else 0.2
            parameter.copy_(parameter + size * spread)
    return module.eval()


def picture(height: int, width: int) -> Tensor:
    """Random pixels as models see them."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def flat(pixels: Tensor, side: int) -> Tensor:
    """Our patches of a picture, `[n, 3PP]`: raster order, each (row, column, channel)."""
    _, channels, height, width = pixels.shape
    cells = pixels[0].reshape(channels, height // side, side, width // side, side)
    return cells.permute(1, 3, 2, 4, 0).reshape(-1, side * side * channels)


class Tally:
    """Counts towers and comparisons, and shows the unequal ones."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "tower.safetensors"
        self.towers, self.comparisons, self.worst = 0, 0, 0.0
        self.unequal: set[int] = set()

    def written(self, state: dict[str, Tensor]) -> Path:
        """A tower's state dict as a file."""
        self.towers += 1
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, self.file)
        return self.file

    def check(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        """One comparison of the tower written last."""
        error = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        assert theirs.std() > 0.1, f"{what}: the reference's output says too little"
        self.comparisons += 1
        self.worst = max(self.worst, error)
        if not error <= WITHIN:
            self.unequal.add(self.towers)
            print(f"unequal: {what}: {error}")


def naflex(name: str, tally: Tally) -> None:
    """A NaFlex tower of timm at several grids, each alone and all in one padded batch."""
    side = 8
    model = stirred(timm.create_model(name, patch_size=side, **TINY))
    tower = read_tower(tally.written(model.state_dict()), n_heads=TINY["num_heads"])
    rows, coordinates, wholes = [], [], []
    for grid in NAFLEX_GRIDS:
        pixels = picture(side * grid[0], side * grid[1])
        patches, shape = batch_patchify(pixels, (side, side))
        assert shape == grid
        assert torch.equal(patches[0], flat(pixels, side)), "timm flattens otherwise than we do"
        y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        coord = torch.stack([y.flatten(), x.flatten()], dim=-1)
        whole = model.forward_features(pixels)[0]
        tally.check(f"{name} {grid}", tower(patches[0], [grid]), whole)
        rows.append(patches[0])
        coordinates.append(coord)
        wholes.append(whole)
    longest = max(map(len, rows))
    valid = torch.stack([torch.arange(longest) < len(part) for part in rows])
    batch = torch.stack([nn.functional.pad(p, (0, 0, 0, longest - len(p))) for p in rows])
    coord = torch.stack([nn.functional.pad(c, (0, 0, 0, longest - len(c))) for c in coordinates])
    theirs = model.forward_features(batch, patch_coord=coord, patch_valid=valid)["patches"][valid]
    tally.check(f"{name} packed", tower(torch.cat(rows), NAFLEX_GRIDS), theirs)


def fixed(name: str, tally: Tally) -> float:
    """A fixed-resolution tower of timm at its own size and patches; returns what erf changes."""
    found = timm.get_pretrained_cfg(name)
    assert found is not None
    size = found.input_size[-1]
    model = stirred(timm.create_model(name, act_layer="gelu_tanh", **TINY))
    side = model.patch_embed.patch_size[0]
    grid = model.patch_embed.grid_size
    tower = read_tower(tally.written(model.state_dict()), n_heads=TINY["num_heads"])
    assert (tower.config.patch_size, (tower.config.grid,) * 2) == (side, grid), name
    pixels = picture(size, size)
    seen = pixels[:, :, : grid[0] * side, : grid[1] * side]  # 384 is no multiple of 14
    with torch.no_grad():
        theirs = model.forward_features(pixels)[0]
        tally.check(name, tower(flat(seen, side), [grid]), theirs)
        own = timm.create_model(name, **TINY).eval()  # with the activation that timm gives it
        own.load_state_dict(model.state_dict())
        return float((own.forward_features(pixels)[0] - theirs).abs().max() / theirs.std())


def full_clip(tally: Tally, folder: Path) -> None:
    """A whole open_clip model, and the same trunk alone."""
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 70, "timm_model_name": "vit_oracle_siglip", "timm_pool": "map"}
    config = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "text_cfg": text}
    config["vision_cfg"] = {**vision, "timm_model_pretrained": False, "timm_proj": "none"}
    (folder / "ViT-oracle-SigLIP2.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model = stirred(open_clip.create_model("ViT-oracle-SigLIP2", load_weights=False))
    state = model.state_dict()
    assert {"logit_scale", "logit_bias"} < set(state)
    assert any(name.startswith("text.") for name in state)
    pixels = picture(70, 70)
    theirs = model.visual.trunk.forward_features(pixels)[0]
    trunk = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    for what, some in (("open_clip", state), ("open_clip trunk", trunk)):
        tower = read_tower(tally.written(some), n_heads=TINY["num_heads"])
        tally.check(what, tower(flat(pixels, 14), [(5, 5)]), theirs)


def full_siglip(tally: Tally) -> None:
    """A whole fixed-resolution SigLIP of transformers, its text tower included."""
    shapes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    shapes["num_attention_heads"] = 4
    config = SiglipConfig(
        vision_config={**shapes, "image_size": 60, "patch_size": 12},
        text_config={**shapes, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    )
    model = stirred(SiglipModel(config))
    pixels = picture(60, 60)
    theirs = model.vision_model(pixels).last_hidden_state[0]
    tower = read_tower(tally.written(model.state_dict()), n_heads=4)
    tally.check("transformers", tower(flat(pixels, 12), [(5, 5)]), theirs)


def released_shapes() -> int:
    """Every SigLIP tower that timm and open_clip name has shapes and heads that we infer."""
    count = 0
    for name in timm.list_models("*siglip*"):
        if name == "vit_oracle_siglip":
            continue
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        config, _ = convert_tower(model.state_dict())
        block = model.blocks[0]
        assert config.n_heads == block.attn.num_heads, name
        assert config.norm_eps == block.norm1.eps == model.norm.eps, name
        count += 1
    for name in open_clip.list_models():
        if "SigLIP2" in name and name != "ViT-oracle-SigLIP2":
            with torch.device("meta"):
                cfg = open_clip.get_model_config(name)
                model = open_clip.CustomTextCLIP(
                    cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"]
                )
            config, _ = convert_tower(model.state_dict())
            blocks = model.visual.trunk.blocks
            assert (config.n_layers, config.n_heads) == (len(blocks), blocks[0].attn.num_heads)
            count += 1
    return count


def main() -> None:
    """Run every comparison."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        tally = Tally(Path(scratch))
        for name in timm.list_models("naflexvit_*_siglip"):
            naflex(name, tally)
        erf = 0.0
        for name in timm.list_models("vit_*_siglip_*"):
            if not name.endswith("_896"):  # 4096 patches: nothing that 448 does not show
                erf = max(erf, fixed(name, tally))
        full_clip(tally, Path(scratch))
        full_siglip(tally)
        shapes = released_shapes()
    print(f"{shapes} released shapes recognised")
    print(f"{tally.comparisons} comparisons, largest difference {tally.worst:.1e}")
    print(f"where timm takes the erf GELU, its outputs differ by up to {erf:.1e} of their spread")
    print(f"{tally.towers} towers, {len(tally.unequal)} unequal")
    sys.exit(1 if tally.unequal else 0)


if __name__ == "__main__":
    main()
