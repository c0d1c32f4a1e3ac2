from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lfm2_mm.cli import machine
from lfm2_mm.cli.models import memory_need
from lfm2_mm.locate import KNOWN_MODELS

from .conftest import Run


@pytest.fixture
def embedded(nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of embedded models that holds a sound one and a damaged one."""
    home = tmp_path / "pretrained"
    shutil.copytree(nano_folder, home / "nano-vl")
    shutil.copytree(nano_folder, home / "nano-worn")
    (home / "nano-worn/model.safetensors").write_bytes(b"")
    monkeypatch.setattr("lfm2_mm.locate._pretrained", lambda: home)
    return home


def test_models_lists_what_is_here_and_what_exists(run: Run, embedded: Path) -> None:
    rows = json.loads(run("models", "--json").stdout)
    nano, worn, *rest = rows
    assert (nano["name"], nano["state"], nano["kind"]) == ("nano-vl", "embedded", "vision-language")
    assert nano["dtype"] == "float32"  # too small for bf16 to be worth it
    assert 2_500_000 < nano["parameters"] < 4_500_000
    assert 0.9 < nano["disk"] / (2 * nano["parameters"]) < 1.1
    assert nano["memory"] > 4 * nano["parameters"]
    assert worn["state"] == "damaged" and "model.safetensors" in worn["problem"]
    assert [row["name"] for row in rest] == [known.id for known in KNOWN_MODELS]
    states = {row["kind"]: row["state"] for row in rest}
    for kind in ("audio", "vision", "text", "retrieval", "embedding"):
        assert states[kind] == "to download"


def test_models_as_a_plain_table_and_one_by_name(run: Run, embedded: Path) -> None:
    result = run("models")
    head, first, *_ = result.stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "KIND", "PARAMETERS", "DISK", "MEMORY", "DTYPE"]
    assert first.split()[:3] == ["nano-vl", "embedded", "vision-language"]
    assert "warning: nano-worn: " in result.stderr
    one = run("models", "-m", "nano-vl").stdout.splitlines()
    assert len(one) == 2
    missing = run("models", "-m", "nano-vll")
    assert missing.exit_code == 1 and "did you mean nano-vl?" in missing.stderr


def test_models_on_a_terminal(run: Run, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2_mm.cli.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "120")
    result = run("models")
    assert "nano-vl" in result.stdout and "─" in result.stdout


def test_cached_models_are_found(
    run: Run, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_mm.locate import CachedModel

    cached = CachedModel("LiquidAI/LFM2-VL-450M", "0123456789abcdef", 7, nano_folder)
    monkeypatch.setattr("lfm2_mm.cli.models.cached_models", lambda: [cached])
    monkeypatch.setattr("lfm2_mm.cli.models.embedded_models", lambda: [])
    first, *rest = json.loads(run("models", "--json").stdout)
    assert (first["name"], first["state"], first["kind"]) == (cached.id, "cached", "vision")
    assert first["disk"] == 7
    assert cached.id not in [row["name"] for row in rest]
    assert "@01234567" in run("models", "-m", cached.id).stdout


def test_memory_counts_weights_keys_and_columns() -> None:
    import torch

    config = {
        "model_type": "lfm2",
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 4,
    }
    keys = 2 * 2 * 2 * 2 * 4096
    assert memory_need(config, 100, torch.bfloat16) == 2 * (100 + keys + 3 * 8)
    rows = 2 * 2 * 2 * 4096
    assert memory_need(config, 100, torch.float32, "int8") == 4 * (100 + 3 * 8) + rows * (2 + 4)


def test_doctor_tells_what_was_found(run: Run, nano_folder: Path) -> None:
    result = run("doctor", "--json", "--threads", 1, "--dtype", "float32")
    report: Any = json.loads(result.stdout)
    assert report["problems"] == [] and result.exit_code == 0
    settings = {row["name"]: row for row in report["settings"]}
    assert settings["model"]["value"] == str(nano_folder)
    assert settings["model"]["from"] == "environment variable LFM2_MM_MODEL"
    assert settings["dtype"] == {
        "name": "dtype",
        "value": "float32",
        "from": "flag --dtype",
    }
    assert settings["device"]["from"] == "default"
    assert report["versions"]["torch"].startswith("2.")
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory"] > 1e8
    assert [row["name"] for row in report["frontends"]] == ["audio", "retrieval", "vision"]
    assert "nano-vl" in next(row for row in report["plugins"] if row["name"] == "vision")["recipes"]
    text = run("doctor").stdout
    for part in ("versions", "machine", "settings", "frontends", "plugins", "nothing is broken"):
        assert part in text


def test_doctor_exits_1_when_something_is_broken(run: Run, embedded: Path) -> None:
    result = run("doctor", "--json", "-m", "nano-vll")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [row["loads"] for row in report["models"]] == [True, False]
    worn, lost = report["problems"]
    assert worn.startswith("the embedded model nano-worn does not load: ")
    assert "did you mean nano-vl?" in lost
    assert "problems" in run("doctor", "-m", "nano-vll").stdout


def test_doctor_survives_unusable_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_THREADS", "lots")
    result = run("doctor")
    assert result.exit_code == 1
    assert "threads is 'lots' (from environment variable LFM2_MM_THREADS)" in result.stdout


def test_a_machine_is_described_from_proc(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Fast One\nflags\t\t: fpu avx2 amx_bf16\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    found = machine.look(tmp_path)
    assert (found.cpu, found.features) == ("Fast One", ("AVX2", "AMX-BF16"))
    assert (found.memory, found.available) == (102_400, 51_200)
    nothing = machine.look(tmp_path / "none")
    assert nothing.features == () and nothing.available is None
