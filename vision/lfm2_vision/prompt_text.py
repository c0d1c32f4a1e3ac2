"""The text that stands for one image in a prompt, before tokenization.

Knows the order of markers and placeholders and the names a tokenizer gives them; knows no ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm2_vision.tiling import Plan

__all__ = ["ImageTokens", "placeholder_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Names of the tokens around and inside an image.

    Attributes:
        image: Stands at every position that features fill.
        start: Opens an image.
        end: Closes it.
        thumbnail: Precedes the thumbnail.
        tile: Precedes each tile; a format string of `row` and `col`, both from 1.
        markers: Whether all but `image` are written at all.
    """

    image: str = "<image>"
    start: str = "<|image_start|>"
    end: str = "<|image_end|>"
    thumbnail: str = "<|img_thumbnail|>"
    tile: str = "<|img_row_{row}_col_{col}|>"
    markers: bool = True

    @classmethod
    def from_files(
        cls,
        tokenizer_config: Mapping[str, Any],
        processor_config: Mapping[str, Any] | None = None,
    ) -> ImageTokens:
        """Read the names from a checkpoint's files; official names fill what they lack.

        Args:
            tokenizer_config: Content of `tokenizer_config.json`; the names may stand at its top
                level or in `extra_special_tokens`, as a string or as an object with `content`.
            processor_config: Content of `processor_config.json`.
        """
        extra = tokenizer_config.get("extra_special_tokens")
        named = {**(extra if isinstance(extra, Mapping) else {}), **tokenizer_config}
        found: dict[str, str] = {}
        for field, key in (
            ("image", "image_token"),
            ("start", "image_start_token"),
            ("end", "image_end_token"),
            ("thumbnail", "image_thumbnail_token"),
        ):
            value = named.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text:
                found[field] = text
        markers = (processor_config or {}).get("use_image_special_tokens")
        return cls(**found, markers=markers is not False)

    def special(self, max_tiles: int = 10) -> list[str]:
        """Every name that a tokenizer must hold, for grids of up to so many rows or columns."""
        sides = range(1, max_tiles + 1)
        tiles = [self.tile.format(row=row, col=col) for row in sides for col in sides]
        return [self.image, self.start, self.end, self.thumbnail, *tiles]


def placeholder_text(plan: Plan, tokens: ImageTokens) -> str:
    """What replaces one image's placeholder in the rendered prompt.

    Start, then every view in order: a tile is announced by its row and column, the thumbnail by
    its own marker, and each is as many `<image>` as it has tokens; then end.
    """
    parts = [tokens.start] if tokens.markers else []
    for view in plan.views:
        if tokens.markers and view.kind == "tile":
            parts.append(tokens.tile.format(row=view.row, col=view.col))
        elif tokens.markers and view.kind == "thumbnail":
            parts.append(tokens.thumbnail)
        parts.append(tokens.image * view.n_tokens)
    if tokens.markers:
        parts.append(tokens.end)
    return "".join(parts)
