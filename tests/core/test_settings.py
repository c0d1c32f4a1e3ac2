"""Settings come from the right place, say where they come from, and refuse bad values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lfm2_mm import settings
from lfm2_mm.errors import SettingError
from lfm2_mm.settings import Setting, physical_cores, resolve


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("LFM2_MM_", "HF_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("platformdirs.user_config_dir", lambda *a, **k: str(tmp_path / "config"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    found = resolve()
    assert (found.model, found.device, found.dtype, found.log) == (
        "nano-vl",
        "auto",
        "auto",
        "warning",
    )
    assert found.threads == physical_cores() >= 1
    assert {row.source for row in found.rows()} == {"default"}
    assert [row.name for row in found.rows()][:5] == ["model", "device", "dtype", "threads", "log"]


def test_precedence_and_origins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(
        tmp_path / "config" / "config.toml",
        'model = "from-file"\ndevice = "cuda"\ndtype = "float16"\nthreads = 3\n',
    )
    monkeypatch.setenv("LFM2_MM_MODEL", "from-env")
    monkeypatch.setenv("LFM2_MM_DEVICE", " CPU ")
    monkeypatch.setenv("LFM2_MM_DTYPE", "")
    found = resolve(model="from-flag", device=None)
    assert (found.model, found.device, found.dtype, found.threads) == (
        "from-flag",
        "cpu",
        "float16",
        3,
    )
    assert found.origin("model") == "flag --model"
    assert found.origin("device") == "environment variable LFM2_MM_DEVICE"
    assert found.origin("dtype") == f"config file {file}"
    assert found.origin("log") == "default"


def test_threads_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_THREADS", "7")
    assert resolve().threads == 7
    assert resolve(threads=2).threads == 2


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("device", "gpu", "one of auto, cpu, cuda, mps"),
        ("dtype", "int8", "one of auto, float32, bfloat16, float16"),
        ("quantize", "int3", "one of none, int4, int8"),
        ("kv_cache_dtype", "fp8", "one of auto, int8"),
        ("threads", "0", "a positive integer up to 1024"),
        ("threads", "-2", "a positive integer up to 1024"),
        ("threads", "two", "a positive integer up to 1024"),
        ("threads", "9" * 5000, "a positive integer up to 1024"),
        ("log", "loud", "one of debug, info, warning, error"),
        ("model", "  ", "an embedded name, a folder or a Hub id"),
    ],
)
def test_bad_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str, wanted: str) -> None:
    variable = f"LFM2_MM_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingError) as e:
        resolve()
    assert str(e.value) == (
        f"{name} is {value!r} (from environment variable {variable}): it must be {wanted}"
    )
    monkeypatch.delenv(variable)
    with pytest.raises(SettingError) as e:
        resolve(**{name: value})
    flag = name.replace("_", "-")
    assert str(e.value) == f"{name} is {value!r} (from flag --{flag}): it must be {wanted}"


def test_a_flag_that_is_no_setting_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="no such setting: colour"):
        resolve(colour="red")


def test_config_file_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", 'log = "debug"\n')
    monkeypatch.setenv("LFM2_MM_CONFIG", str(file))
    assert resolve().log == "debug"
    file.unlink()
    with pytest.raises(SettingError) as e:
        resolve()
    assert str(e.value) == (
        f"there is no config file {file}: correct the environment variable LFM2_MM_CONFIG"
    )


def test_broken_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config" / "config.toml"
    write(path, "model = \n")
    with pytest.raises(SettingError) as e:
        resolve()
    assert str(e.value).startswith(f"the config file {path} is not valid TOML: Invalid value")
    assert str(e.value).endswith("; correct or remove it")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="is not valid TOML: 'utf-8' codec"):
        resolve()
    write(path, 'devise = "cpu"\n')
    with pytest.raises(SettingError) as e:
        resolve()
    assert str(e.value) == (
        f"the config file {path} has an unknown setting 'devise': did you mean device?"
    )
    write(path, "zzz = 1\n")
    with pytest.raises(SettingError, match="'zzz': use model, device, dtype, threads, log"):
        resolve()
    write(path, "threads = true\n")
    with pytest.raises(SettingError) as e:
        resolve()
    assert str(e.value) == (
        f"threads is True (from config file {path}): it must be a positive integer up to 1024"
    )
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingError, match="cannot be read: Is a directory; correct or remove it"):
        resolve()


def test_hugging_face_is_reported_and_the_token_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    found = resolve()
    assert "hf_secret" not in repr(found)
    assert found.rows()[7:] == [
        Setting("hf_home", "/somewhere/huggingface", "default"),
        Setting("hf_hub_offline", "yes", "environment variable HF_HUB_OFFLINE"),
        Setting("hf_token", "set", "environment variable HF_TOKEN"),
    ]


def test_apply_threads() -> None:
    before = torch.get_num_threads()
    try:
        settings.apply_threads(resolve(threads=1))
        assert torch.get_num_threads() == 1
        settings.apply_threads(resolve(threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def machine(root: Path, siblings: list[str], cpu_max: str = "", nested: str = "") -> Path:
    """A fake /sys and /proc: one line of siblings for each processor."""
    for cpu, line in enumerate(siblings):
        write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", line + "\n")
    if cpu_max:
        write(root / "sys/fs/cgroup/cpu.max", cpu_max + "\n")
    if nested:
        write(root / "proc/self/cgroup", "0::/app/job\n")
        write(root / "sys/fs/cgroup/app/cpu.max", nested + "\n")
    return root


def test_physical_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    threads = ["0,4", "1,5", "2,6", "3,7"] * 2
    assert physical_cores(machine(tmp_path / "a", threads)) == 4
    assert physical_cores(machine(tmp_path / "b", threads, "150000 100000")) == 2
    assert physical_cores(machine(tmp_path / "c", threads, "max 100000")) == 4
    assert physical_cores(machine(tmp_path / "d", threads, "300000 100000", "50000 100000")) == 1
    assert physical_cores(tmp_path / "nothing") == 8
    old = machine(tmp_path / "e", threads)
    write(old / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    write(old / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert physical_cores(old) == 3
    write(old / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert physical_cores(old) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5}, raising=False)
    assert physical_cores(tmp_path / "a") == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert physical_cores(tmp_path / "a") == 10


def test_settings_and_locate_are_light() -> None:
    code = (
        "import sys, lfm2_mm.settings as s, lfm2_mm.locate; s.resolve();"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    root = str(Path(settings.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
