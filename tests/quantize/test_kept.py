"""Packed copies are kept, found again, and made anew when they are stale or damaged."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_mm
from lfm2_mm.errors import InputError
from lfm2_mm.quantize.kept import keep, kept_folder
from tests import oracle

IDS = list(range(40, 60))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lfm2-mm" / "packed"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return shutil.copytree(oracle.folder("dense"), tmp_path / "model")


def loaded(source: Path | str, **options: Any) -> tuple[Any, list[str]]:
    """The model, and what was packed for it."""
    packed: list[str] = []
    options = {"quantize": "int4", "keep_packed": True, **options}
    return lfm2_mm.load(source, threads=1, progress=packed.append, **options), packed


def test_the_second_time_nothing_is_packed(source: Path, cache: Path) -> None:
    first, packed = loaded(source)
    second, again = loaded(source)
    assert packed and not again
    assert torch.equal(first.logits(IDS), second.logits(IDS))
    plain, _ = loaded(source, keep_packed=False)
    assert torch.equal(plain.logits(IDS), first.logits(IDS))
    assert first.name == second.name == plain.name and first.dtype == second.dtype == plain.dtype
    (folder,) = cache.iterdir()
    assert folder.name.startswith("model-int4-")
    _, other = loaded(source, quantize="int8")
    assert other and len(list(cache.iterdir())) == 2
    for _ in range(2):
        half, _ = loaded(source, dtype="bfloat16")
        assert half.dtype == torch.bfloat16
    assert len(list(cache.iterdir())) == 3


def test_what_is_not_packed_is_not_kept(source: Path, cache: Path, tmp_path: Path) -> None:
    whole, packed = loaded(source, quantize="none")
    assert not packed and not cache.exists()
    loaded(source, keep_packed=False)[0].save(tmp_path / "packed")
    again, packed = loaded(tmp_path / "packed")
    assert not packed and not cache.exists()
    assert again.logits(IDS).shape == whole.logits(IDS).shape


def test_another_original_is_packed_anew_and_the_stale_copy_goes(source: Path, cache: Path) -> None:
    loaded(source)
    (before,) = cache.iterdir()
    os.utime(source / "model.safetensors", ns=(1, 1))
    _, packed = loaded(source)
    (now,) = cache.iterdir()
    assert packed and now != before


def test_a_damaged_copy_is_made_anew(source: Path, cache: Path) -> None:
    wanted = loaded(source)[0].logits(IDS)
    (folder,) = cache.iterdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found, packed = loaded(source)
    assert packed and torch.equal(found.logits(IDS), wanted)
    assert not loaded(source)[1]


def test_a_disk_that_takes_none_is_told_to_the_log(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.write_text("a file in the way", "utf-8")
    with caplog.at_level(logging.WARNING, "lfm2_mm"):
        model, packed = loaded(source)
    assert packed and model.logits(IDS).isfinite().all()
    assert "the packed model is not kept: the checkpoint " in caplog.text


@pytest.mark.parametrize("name", ["nano-vl", "nano-colbert", "nano-audio"])
def test_every_kind_of_model_is_kept(name: str, cache: Path) -> None:
    first, packed = loaded(name, quantize="int8")
    second, again = loaded(name, quantize="int8")
    assert packed and not again and type(first) is type(second)


def test_options_of_a_frontend_have_copies_of_their_own(source: Path) -> None:
    kinds = {kept_folder(source, "int4", "torch.float32", extra) for extra in ({}, {"a": 1})}
    assert len(kinds) == 2


def test_what_cannot_be_saved_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Model:
        def save(self, folder: Path) -> None:
            raise InputError(f"{folder.name} is full; make room")

    assert not keep(object(), tmp_path / "a")
    assert not keep(Model(), tmp_path / "a")
    assert "the packed model is not kept: a is full; make room" in caplog.text
