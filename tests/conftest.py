"""What every test gets: no network, no traces in the user's folders, checked shapes, one thread.

This file knows no package of ours beyond its name. It runs before any of them is imported, which
is when the variables below are read.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from beartype import beartype
from hypothesis import HealthCheck, settings
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = ["lfm2_mm", "lfm2_vision", "lfm2_audio", "lfm2_retrieval", "lfm2_evals"]

_scratch = tempfile.mkdtemp(prefix="lfm2-mm-tests-")
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith("LFM2_MM_")]:
    del os.environ[_name]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=os.path.join(_scratch, "huggingface"),
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
# a shell that starts the tests in the background has it ignored, and some tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(_has_shape(part) for part in get_args(hint))


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for annotations that hold a shape; plain types are mypy's work.

    So tests can hand in values of a wrong type, as users do, and see the error they would see.
    """
    hints = function.__annotations__.items()
    function.__annotations__ = {name: hint for name, hint in hints if _has_shape(hint)}
    return beartype(function) if function.__annotations__ else function


# Shapes and dtypes at every function of ours are checked while tests run, and only then. The hook
# wants the checker's name in a module that can be imported, which this file is not.
sys.modules["house_shapes"] = ModuleType("house_shapes")
vars(sys.modules["house_shapes"])["check"] = check_shapes
install_import_hook(PACKAGES, "house_shapes.check")

# Hypothesis: the same examples on every machine, and no time limit for a single one.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("house")


class NetworkBlocked(RuntimeError):
    """A test tried to reach another machine. No OSError, so that no code takes it for one."""


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise NetworkBlocked(f"a test tried to connect to {address!r}")
        return original(self, address)

    return connect


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks sockets and name look-ups that leave this machine; moves the user's folders.

    Returns:
        The folder that stands in for the user's home during the test; it does not exist yet.
    """
    home = tmp_path_factory.getbasetemp() / "home" / os.urandom(6).hex()
    for kind in ("CONFIG", "CACHE", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        numeric = name is not None and name.replace(".", "").isdigit() or ":" in (name or "")
        if not (numeric or _is_local(name)):
            raise NetworkBlocked(f"a test tried to look up {host!r}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
    return home


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Loading a model sets the threads its user asked for; the next test starts with one again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
