"""The vision frontend: claims LFM2-VL checkpoints, and encodes pictures for the core.

Everything the core needs to know of images passes through the two classes here; the stages
(reading, tiling, patches, tower, connector) are modules of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lfm2_mm.errors import CheckpointError, ImageError
from lfm2_mm.frontends import Prepared
from lfm2_vision.config import ConnectorConfig, TowerConfig, is_vision_language
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.picture import DEFAULT_LIMITS, Limits, Picture, open_picture
from lfm2_vision.prompt_text import ImageTokens, placeholder_text
from lfm2_vision.tiling import Plan, plan

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.loading import LoadOptions
    from lfm2_mm.model import Model
    from lfm2_vision.connector import Connector
    from lfm2_vision.encoder import Siglip2Tower

__all__ = ["ImageEncoder", "VisionFrontend", "frontend"]

_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .heic .heif .avif .ppm .ico .jp2 .qoi".split()
)
_VIEWS_AT_ONCE = 4  # bounds the memory of encoding; more views at once are no faster on a CPU


class ImageEncoder:
    """Pictures in, rows of embeddings out; an `InputEncoder` of the core.

    Args:
        tower: The vision tower with its weights.
        connector: Tower rows to embeddings.
        config: How pictures are prepared, budget included.
        token_id: The id at every position a picture fills.
        tokens: Names of the tokens around a picture.
        identity: Tells this encoder's features from another model's; part of every key.
        limits: What pictures are accepted.
    """

    types = frozenset({"image", "image_url", "input_image"})

    def __init__(
        self,
        tower: Siglip2Tower,
        connector: Connector,
        config: ImageConfig,
        *,
        token_id: int,
        tokens: ImageTokens,
        identity: str,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.tower, self.connector, self.config = tower, connector, config
        self.token_id, self.tokens, self.limits = token_id, tokens, limits
        self.placeholder = tokens.image
        settings = json.dumps(config.to_dict(), sort_keys=True)
        self._key = hashlib.sha256(f"{identity}\n{settings}".encode()).hexdigest()[:16]
        self.views_encoded = 0

    def accepts(self, source: str) -> bool:
        """Whether a file name or URL looks like a picture; `-` does."""
        path = urlsplit(source).path if "://" in source else source
        return (
            source == "-"
            or source.startswith("data:image/")
            or (PurePath(path).suffix.lower() in _SUFFIXES)
        )

    def open(self, part: Mapping[str, Any]) -> Picture:
        """The picture of one content part, in OpenAI or Hugging Face form."""
        source = next(
            (part[k] for k in ("image", "path", "url", "image_url") if part.get(k) is not None),
            None,
        )
        if isinstance(source, Mapping):
            source = source.get("url")
        if source is None:
            raise ImageError(
                f"an image part has none of 'image', 'path', 'url' or 'image_url', only "
                f"{sorted(part)}; name the picture"
            )
        return open_picture(source, limits=self.limits)

    def plan(self, picture: Picture) -> Plan:
        """How a picture would be seen."""
        return plan(*picture.size, self.config)

    def prepare(self, part: Mapping[str, Any]) -> Prepared:
        """Read and cut up one picture. See `InputEncoder.prepare`."""
        import torch

        from lfm2_vision.patches import patchify, views

        picture = self.open(part)
        layout = self.plan(picture)
        pixels = views(picture.image, layout, self.config)
        patches = torch.cat([patchify(view, self.config) for view in pixels])
        shapes = [(view.patch_rows, view.patch_cols) for view in layout.views]
        return Prepared(
            text=placeholder_text(layout, self.tokens),
            n_positions=layout.n_tokens,
            tensors={"patches": patches, "shapes": torch.tensor(shapes)},
            key=f"image:{self._key}:{picture.digest}",
            info={**layout.to_dict(), "source": picture.source},
        )

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """Features of each picture, `[n_positions, d]`. See `InputEncoder.encode`."""
        import torch

        weight = self.tower.post_layernorm.weight
        shapes = [(r, c) for part in batch for r, c in part.tensors["shapes"].tolist()]
        patches = torch.cat([part.tensors["patches"] for part in batch])
        sizes = [rows * columns for rows, columns in shapes]
        rows = []
        at = 0
        for start in range(0, len(shapes), _VIEWS_AT_ONCE):
            some = shapes[start : start + _VIEWS_AT_ONCE]
            end = at + sum(sizes[start : start + _VIEWS_AT_ONCE])
            chunk = patches[at:end].to(device=weight.device, dtype=weight.dtype)
            rows.append(self.connector(self.tower(chunk, some), some))
            at = end
        self.views_encoded += len(shapes)
        return list(torch.split(torch.cat(rows), [part.n_positions for part in batch]))


class VisionFrontend:
    """Builds LFM2-VL and LFM2.5-VL models."""

    name = "vision-language"
    options = frozenset({"max_image_tokens", "max_tiles", "limits"})

    def claims(self, checkpoint: Checkpoint) -> bool:
        """Whether the `config.json` is an LFM2-VL's."""
        return is_vision_language(checkpoint.config)

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Model:
        """Build backbone, tower and connector, and attach the picture encoder.

        Raises:
            CheckpointError: if files are missing, damaged or do not fit together.
            SettingError: if the image budget is out of range.
        """
        import torch

        from lfm2_mm.loading import build_backbone, check_claimed
        from lfm2_mm.model import Model
        from lfm2_mm.tokenizer import Tokenizer
        from lfm2_mm.weights import claimed_tensors, load_weights
        from lfm2_vision.connector import Connector
        from lfm2_vision.encoder import Siglip2Tower
        from lfm2_vision.weights import (
            ALL_RULES,
            CONNECTOR_RULES,
            OFFICIAL_CONNECTOR,
            OFFICIAL_TOWER,
            TOWER_RULES,
            has_layer_norm,
        )

        check_claimed(checkpoint, ALL_RULES)
        backbone, head = build_backbone(checkpoint, options)
        tower_config = TowerConfig.from_dict(checkpoint.config)
        connector_config = ConnectorConfig.from_dict(
            checkpoint.config, layer_norm=has_layer_norm(checkpoint)
        )
        with torch.device("meta"):
            tower = Siglip2Tower(tower_config)
            connector = Connector(
                connector_config, tower_config.hidden_size, backbone.config.hidden_size
            )
        for module, rules in ((tower, TOWER_RULES), (connector, CONNECTOR_RULES)):
            load_weights(
                module,
                claimed_tensors(checkpoint, rules),
                dtype=options.dtype,
                device=options.device,
                where=checkpoint.name,
                quantize=options.encoder_schemes,
            )
        config = ImageConfig.from_files(checkpoint.folder, checkpoint.config).with_budget(
            options.extra.get("max_image_tokens"), options.extra.get("max_tiles")
        )
        tokens = ImageTokens.from_files(
            checkpoint.json("tokenizer_config.json") or {},
            checkpoint.json("processor_config.json"),
        )
        tokenizer = Tokenizer.load(checkpoint.folder, control=tokens.special())
        token_id = _image_token_id(checkpoint, tokenizer, tokens)
        model = Model.assemble(checkpoint, backbone, head, tokenizer)
        model.config = {  # what was found, in the current spelling: configs in the wild are wrong
            **{k: v for k, v in checkpoint.config.items() if k != "image_token_index"},
            "model_type": "lfm2_vl",
            "image_token_id": token_id,
            "projector_use_layernorm": connector_config.layer_norm,
        }
        encoder = ImageEncoder(
            tower.eval(),
            connector.eval(),
            config,
            token_id=token_id,
            tokens=tokens,
            identity=f"{checkpoint.folder}:{checkpoint.nbytes}:{options.dtype}",
            limits=options.extra.get("limits") or DEFAULT_LIMITS,
        )
        model.attach(encoder)
        model.parts = {OFFICIAL_TOWER: tower, OFFICIAL_CONNECTOR: connector}
        return model


def _image_token_id(checkpoint: Checkpoint, tokenizer: Any, tokens: ImageTokens) -> int:
    """The id of the picture token, from the config (two spellings) or the tokenizer."""
    config = checkpoint.config
    said = config.get("image_token_id", config.get("image_token_index"))
    known = tokenizer.token_id(tokens.image)
    if said is None and known is None:
        raise CheckpointError(
            f"neither the config nor the tokenizer of {checkpoint.name} knows {tokens.image!r}; "
            "use a complete LFM2-VL checkpoint"
        )
    if said is not None and known is not None and said != known:
        raise CheckpointError(
            f"the config of {checkpoint.name} says image_token_id {said}, its tokenizer gives "
            f"{tokens.image!r} the id {known}; the files belong to different checkpoints"
        )
    return int(known if said is None else said)


frontend = VisionFrontend()
