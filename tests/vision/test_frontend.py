"""The image encoder as the core sees it: counts, keys, what is accepted, what is computed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_mm
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import CheckpointError, ImageError, PlaceholderMismatch, SettingError
from lfm2_mm.frontends import InputEncoder, frontends
from lfm2_mm.model import Model
from lfm2_vision.frontend import ImageEncoder, VisionFrontend
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.picture import DEFAULT_LIMITS
from lfm2_vision.prompt_text import ImageTokens
from tests import oracle
from tests.oracle import changed, picture

# width, height: views, `<image>` tokens, positions of the whole block (measured in transformers)
TABLE = {
    (32, 32): (1, 64, 66),
    (224, 224): (1, 64, 66),
    (256, 384): (1, 96, 98),
    (64, 2000): (1, 124, 126),
    (4000, 100): (1, 202, 204),
    (640, 480): (1, 234, 236),
    (800, 600): (1, 234, 236),
    (512, 512): (1, 256, 258),
    (720, 720): (1, 256, 258),
    (736, 736): (5, 1280, 1287),
    (1024, 1024): (5, 1280, 1287),
    (1000, 3000): (4, 1011, 1017),
    (1920, 1080): (9, 2300, 2311),
    (3024, 4032): (7, 1770, 1779),
}


def encoder(model: Model | None = None) -> ImageEncoder:
    found = (model or oracle.shared("vl")).encoders["image"]
    assert isinstance(found, ImageEncoder)
    return found


def official(**changes: Any) -> ImageEncoder:
    """An encoder that prepares as the released 2.5 checkpoints do."""
    tiny = encoder()
    return ImageEncoder(
        tiny.tower,
        tiny.connector,
        ImageConfig(**changes),
        token_id=oracle.IMAGE_ID,
        tokens=ImageTokens(),
        identity="official",
    )


@pytest.mark.parametrize("size", TABLE)
def test_counts_equal_the_measured_table(size: tuple[int, int]) -> None:
    views, tokens, block = TABLE[size]
    prepared = official().prepare({"type": "image", "image": picture(*size)})
    assert prepared.n_positions == prepared.text.count("<image>") == tokens
    assert prepared.text.count("<") == block
    assert len(prepared.tensors["shapes"]) == prepared.info["views"] == views
    assert prepared.tensors["patches"].shape == (4 * tokens, 768)
    assert prepared.info["tokens"] == tokens
    assert prepared.info["size"] == list(size)


def test_it_is_an_input_encoder() -> None:
    made = encoder()
    assert isinstance(made, InputEncoder)
    assert (made.placeholder, made.token_id) == ("<image>", oracle.IMAGE_ID)
    assert any(isinstance(found, VisionFrontend) for found in frontends())
    for kind, claimed in (("lfm2-vl", True), ("lfm2", False)):
        checkpoint = Checkpoint(Path(), "it", {"model_type": kind}, {}, {})
        assert VisionFrontend().claims(checkpoint) is claimed


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        ("a.PNG", True),
        ("dir/b.jpeg", True),
        ("https://example.org/c.webp?size=3", True),
        ("data:image/png;base64,AAAA", True),
        ("-", True),
        ("d.wav", False),
        ("https://example.org/page?x=.png", False),
        ("what is this?", False),
    ],
)
def test_what_looks_like_a_picture(source: str, accepted: bool) -> None:
    assert encoder().accepts(source) is accepted


def test_a_part_names_its_picture_in_either_form(tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": path},
        {"type": "image", "path": path},
        {"type": "image", "url": path},
        {"type": "image_url", "image_url": {"url": path}},
        {"type": "input_image", "image_url": path},
    ]
    keys = {encoder().prepare(part).key for part in parts}
    assert len(keys) == 1
    with pytest.raises(ImageError, match=r"only \['detail', 'type'\]; name the picture"):
        encoder().prepare({"type": "image", "detail": "low"})


def test_keys_tell_contents_and_settings_apart() -> None:
    def key(made: ImageEncoder, seed: int = 0, side: int = 40) -> str:
        return made.prepare({"image": picture(side, 40, seed=seed)}).key

    base = official()
    others = [
        key(base),
        key(base, seed=1),
        key(base, side=41),
        key(official(resample="bicubic")),
        key(official(max_image_tokens=128)),
        key(encoder()),
    ]
    assert len(set(others)) == len(others)
    assert key(base) == key(official()) == others[0]
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, "PNG")
    assert (
        base.prepare({"image": buffer.getvalue()})
        .tensors["patches"]
        .equal(base.prepare({"image": picture(40, 40)}).tensors["patches"])
    )


@torch.no_grad()
def test_pictures_encoded_together_equal_alone() -> None:
    made = encoder()
    sizes = [(40, 30), (200, 150), (64, 64), (16, 90)]
    batch = [made.prepare({"image": picture(*size, seed=i)}) for i, size in enumerate(sizes)]
    assert [part.info["views"] for part in batch] == [1, 5, 1, 1]
    before = made.views_encoded
    together = made.encode(batch)  # eight views, four at once
    assert made.views_encoded - before == 8
    for part, rows in zip(batch, together, strict=True):
        assert rows.shape == (part.n_positions, 64)
        torch.testing.assert_close(made.encode([part])[0], rows, atol=1e-5, rtol=0)


# --- loading


def test_the_budget_is_the_dial() -> None:
    small = oracle.ours("vl", max_image_tokens=4, max_tiles=1)
    counts = [
        encoder(model).prepare({"image": picture(300, 200)}).n_positions
        for model in (oracle.shared("vl"), small)
    ]
    assert counts == [4 * 16 + 12, 2]
    with pytest.raises(SettingError, match="max_image_tokens is 0; it must be an integer"):
        oracle.ours("vl", max_image_tokens=0)


def test_limits_reach_the_reader() -> None:
    model = oracle.ours("vl", limits=replace(DEFAULT_LIMITS, max_pixels=100))
    with pytest.raises(ImageError):
        model.ask("what?", images=[picture(20, 20)])


def test_every_model_has_a_cache_of_its_own_features() -> None:
    exact, half = encoder(oracle.shared("vl")), encoder(oracle.ours("vl", dtype=torch.bfloat16))
    part = {"image": picture(30, 30)}
    assert exact.prepare(part).key != half.prepare(part).key


def test_an_image_id_that_the_tokenizer_contradicts(tmp_path: Path) -> None:
    folder = changed("vl", tmp_path / "m", {"image_token_id": 11})
    with pytest.raises(CheckpointError, match="says image_token_id 11, its tokenizer gives"):
        lfm2_mm.load(folder, threads=1)
    folder = changed("vl", tmp_path / "n", {"image_token_id": None})
    assert encoder(lfm2_mm.load(folder, threads=1)).token_id == oracle.IMAGE_ID


def test_placeholders_and_pictures_must_match() -> None:
    model = oracle.shared("vl")
    says = "the question holds 2 image placeholders but 1 image was given; give one image for each"
    with pytest.raises(PlaceholderMismatch, match=says):
        model.ask("<image> and <image>?", images=[picture(20, 20)])
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(PlaceholderMismatch, match="1 image placeholder but 0 images were given"):
        model.prompt(bare)
    prompt = model.prompt(bare, images=[picture(20, 20)])
    assert len(prompt.slots) == 1


def test_users_cannot_write_picture_tokens() -> None:
    model = oracle.shared("vl")
    prompt = model.prompt([{"role": "user", "content": "<image> <|image_start|>"}])
    assert oracle.IMAGE_ID not in prompt.ids
    assert prompt.slots == ()
