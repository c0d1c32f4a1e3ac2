"""Fixtures of the command line's tests: a nano-vl nobody trained, a text model, and a runner."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from lfm2_mm.backbone import Backbone
from lfm2_mm.cli import cli
from lfm2_mm.config import BackboneConfig
from lfm2_mm.saving import save_checkpoint
from lfm2_vision import nano

Run = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Learn nano's tokenizer once: it always comes out the same and takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "tokenizer_files", functools.cache(nano.tokenizer_files))
        yield


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained nano-vl in the official layout: a real tokenizer, answers without sense."""
    folder = tmp_path_factory.mktemp("cli") / "nano"
    nano.export(nano.build(0), folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model with nano's tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "text"
    config = BackboneConfig(
        vocab_size=1024,
        hidden_size=32,
        ffn_size=64,
        layer_types=("conv", "full_attention"),
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        max_positions=256,
        eos_ids=(7,),
    )
    torch.manual_seed(0)
    state = {f"model.{k}": v for k, v in Backbone(config).state_dict().items()}
    raw = {**config.to_dict(), "architectures": ["Lfm2ForCausalLM"]}
    save_checkpoint(folder, state, raw, extra_files=nano.tokenizer_files())
    return folder


@pytest.fixture
def run(nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, with the untrained nano-vl as the default model."""
    monkeypatch.setenv("LFM2_MM_MODEL", str(nano_folder))
    monkeypatch.setenv("LFM2_MM_THREADS", "1")

    def invoke(*args: object, stdin: bytes | str | None = None) -> Result:
        return CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin)

    return invoke


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small red image."""
    path = tmp_path / "red.png"
    Image.new("RGB", (96, 64), "red").save(path)
    return path


def last_json(result: Result) -> object:
    """The JSON on the last line of stdout."""
    return json.loads(result.stdout.splitlines()[-1])
