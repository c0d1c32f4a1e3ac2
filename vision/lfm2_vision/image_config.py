"""How a checkpoint wants its images prepared: one frozen record, read from the checkpoint's files.

Knows the file keys and their defaults (those of `Lfm2VlImageProcessor` in transformers 5.23);
knows nothing of images, and takes no size for granted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lfm2_mm.errors import CheckpointError, SettingError

__all__ = ["ImageConfig", "Resample"]

Resample: TypeAlias = Literal["bilinear", "bicubic"]

_PIL_CODES: dict[Resample, int] = {"bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling
_MAX_TILES = 10  # a row or column beyond the tenth has no token in any released tokenizer
_MAX_TOKENS = 4096  # 16,384 patches in one view
_INTEGERS = (
    "patch_size",
    "downsample_factor",
    "min_tiles",
    "max_tiles",
    "tile_size",
    "min_image_tokens",
    "max_image_tokens",
)
# our name -> key in the files, where they differ
_KEYS = {"patch_size": "encoder_patch_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """All values that turn pixels into patches and tokens.

    Attributes:
        patch_size: Pixels of a patch's side, P.
        downsample_factor: Patches of a token's side, D; every view is a multiple of P·D pixels.
        do_image_splitting: Whether large images are tiled at all.
        min_tiles: Fewest tiles of a grid; 1 together with `max_tiles` 1 means no tiling.
        max_tiles: Most tiles of a grid.
        tile_size: Pixels of a tile's side.
        use_thumbnail: Whether the whole image follows its tiles as one small view.
        min_image_tokens: Smaller images are enlarged to this many tokens.
        max_image_tokens: Larger views are shrunk to this many (extreme aspect ratios may exceed
            it, for no side is shorter than one token).
        max_pixels_tolerance: An image is tiled if its area exceeds that of `max_image_tokens`
            by this factor.
        resample: Interpolation; always with antialias.
        do_rescale: Whether pixels are multiplied by `rescale_factor`.
        rescale_factor: Usually 1/255.
        do_normalize: Whether `image_mean` is then subtracted and the rest divided by `image_std`.
        image_mean: Per channel.
        image_std: Per channel.

    Raises:
        SettingError: if a value is out of range or two do not fit together.
    """

    patch_size: int = 16
    downsample_factor: int = 2
    do_image_splitting: bool = True
    min_tiles: int = 2
    max_tiles: int = 10
    tile_size: int = 512
    use_thumbnail: bool = True
    min_image_tokens: int = 64
    max_image_tokens: int = 256
    max_pixels_tolerance: float = 2.0
    resample: Resample = "bilinear"
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            _check_integer(name, getattr(self, name))
        if self.tile_size % self.token_side:
            raise SettingError(
                f"tile_size is {self.tile_size}; it must be a multiple of patch_size times "
                f"downsample_factor, here {self.token_side}"
            )
        for low, high in (("min_tiles", "max_tiles"), ("min_image_tokens", "max_image_tokens")):
            if low == "min_tiles" and not self.do_image_splitting:
                continue  # then the tile numbers have no say
            if getattr(self, low) > getattr(self, high):
                raise SettingError(
                    f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}; "
                    "the first must not be the larger"
                )
        if self.resample not in _PIL_CODES:
            raise SettingError(f"resample is {self.resample!r}; it must be bilinear or bicubic")
        for name in ("max_pixels_tolerance", "rescale_factor"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        if not all(value > 0 for value in self.image_std):
            raise SettingError(f"image_std is {self.image_std!r}; each value must be above 0")

    @property
    def token_side(self) -> int:
        """Pixels of the square that becomes one token, P·D."""
        return self.patch_size * self.downsample_factor

    @property
    def tiles(self) -> bool:
        """Whether an image can be tiled at all."""
        return self.do_image_splitting and self.max_tiles > 1

    @classmethod
    def from_files(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        preprocessor: Mapping[str, Any] | None = None,
    ) -> ImageConfig:
        """Read a checkpoint's preprocessing values.

        Neither `processor_config.json` nor `preprocessor_config.json` holds all keys in every
        released checkpoint, so they are merged. The nested `image_processor` of the former wins
        over the latter, which wins over flat keys of the former; class defaults fill the rest.
        Only patch size and downsample factor also come from `config.json`, where nothing else
        names them, and all values do where a checkpoint has neither processor file.
        `do_resize` and `size` are ignored, as the reference processor does.

        Args:
            source: The checkpoint's folder, or the content of its `processor_config.json`.
            config: The content of its `config.json`; read from the folder if not given.
            preprocessor: The content of its `preprocessor_config.json`; only with a mapping.

        Raises:
            CheckpointError: if a file is no JSON object or its values cannot be used.
        """
        if isinstance(source, Mapping):
            where = "the processor config"
            processor, preprocessor = source, preprocessor or {}
        else:
            where = f"the image settings in {os.fspath(source)!r}"
            folder = Path(source)
            processor = _read(folder / "processor_config.json")
            preprocessor = _read(folder / "preprocessor_config.json")
            config = _read(folder / "config.json") if config is None else config
        config = config or {}
        nested = processor.get("image_processor") or {}
        merged = {**processor, **preprocessor, **nested}
        if not processor and not preprocessor:
            merged = dict(config)
        vision = config.get("vision_config") or {}
        of_model = {
            "encoder_patch_size": vision.get("patch_size"),
            "downsample_factor": config.get("downsample_factor"),
        }
        for key, value in of_model.items():
            if value is None:
                continue
            if merged.get(key, value) != value:
                raise CheckpointError(
                    f"{where} say {key} is {merged[key]!r} but config.json says {value!r}; "
                    "the files belong to different checkpoints, so download it again"
                )
            merged[key] = value
        try:
            return cls(**_values(merged))
        except (SettingError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} cannot be used: {error}") from error

    def with_budget(
        self, max_image_tokens: int | None = None, max_tiles: int | None = None
    ) -> ImageConfig:
        """A copy that spends fewer (or more) tokens on an image: the dial of speed for accuracy.

        Args:
            max_image_tokens: Tokens of a single view or thumbnail; also lowers
                `min_image_tokens` where that is larger. None leaves it.
            max_tiles: Most tiles of a large image; 1 switches tiling off. None leaves it.

        Raises:
            SettingError: if a value is out of range.
        """
        changes: dict[str, Any] = {}
        if max_image_tokens is not None:
            _check_budget("max_image_tokens", max_image_tokens, _MAX_TOKENS)
            changes["max_image_tokens"] = max_image_tokens
            changes["min_image_tokens"] = min(self.min_image_tokens, max_image_tokens)
        if max_tiles is not None:
            _check_budget("max_tiles", max_tiles, _MAX_TILES)
            changes["max_tiles"] = max_tiles
            changes["min_tiles"] = min(self.min_tiles, max_tiles)
            changes["do_image_splitting"] = max_tiles > 1
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The form of `preprocessor_config.json`, and of `image_processor` in the other file."""
        values = {_KEYS.get(field.name, field.name): getattr(self, field.name) for field in _FIELDS}
        values["resample"] = _PIL_CODES[self.resample]
        values["image_mean"], values["image_std"] = list(self.image_mean), list(self.image_std)
        return {"image_processor_type": "Lfm2VlImageProcessor", "do_resize": True, **values}


