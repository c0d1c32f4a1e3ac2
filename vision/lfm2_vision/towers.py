"""SigLIP2 towers saved by transformers, timm or open_clip become ours; none of them is needed.

It knows shapes and the order of numbers in those packages' tensors (`tower_names` knows what they
are called); it deliberately knows nothing of pictures, text towers or pooling heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    InputError,
    ModelNotFound,
    SettingError,
    TensorMismatch,
)
from lfm2_mm.weights import load_weights
from lfm2_vision.config import TowerConfig
from lfm2_vision.encoder import Siglip2Tower
from lfm2_vision.tower_names import FC1, PATCH, TABLE, parameter_shapes, refuse, tower_layout
from lfm2_vision.weights import OFFICIAL_TOWER

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = ["N_HEADS", "convert_tower", "read_tower", "replace_tower"]

N_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
"""Width -> heads of the released SigLIP and SigLIP2 towers (base, large, so400m, giant-opt)."""

_ACTIVATION = "gelu_pytorch_tanh"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def convert_tower(
    state: Mapping[str, Tensor], *, n_heads: int | None = None, where: str = "the state dict"
) -> tuple[TowerConfig, dict[str, Tensor]]:
    """Map a foreign state dict to the shapes and parameters of `Siglip2Tower`.

    Convolution kernels `[d, 3, P, P]` become rows of a linear layer in our flattening order (row,
    column, channel), which is also that of timm's NaFlex linear layer (`batch_patchify` of
    `timm/models/naflexvit.py`, 1.0.31). A fused `[3d, d]` projection splits into q, k and v. A
    position table `[n, d]`, `[1, n, d]` or `[1, g, g, d]` must be square; any side is taken.

    Pooling heads and other parts are left out; `tower_names.tower_layout` says which.

    Our encoder always computes the tanh GELU and a LayerNorm eps of 1e-6, as in training
    (`big_vision/models/vit.py`) and in transformers. timm computes the erf GELU in its
    fixed-resolution base with patch 16, large up to 384 pixels and so400m with patch 14, without a
    trace in the file, so timm's outputs for those differ slightly. On grids other than the stored
    one positions are interpolated as NaFlex does it (bilinear, antialias); for fixed-resolution
    towers timm and transformers do it otherwise (bicubic).

    Args:
        state: Stored name -> tensor; other parts than the vision tower may be in it.
        n_heads: Attention heads, which a state dict does not tell; None takes the released
            models' number for the width.
        where: What the user calls the source; used in messages.

    Returns:
        The shapes, and our parameter name -> tensor; views of the stored tensors where possible.

    Raises:
        UnsupportedArchitecture: if there is no SigLIP2 tower in it.
        TensorMismatch: if tensors are missing, unknown, of another shape or not floating-point.
        CheckpointError: if the number of heads cannot be inferred.
        SettingError: if `n_heads` does not divide the width.
    """
    layout = tower_layout(state, where=where)
    tensors = {own: state[name] for own, name in layout.stored.items()}
    width, side = _patch_shape(tensors[PATCH], layout.stored[PATCH], where)
    config = TowerConfig(
        hidden_size=width,
        ffn_size=max([1, *tensors[FC1].shape[:1]]),
        n_layers=layout.n_layers,
        n_heads=_heads(width, n_heads, where),
        patch_size=side,
        grid=_grid(tensors[TABLE], width, layout.stored[TABLE], where),
    )
    wrong = []
    for own, shape in parameter_shapes(config).items():
        name, given = layout.stored[own], tensors[own]
        tensors[own] = _adapter(own, name)(given)
        if tuple(tensors[own].shape) != shape or not given.is_floating_point():
            kind = str(given.dtype).removeprefix("torch.")
            wrong.append(f"{name} is {kind} {list(given.shape)}")
    refuse(where, [("of another form", list(dict.fromkeys(wrong)))])
    return config, tensors


def read_tower(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    n_heads: int | None = None,
) -> Siglip2Tower:
    """Read a tower from a safetensors file or a checkpoint folder.

    Files are those of transformers (SigLIP, SigLIP2, or any model with such a tower under
    `vision_tower`, LFM2-VL included), timm (`vit_*_siglip_*`, `naflexvit_*_siglip`) and open_clip
    (`ViT-*-SigLIP2*`). Of a folder its `config.json` is believed about heads and eps.

    Args:
        path: A `.safetensors` file, or a folder with one.
        dtype: Number format of the weights.
        device: Where they shall live.
        n_heads: Attention heads, if the width is not a released model's.

    Raises:
        ModelNotFound: if there is no such file or folder.
        CorruptWeights: if the file is damaged or of a refused format, such as a pickle.
        CheckpointError: if it holds no such tower, see `convert_tower`.
        SettingError: if `n_heads` does not divide the width.

    Example:
        >>> from lfm2_vision.towers import read_tower
        >>> tower = read_tower("ViT-B-16-SigLIP2/open_clip_model.safetensors")  # doctest: +SKIP
        >>> tower.config.grid                                                  # doctest: +SKIP
        14
    """
    path = Path(path)
    state, stated = _open(path)
    section = stated.get("vision_config") or (
        stated if str(stated.get("model_type")).startswith("siglip") else {}
    )
    activation = section.get("hidden_act", _ACTIVATION)
    if activation != _ACTIVATION:
        raise CheckpointError(
            f"the config of {path} asks for the activation {activation!r}, which our vision tower "
            f"does not compute; use a SigLIP2 checkpoint, whose activation is {_ACTIVATION!r}"
        )
    heads = section.get("num_attention_heads") if n_heads is None else n_heads
    config, tensors = convert_tower(state, n_heads=heads, where=str(path))
    config = replace(config, norm_eps=float(section.get("layer_norm_eps", config.norm_eps)))
    with torch.device("meta"):
        tower = Siglip2Tower(config)
    load_weights(tower, tensors, dtype=dtype, device=device, where=str(path))
    return tower.eval()


def replace_tower(model: Model, path: Path | str, *, n_heads: int | None = None) -> None:
    """Put the tower of a file in place of a loaded model's own; its connector stays.

    The tower comes in the number format and on the device of the one before. Pictures seen earlier
    are encoded anew, and `model.save` writes the new tower and its config.

    Args:
        model: An LFM2-VL from `lfm2_mm.load`.
        path: As for `read_tower`.
        n_heads: As for `read_tower`.

    Raises:
        InputError: if the model has no vision tower.
        TensorMismatch: if width or patch size differ from the model's.
        CheckpointError: if the file cannot be used, see `read_tower`.
        SettingError: if `n_heads` does not divide the width.
    """
    from lfm2_vision.frontend import ImageEncoder

    encoder = model.encoders.get("image")
    if not isinstance(encoder, ImageEncoder):
        raise InputError(
            f"the model {model.name} has no vision tower that could be replaced; load an LFM2-VL"
        )
    old = encoder.tower.config
    weight = encoder.tower.post_layernorm.weight
    tower = read_tower(path, dtype=weight.dtype, device=weight.device, n_heads=n_heads)
    new = tower.config
    if (new.hidden_size, new.patch_size) != (old.hidden_size, old.patch_size):
        raise TensorMismatch(
            f"the tower in {path} has width {new.hidden_size} and patches of {new.patch_size} "
            f"pixels, but {model.name} needs width {old.hidden_size} and patches of "
            f"{old.patch_size}; use a tower of that width and patch size"
        )
    model.attach(
        ImageEncoder(
            tower,
            encoder.connector,
            encoder.config,
            token_id=encoder.token_id,
            tokens=encoder.tokens,
            identity=f"{model.folder}:{_digest(tower)}",
            limits=encoder.limits,
        )
    )
    model.parts = {**model.parts, OFFICIAL_TOWER: tower}
    model.config = {**model.config, "vision_config": new.to_dict()}


def _patch_shape(weight: Tensor, name: str, where: str) -> tuple[int, int]:
    """Width and side of the patches, of a linear layer `[d, 3PP]` or convolution `[d, 3, P, P]`."""
    shape = tuple(weight.shape)
    side = isqrt(shape[1] // 3) if len(shape) == 2 else shape[-1] if len(shape) == 4 else 0
    if side < 1 or shape[0] < 1 or shape[1:] not in ((3 * side**2,), (3, side, side)):
        raise TensorMismatch(
            f"the patch embedding {name} of {where} is {list(shape)}, neither [d, 3·P·P] nor "
            "[d, 3, P, P]; use a SigLIP2 tower with square patches of RGB pictures"
        )
    return shape[0], side


def _grid(table: Tensor, width: int, name: str, where: str) -> int:
    """Side of a square table of positions."""
    shape = tuple(table.shape)
    side = isqrt(shape[-2]) if len(shape) in (2, 3) else shape[-2] if len(shape) == 4 else 0
    n = side**2
    if side < 1 or shape not in ((n, width), (1, n, width), (1, side, side, width)):
        raise TensorMismatch(
            f"the position table {name} of {where} is {list(shape)}, no square of positions of "
            f"width {width}; use a SigLIP2 tower without class token, trained on square pictures"
        )
    return side


def _heads(width: int, asked: int | None, where: str) -> int:
    if asked is None:
        if width not in N_HEADS:
            raise CheckpointError(
                f"the tower in {where} has width {width}, which is none of the released ones "
                f"({', '.join(map(str, N_HEADS))}), so its number of attention heads cannot be "
                "inferred; say it with n_heads"
            )
        return N_HEADS[width]
    if asked < 1 or width % asked:
        raise SettingError(
            f"n_heads {asked} does not divide the width {width} of the tower in {where}; give the "
            "number of attention heads it was trained with"
        )
    return asked


def _adapter(own: str, stored: str) -> Callable[[Tensor], Tensor]:
    """What brings a stored tensor into our form; one that cannot be stays as it is."""
    if own == TABLE:
        return lambda table: table.reshape(-1, table.shape[-1])
    if own == PATCH:
        return _flat_kernel
    if ".qkv." in stored:
        part = next(i for i, letter in enumerate("qkv") if f".{letter}_proj." in own)
        return lambda fused: fused.chunk(3)[part] if fused.dim() and len(fused) % 3 == 0 else fused
    return lambda tensor: tensor


def _flat_kernel(weight: Shaped[Tensor, "d ..."]) -> Shaped[Tensor, "d p"]:
    """A convolution `[d, channel, row, column]` as a linear layer over (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


def _open(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Mapped tensors by stored name, and the folder's `config.json` if there is one."""
    if (path / "config.json").is_file():
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.tensor(name) for name in checkpoint.names}, checkpoint.config
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CorruptWeights(
                f"{path} has no config.json and {len(files)} safetensors files; name the file that "
                "holds the vision tower"
            )
        path = files[0]
    if not path.is_file():
        raise ModelNotFound(f"there is no file or folder {path}; check the path")
    if path.suffix in _PICKLES:
        raise CorruptWeights(
            f"{path} is of a pickle format, which can run code when opened and is never read here; "
            "use the .safetensors file of the same tower"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptWeights(
            f"{path} cannot be read as safetensors ({error}); download it again"
        ) from error


def _digest(tower: Siglip2Tower) -> str:
    """Tells towers with other weights or shapes apart."""
    digest = hashlib.sha256(repr(tower.config).encode())
    for tensor in tower.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
