"""Builds the native kernels with the address sanitizer and runs their tests on that library.

Run by `make check-kernels`. It works on a copy of the package and the tests, so that the library in
use stays as it is. Warnings of the compiler are errors here; arguments go to pytest.

With `--neon` it checks the kernels for ARM on any Linux machine instead: tools/neon_check.cpp and
all sources, cross-compiled, run under an emulator, and their results compared with those of the
plain path there and here. It says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["compare", "main", "records"]

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lfm2_mm", "tests", "tools", "hatch_build.py", "pyproject.toml", "Makefile")
TESTS = ("tests/kernels",)
FLAGS = (
    "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined "
    "-Werror -Wno-maybe-uninitialized"  # GCC 12 means its own intrinsics by that
)
RUNTIMES = ("libasan.so", "libubsan.so")  # to be loaded before Python itself
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python never frees some of its memory
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}

DRIVER = ROOT / "tools" / "neon_check.cpp"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
PLAIN, NEON = 0, 4  # as in src/native.h
BOUNDS = {"i": 0.0, "f": 3e-6, "h": 2e-3, "n": 1.2e-2}
"""How far results may be apart, by the kind of record, relative to their norm: not at all; by the
rounding of fp32; by numbers that fall to the other side in bf16; and the same for the bytes of
activations, as in tests/kernels/test_forward_rows.py."""

Records = dict[str, tuple[str, NDArray[Any]]]  # of int32 or float32


def runtimes() -> str:
    """Where the sanitizers' libraries lie."""
    compiler = os.environ.get("CXX", "c++").split()
    found = []
    for name in RUNTIMES:
        command = [*compiler, f"-print-file-name={name}"]
        try:
            path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            raise SystemExit(f"check-kernels: there is no compiler {compiler[0]}.") from None
        if not os.path.isabs(path):
            raise SystemExit(f"check-kernels: the compiler has no {name}: install it.")
        found.append(path)
    return " ".join(found)


def sanitized(arguments: Sequence[str]) -> int:
    """Copy, build, run; the exit status is pytest's."""
    preload = runtimes()
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-check-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "_native.so", "node_modules")
                shutil.copytree(source, copy / name, ignore=ignore)
            else:
                shutil.copy(source, copy / name)
        environment = {**os.environ, "CXXFLAGS": FLAGS, "PYTHONPATH": folder}
        built = subprocess.run([sys.executable, "hatch_build.py"], cwd=copy, env=environment)
        if built.returncode:
            raise SystemExit(1)
        environment |= {"LD_PRELOAD": preload, **SANITIZERS}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *TESTS]
        return subprocess.run([*command, *arguments], cwd=copy, env=environment).returncode


# ---- the kernels for ARM ----


def records(data: bytes) -> Records:
    """What tools/neon_check.cpp has written: name -> kind and numbers."""
    found: Records = {}
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        name, kind, count = data[at:end].decode().split("\t")
        numbers = np.frombuffer(data, np.int32 if kind == "i" else np.float32, int(count), end + 1)
        assert name not in found, name
        found[name] = (kind, numbers)
        at = end + 1 + numbers.nbytes
    return found


def compare(found: Records, wanted: Records) -> str:
    """The largest distances of each kind of record, in a line.

    Raises:
        SystemExit: a record is missing, or further away than it may be.
    """
    if found.keys() != wanted.keys():
        raise SystemExit("check-kernels: the two runs have written different records.")
    worst = dict.fromkeys(BOUNDS, 0.0)
    for name, (kind, numbers) in found.items():
        far = distance(numbers, wanted[name][1])
        if not far <= BOUNDS[kind]:
            raise SystemExit(
                f"check-kernels: {name} is {far:.2g} away, more than {BOUNDS[kind]:.2g}."
            )
        worst[kind] = max(worst[kind], far)
    kinds = [kind for kind, _ in found.values()]
    names = {"i": "of integers", "f": "in fp32", "h": "in bf16", "n": "of whole steps"}
    return ", ".join(f"{kinds.count(k)} {names[k]} (at most {worst[k]:.2g} apart)" for k in BOUNDS)


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    if found.shape != wanted.shape:
        return np.inf
    exact = wanted.astype(np.float64)
    far, size = float(np.linalg.norm(found - exact)), float(np.linalg.norm(exact))
    return far / size if size else far