_FIELDS = fields(ImageConfig)


def _values(merged: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the files as arguments of ImageConfig; unknown keys and nulls are left out."""
    found = {f.name: merged.get(_KEYS.get(f.name, f.name)) for f in _FIELDS}
    values = {name: value for name, value in found.items() if value is not None}
    for name in _INTEGERS:
        _check_integer(name, values.get(name, 1))
    if "resample" in values:
        values["resample"] = _resample(values["resample"])
    for name in ("image_mean", "image_std"):
        if name in values:
            given = values[name]
            each = [given] * 3 if isinstance(given, int | float) else list(given)
            if len(each) != 3:
                raise SettingError(f"{name} is {given!r}; it must hold one value per RGB channel")
            values[name] = tuple(float(value) for value in each)
    for name in ("max_pixels_tolerance", "rescale_factor"):
        if name in values:
            values[name] = float(values[name])
    for name in ("do_image_splitting", "use_thumbnail", "do_rescale", "do_normalize"):
        if not isinstance(values.get(name, True), bool):
            raise SettingError(f"{name} is {values[name]!r}; it must be true or false")
    return values


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise SettingError(f"{name} is {value!r}; it must be an integer of at least 1")


def _resample(code: object) -> Resample:
    for name, number in _PIL_CODES.items():
        if isinstance(code, int) and code == number:
            return name
        if isinstance(code, str) and code.lower() == name:
            return name
    raise SettingError(f"resample is {code!r}; only 2 (bilinear) and 3 (bicubic) are supported")


def _check_budget(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise SettingError(f"{name} is {value!r}; it must be an integer from 1 to {most}")


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as JSON ({error}); download the checkpoint again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{str(path)!r} holds no JSON object; download the checkpoint again")
    return content
