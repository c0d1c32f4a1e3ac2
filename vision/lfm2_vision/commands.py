"""What the vision frontend adds to the command line: image options, the nano-vl recipe, the demo.

Imported for `--help`, so nothing here imports torch before a verb runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import terminal
from lfm2_mm.cli.plugins import Answered, Demo, Plugin, Recipe
from lfm2_mm.cli.sources import Attachment
from lfm2_mm.errors import InputError, SettingError
from lfm2_mm.train.runs import CHECKPOINT, begin_run, note_run
from lfm2_vision.draw import draw_boxes, draw_tiles
from lfm2_vision.frontend import ImageEncoder
from lfm2_vision.grounding import parse_boxes
from lfm2_vision.picture import Picture

if TYPE_CHECKING:
    from PIL import Image

    from lfm2_mm.chat import Prompt
    from lfm2_mm.model import Model

__all__ = ["VisionPlugin", "plugin", "train_nano_vl"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_BRANCHES = (1, 2)
_NOTE = (
    "note: the embedded nano-vl knows drawn scenes only (coloured shapes, short signs); for "
    "photographs use -m LiquidAI/LFM2.5-VL-450M"
)


class VisionPlugin(Plugin):
    """The plug-in object; see `lfm2_mm.cli.plugins.Plugin`."""

    ask_options: Sequence[click.Option] = (
        click.Option(
            ["--max-image-tokens"],
            type=int,
            metavar="N",
            help="Tokens of one view of an image at most: fewer are quicker, more see more.",
        ),
        click.Option(
            ["--max-tiles"], type=int, metavar="N", help="Tiles of one image at most; 1 never cuts."
        ),
        click.Option(
            ["--show-tiles"],
            metavar="FILE.png",
            help="Draw how the image is cut up; several images: FILE-1.png, FILE-2.png, …",
        ),
        click.Option(
            ["--draw-boxes"],
            metavar="FILE.png",
            help="Draw the boxes that the answer names (bbox_2d) into the image.",
        ),
    )
    notes: Mapping[str, str] = {"nano-vl": _NOTE}

    @property
    def recipes(self) -> Mapping[str, Recipe]:  # type: ignore[override]  # read-only here
        """The recipe of the embedded model."""
        return {"nano-vl": train_nano_vl, "nano-vl-more": partial(train_nano_vl, more=True)}

    @property
    def demos(self) -> Sequence[Demo]:  # type: ignore[override]  # read-only here
        """Questions about shipped pictures and about one drawn just now."""
        return (_demo,)

    def load_options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The image budget; also refuses pictures that could not be written."""
        for name in ("show_tiles", "draw_boxes"):
            if params.get(name) is not None:
                _check_target(name, Path(params[name]))
        names = ("max_image_tokens", "max_tiles")
        return {name: params[name] for name in names if params.get(name) is not None}

    def after_prompt(self, model: Model, prompt: Prompt, params: Mapping[str, Any]) -> None:
        """Draw the tiling of each image."""
        if params.get("show_tiles") is None:
            return

        def draw(encoder: ImageEncoder, pictures: Sequence[Picture]) -> list[Image.Image]:
            return [draw_tiles(p.image, encoder.plan(p)) for p in pictures]

        _draw_each(model, params, "show_tiles", "tiling", draw)

    def after_answer(
        self, model: Model, prompt: Prompt, answer_text: str, params: Mapping[str, Any]
    ) -> None:
        """Draw the boxes of the answer."""
        if params.get("draw_boxes") is None:
            return
        boxes = parse_boxes(answer_text)
        if not boxes:
            terminal.warn("the answer names no boxes (bbox_2d), so none are drawn")

        def draw(encoder: ImageEncoder, pictures: Sequence[Picture]) -> list[Image.Image]:
            return [
                draw_boxes(picture.image, [box for box in boxes if box.image_id == i])
                for i, picture in enumerate(pictures)
            ]

        _draw_each(model, params, "draw_boxes", "boxes", draw)


def _draw_each(
    model: Model,
    params: Mapping[str, Any],
    option: str,
    what: str,
    draw: Callable[[ImageEncoder, Sequence[Picture]], list[Image.Image]],
) -> None:
    """Write one drawing per image of the question."""
    encoder = model.encoders.get("image")
    given: list[Attachment] = [a for a in params["attachments"] if a.kind in ImageEncoder.types]
    if not isinstance(encoder, ImageEncoder) or not given:
        terminal.warn(f"there is no image, so no {what} was drawn")
        return
    pictures = [encoder.open({"type": "image", "image": a.open()}) for a in given]
    for i, sheet in enumerate(draw(encoder, pictures)):
        number = None if len(pictures) == 1 else i + 1
        target = _numbered(Path(params[option]), params.get("line"), number)
        try:
            sheet.save(target)
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"{str(target)!r} cannot be written ({why}); check the path") from None
        terminal.say(f"{what} drawn: {target}", quiet=bool(params.get("quiet")))


def _numbered(path: Path, *numbers: int | None) -> Path:
    """`tiles.png` with the number of a batch line and of an image: `tiles-3-1.png`."""
    ends = "".join(f"-{number}" for number in numbers if number is not None)
    return path.with_name(f"{path.stem}{ends}{path.suffix}")


def _check_target(name: str, path: Path) -> None:
    option = "--" + name.replace("_", "-")
    if path.suffix.lower() not in _SUFFIXES:
        raise SettingError(
            f"{option} writes a picture, but {str(path)!r} does not end like one; "
            f"use {', '.join(_SUFFIXES)}"
        )
    if not path.absolute().parent.is_dir():
        raise SettingError(f"{option} names the folder {str(path.parent)!r}, which is not there")


def _demo(model: Model, seed: int, folder: Path) -> Iterator[Answered]:
    from lfm2_vision.demo import run

    return run(model, seed, folder)


def train_nano_vl(
    folder: Path,
    *,
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    fresh: bool = False,
    more: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train the embedded model, or go on with the folder's checkpoint; export to `model`.

    With `more` a new run begins with the embedded weights instead of untrained ones.

    Raises:
        InputError: if the folder's run has another length or seed.
    """
    from lfm2_vision import nano, nano_recipe

    length, chosen = begin_run(
        folder,
        steps=steps,
        seed=seed,
        fresh=fresh,
        length=nano_recipe.MORE_STEPS if more else nano_recipe.STEPS,
        also=[
            f"branch-{number}/{name}"
            for number in _BRANCHES
            for name in (CHECKPOINT, "log.jsonl", "scores.jsonl")
        ],
    )
    make = nano_recipe.recipe_more if more else nano_recipe.recipe
    plan = make(length) if chosen is None else make(length, chosen)
    note_run(folder, steps=length, seed=plan.seed)
    say(f"nano-vl: {length:,} steps, in {folder}; Ctrl-C keeps a checkpoint to go on from")
    if more:
        model = nano.train(
            plan,
            folder,
            until=until,
            device=device,
            workers=workers,
            start=nano.embedded(),
            say=say,
        )
    else:
        branches = [replace(plan, branch=number) for number in _BRANCHES]
        model = nano.train_branches(
            branches, folder, until=until, device=device, workers=workers, say=say
        )
    nano.export(model, folder / "model")
    return folder / "model"


plugin = VisionPlugin()
