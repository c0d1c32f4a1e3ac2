"""Every setting and where its value came from: flag > environment > config file > default.

Imports no torch, so that the command line can ask it at start. This module knows nothing of models:
a name is not looked up here, and the device `auto` is resolved by whoever loads.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lfm2_mm.errors import SettingError

__all__ = ["Setting", "Settings", "apply_threads", "config_path", "physical_cores", "resolve"]

MAX_THREADS = 1024

_DEVICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_QUANTIZE = ("none", "int4", "int8")
_CACHES = ("auto", "int8")
_LEVELS = ("debug", "info", "warning", "error")
_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: Its name, as in the config file.
        value: The value in force; never a secret.
        source: Where it came from, as text: "flag --device", "environment variable
            LFM2_MM_DEVICE", "config file PATH" or "default".
    """

    name: str
    value: str | int | None
    source: str


@dataclass(frozen=True)
class Settings:
    """All settings, in the order of the table; made by `resolve`."""

    table: Mapping[str, Setting]

    @property
    def model(self) -> str:
        """Embedded name, folder or Hub id of the model."""
        return str(self.table["model"].value)

    @property
    def device(self) -> Literal["auto", "cpu", "cuda", "mps"]:
        """Where the model runs."""
        return cast(Literal["auto", "cpu", "cuda", "mps"], self.table["device"].value)

    @property
    def dtype(self) -> Literal["auto", "float32", "bfloat16", "float16"]:
        """What the weights are computed in."""
        return cast(Literal["auto", "float32", "bfloat16", "float16"], self.table["dtype"].value)

    @property
    def quantize(self) -> Literal["none", "int4", "int8"]:
        """How weights are packed while they are loaded."""
        return cast(Literal["none", "int4", "int8"], self.table["quantize"].value)

    @property
    def kv_cache_dtype(self) -> Literal["auto", "int8"]:
        """How keys and values of earlier positions are kept."""
        return cast(Literal["auto", "int8"], self.table["kv_cache_dtype"].value)

    @property
    def threads(self) -> int:
        """CPU threads of one operation."""
        return int(self.table["threads"].value or 1)

    @property
    def log(self) -> str:
        """Least severe level that is logged."""
        return str(self.table["log"].value)

    def origin(self, name: str) -> str:
        """Where a setting's value came from, as text for a person."""
        return self.table[name].source

    def rows(self) -> list[Setting]:
        """Every setting, those of the Hugging Face tools included, in a fixed order."""
        return list(self.table.values())


def _one_of(choices: tuple[str, ...]) -> Callable[[object], str | None]:
    def parse(value: object) -> str | None:
        text = value.strip().lower() if isinstance(value, str) else None
        return text if text in choices else None

    return parse


def _threads(value: object) -> int | None:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"\s*[0-9]{1,9}\s*", value) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 1 <= value <= MAX_THREADS else None


def _model(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


@dataclass(frozen=True)
class _Row:
    """How one setting is read: `parse` gives None for a value that cannot be used."""

    name: str
    parse: Callable[[object], str | int | None]
    wanted: str
    default: Callable[[], str | int]

    @property
    def variable(self) -> str:
        return f"LFM2_MM_{self.name.upper()}"


def _rows() -> tuple[_Row, ...]:
    return (
        _Row("model", _model, "an embedded name, a folder or a Hub id", lambda: "nano-vl"),
        _Row("device", _one_of(_DEVICES), f"one of {', '.join(_DEVICES)}", lambda: "auto"),
        _Row("dtype", _one_of(_DTYPES), f"one of {', '.join(_DTYPES)}", lambda: "auto"),
        _Row("threads", _threads, f"a positive integer up to {MAX_THREADS}", physical_cores),
        _Row("log", _one_of(_LEVELS), f"one of {', '.join(_LEVELS)}", lambda: "warning"),
        _Row("quantize", _one_of(_QUANTIZE), f"one of {', '.join(_QUANTIZE)}", lambda: "none"),
        _Row("kv_cache_dtype", _one_of(_CACHES), f"one of {', '.join(_CACHES)}", lambda: "auto"),
    )


def resolve(**flags: str | int | None) -> Settings:
    """Find every setting's value and where it comes from.

    Args:
        **flags: Values given on the command line or by a caller, by setting name; None and names
            left out mean not given.

    Raises:
        SettingError: A value cannot be used, or the config file is broken; names the source.
        TypeError: A flag is no setting.
    """
    rows = _rows()
    unknown = set(flags) - {row.name for row in rows}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    path = config_path()
    file = _read_config(path, [row.name for row in rows])
    table: dict[str, Setting] = {}
    for row in rows:
        if flags.get(row.name) is not None:
            found: object = flags[row.name]
            source = f"flag --{row.name.replace('_', '-')}"
        elif os.environ.get(row.variable):
            found, source = os.environ[row.variable], f"environment variable {row.variable}"
        elif row.name in file:
            found, source = file[row.name], f"config file {path}"
        else:
            table[row.name] = Setting(row.name, row.default(), "default")
            continue
        value = row.parse(found)
        if value is None:
            raise SettingError(f"{row.name} is {found!r} (from {source}): it must be {row.wanted}")
        table[row.name] = Setting(row.name, value, source)
    for setting in _hugging_face():
        table[setting.name] = setting
    return Settings(table)


def config_path() -> Path:
    """The config file: `LFM2_MM_CONFIG`, or `lfm2-mm/config.toml` in the user's config folder."""
    override = os.environ.get("LFM2_MM_CONFIG")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_config_dir("lfm2-mm", appauthor=False)) / "config.toml"