def build_driver(folder: Path, compiler: str, flags: str) -> Path:
    """tools/neon_check.cpp with all kernels, by this compiler ("" for the one of this machine)."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    hatch_build: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    before = dict(os.environ)
    os.environ |= {"CXXFLAGS": f"{flags} -I{ROOT / hatch_build.SOURCES}"}
    os.environ |= {"CXX": compiler} if compiler else {}
    try:
        tools = hatch_build.Toolchain.find()
        sources = [*sorted((ROOT / hatch_build.SOURCES).glob("*.cpp")), DRIVER]
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(tools.compile, sources, objects))
    except hatch_build.NoLibrary as why:
        raise SystemExit(f"check-kernels: {why}.") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    program = folder / "neon_check"
    words = [*tools.compiler, *tools.flags, *map(str, objects), "-o", str(program)]
    linked = subprocess.run(words, capture_output=True, text=True)
    if linked.returncode:
        raise SystemExit(f"check-kernels: the check cannot be linked: {linked.stderr.strip()}.")
    return program


def emulated(program: Path, cpu: str, *words: str) -> bytes:
    """What the program writes on an emulated processor."""
    command = [EMULATOR, "-cpu", cpu, "-L", SYSROOT, str(program), *words]
    return output(command)


def output(command: Sequence[str]) -> bytes:
    """What a program writes."""
    done = subprocess.run(command, capture_output=True, env={**os.environ, **SANITIZERS})
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise SystemExit(
            f"check-kernels: {shlex.join(command)} ended with {done.returncode}: {said}"
        )
    return done.stdout


def neon() -> None:
    """Build for ARM and for this machine, run on emulated processors, compare."""
    for name in (CROSS, EMULATOR):
        if shutil.which(name) is None:
            raise SystemExit(
                f"check-kernels: --neon needs {name}, which is not there: install a cross "
                "compiler for aarch64 and QEMU's user mode (on Debian g++-aarch64-linux-gnu and "
                "qemu-user)."
            )
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-neon-") as scratch:
        folders = [Path(scratch, name) for name in ("arm", "sanitized", "here")]
        for folder in folders:
            folder.mkdir()
        program = build_driver(folders[0], CROSS, "-Werror")
        for cpu, paths in (("max", "17 4"), ("cortex-a53", "1 0")):
            seen = emulated(program, cpu).decode().strip()
            if seen != paths:
                raise SystemExit(f"check-kernels: {cpu} has paths {seen}, not {paths}.")
        plain = records(emulated(program, "max", str(PLAIN)))
        print("paths: neon is found on a processor with dot products, plain alone on one without")
        old = records(emulated(program, "cortex-a53", str(PLAIN)))
        print(f"plain there, without dot products, against plain: {compare(old, plain)}")
        fast = records(emulated(program, "max", str(NEON)))
        print(f"neon against plain: {compare(fast, plain)}", flush=True)
        here = records(output([str(build_driver(folders[2], "", "-O1")), str(PLAIN)]))
        print(f"neon against plain on this machine: {compare(fast, here)}", flush=True)
        checked = build_driver(folders[1], CROSS, FLAGS)
        safe = records(emulated(checked, "max", str(NEON)))
        print(f"neon with the sanitizers against plain: {compare(safe, plain)}")


def main() -> None:
    """The tests with the sanitizers, or the kernels for ARM."""
    if "--neon" in sys.argv[1:]:
        neon()
        return
    raise SystemExit(sanitized(sys.argv[1:]))


if __name__ == "__main__":
    main()
