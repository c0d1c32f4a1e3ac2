"""The demo: three questions about shipped pictures and three about a scene drawn from a seed.

Also makes the shipped pictures (`make_examples`), so that they are nobody's but the generator's.
Knows scenes and the public face of a model; imports no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_mm.cli.plugins import Answered
from lfm2_vision.draw import draw_tiles
from lfm2_vision.frontend import ImageEncoder
from lfm2_vision.picture import open_picture
from lfm2_vision.scenes import (
    QA,
    Profile,
    Sample,
    for_evaluation,
    generate,
    generate_scene,
    stream,
)
from lfm2_vision.tiling import Plan

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = [
    "DRAWN",
    "EXAMPLES",
    "Example",
    "drawn_sample",
    "examples",
    "make_examples",
    "run",
    "same_answer",
]

SEED = 2026
DRAWN = Profile(size=(320, 240), things=(2, 3))
"""The scene drawn at run time."""
_KINDS = ("colour", "count", "shape", "exist")  # what nano-vl does well (README: scores)
_MAX_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Example:
    """A shipped picture, with a question about it.

    Attributes:
        file: Its name.
        index: Which held-out scene of the data set `SEED` it shows.
        size: Width and height.
        things: Least and greatest number of things, as the profile says.
        question: What the demo asks.
        answer: What is right.
    """

    file: str
    index: int
    size: tuple[int, int]
    things: tuple[int, int]
    question: str
    answer: str

    def sample(self) -> Sample:
        """The scene and its pixels."""
        profile = Profile(size=self.size, things=self.things)
        return generate(SEED, self.index, split="held_out", profile=profile)


EXAMPLES = (
    Example(
        file="simple.png",
        index=28,
        size=(256, 256),
        things=(1, 2),
        question="What colour is the star?",
        answer="orange",
    ),
    Example(
        file="wide.png",
        index=15,
        size=(900, 600),
        things=(3, 4),
        question="How many circles are there?",
        answer="2",
    ),
    Example(
        file="tall.jpg",
        index=29,
        size=(240, 480),
        things=(2, 3),
        question="What shape is yellow?",
        answer="circle",
    ),
)


def make_examples(folder: Path) -> None:
    """Draw the shipped pictures anew, with `examples.json` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for example in EXAMPLES:
        image = example.sample().image
        if example.file.endswith(".jpg"):
            image.save(folder / example.file, quality=92)
        else:
            image.save(folder / example.file, optimize=True)
    listed = {"seed": SEED, "examples": [asdict(example) for example in EXAMPLES]}
    text = json.dumps(listed, indent=2) + "\n"
    (folder / "examples.json").write_text(text, encoding="utf-8")


def examples() -> Iterator[tuple[Path, str, str]]:
    """Each shipped picture with its question and answer, as `examples.json` says."""
    folder = Path(str(resources.files("lfm2_vision").joinpath("examples")))
    listed = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    for row in listed["examples"]:
        yield folder / row["file"], row["question"], row["answer"]


def run(model: Model, seed: int, folder: Path) -> Iterator[Answered]:
    """Ask all six questions; the pictures, and the tiling of a large one, go to the folder."""
    encoder = model.encoders.get("image")
    for path, question, truth in examples():
        shutil.copyfile(path, folder / path.name)
        files: tuple[str, ...] = (path.name,)
        about = path.name
        if isinstance(encoder, ImageEncoder):
            picture = open_picture(path)
            layout = encoder.plan(picture)
            about = f"{path.name} ({_described(layout)})"
            if layout.tiled:
                tiles = f"{path.stem}-tiles.png"
                draw_tiles(picture.image, layout).save(folder / tiles)
                files = (*files, tiles)
        yield _ask(model, path, about, question, truth, files)
    sample = drawn_sample(seed)
    drawn = folder / f"scene-{seed}.png"
    sample.image.save(drawn)
    about = f"{drawn.name} (drawn just now from --seed {seed})"
    for qa in _three(sample, seed):
        yield _ask(model, drawn, about, qa.question, qa.answer, (drawn.name,))


def drawn_sample(seed: int) -> Sample:
    """A scene that was never trained on, of things that were.

    The first of the held-out scenes of this seed without a (shape, colour) pair that training
    never shows: on those nano-vl still fails (README: scores), and a demo is no place for that.
    """
    for index in count():
        scene = generate_scene(seed, index, split="held_out", profile=DRAWN)
        if not scene.has_held_out_pair:
            return generate(seed, index, split="held_out", profile=DRAWN)
    raise AssertionError("half of the held-out scenes have no such pair")


def _three(sample: Sample, seed: int) -> list[QA]:
    """Three different questions, of three kinds where the scene allows."""
    rng = stream(seed, 0, "held_out", "demo")
    found: dict[str, QA] = {}
    kinds: tuple[str, ...] = _KINDS
    while len(found) < 3:
        for qa in for_evaluation(sample.scene, rng, kinds):
            found.setdefault(qa.question, qa)
        kinds = ("exist", "count")  # these two every scene allows, about many things
    return list(found.values())[:3]


def same_answer(answer: str, truth: str) -> bool:
    """Equal but for case, blanks and a full stop."""
    return answer.strip().rstrip(".").casefold() == truth.strip().rstrip(".").casefold()


def _ask(
    model: Model, path: Path, about: str, question: str, truth: str, files: tuple[str, ...]
) -> Answered:
    answer = str(model.ask(question, images=[path], max_tokens=_MAX_TOKENS))
    return Answered(
        about=about,
        question=question,
        answer=answer,
        truth=truth,
        right=same_answer(answer, truth),
        files=files,
    )


def _described(layout: Plan) -> str:
    views = f"{layout.cols}x{layout.rows} tiles" if layout.tiled else "one view"
    return f"{layout.width}x{layout.height}, {views}, {layout.n_tokens} tokens"