def _read_config(path: Path, names: list[str]) -> dict[str, Any]:
    """Values of the config file; none where the file does not exist and was not asked for."""
    asked = bool(os.environ.get("LFM2_MM_CONFIG"))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not asked:
            return {}
        raise SettingError(
            f"there is no config file {path}: correct the environment variable LFM2_MM_CONFIG"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"the config file {path} is not valid TOML: {reason}; correct or remove it"
        ) from None
    except OSError as error:
        raise SettingError(
            f"the config file {path} cannot be read: {error.strerror}; correct or remove it"
        ) from None
    for name in content:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(names)}"
            raise SettingError(f"the config file {path} has an unknown setting {name!r}: {hint}")
    return content


def _hugging_face() -> list[Setting]:
    """What the Hugging Face tools will use, only reported; the token itself is never shown."""

    def source(variable: str) -> str:
        return f"environment variable {variable}" if os.environ.get(variable) else "default"

    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
    return [
        Setting("hf_home", os.path.expanduser(home), source("HF_HOME")),
        Setting("hf_hub_offline", "yes" if offline else "no", source("HF_HUB_OFFLINE")),
        Setting("hf_token", "set" if os.environ.get("HF_TOKEN") else "not set", source("HF_TOKEN")),
    ]


def apply_threads(settings: Settings) -> None:
    """Let torch use `settings.threads` threads inside one operation."""
    import torch

    torch.set_num_threads(settings.threads)


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may use: hyper-threads count once, CPU affinity and cgroup hold.

    Where the system does not tell (not Linux), the number of logical processors.

    Args:
        root: Where `sys` and `proc` lie; another folder only in tests.
    """
    if not sys.platform.startswith("linux"):
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        topology = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
        siblings = _first_line(topology / "thread_siblings_list")
        cores.add(siblings or f"cpu{cpu}")
    quota = _cgroup_quota(root)
    return max(1, min(len(cores), math.ceil(quota)) if quota else len(cores))


def _cgroup_quota(root: Path) -> float | None:
    """Processors' worth of time that the cgroup and its parents grant, or None for no limit."""
    mount = root / "sys/fs/cgroup"
    grants = []
    own = _first_line(root / "proc/self/cgroup").partition("::")[2].strip("/")
    folders = [
        mount,
        *(mount.joinpath(*own.split("/")[: i + 1]) for i in range(own.count("/") + 1)),
    ]
    for folder in folders:
        grants.append(_ratio(*(_first_line(folder / "cpu.max").split() + ["", ""])[:2]))
    old = mount / "cpu"
    grants.append(
        _ratio(_first_line(old / "cpu.cfs_quota_us"), _first_line(old / "cpu.cfs_period_us"))
    )
    return min((g for g in grants if g is not None), default=None)


def _ratio(quota: str, period: str) -> float | None:
    """Quota by period, both in microseconds; None for `max`, `-1` and anything unreadable."""
    if quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0:
        return int(quota) / int(period)
    return None


def _first_line(path: Path) -> str:
    """First line of a small file, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return ""
