"""Builds the native kernels with the address sanitizer and runs their tests on that library.

Run by `make check-kernels`. It works on a copy of the package and the tests, so that the library in
use stays as it is. Warnings of the compiler are errors here; arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lfm2_mm", "tests", "hatch_build.py", "pyproject.toml", "Makefile")
TESTS = ("tests/kernels",)
FLAGS = (
    "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined "
    "-Werror -Wno-maybe-uninitialized"  # GCC 12 means its own intrinsics by that
)
RUNTIMES = ("libasan.so", "libubsan.so")  # to be loaded before Python itself


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


def main() -> None:
    """Copy, build, run; the exit status is pytest's."""
    preload = runtimes()
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-check-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "_native.so")
                shutil.copytree(source, copy / name, ignore=ignore)
            else:
                shutil.copy(source, copy / name)
        environment = {**os.environ, "CXXFLAGS": FLAGS, "PYTHONPATH": folder}
        built = subprocess.run([sys.executable, "hatch_build.py"], cwd=copy, env=environment)
        if built.returncode:
            raise SystemExit(1)
        environment |= {
            "LD_PRELOAD": preload,
            # Python never frees some of its memory
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *TESTS]
        command += sys.argv[1:]
        raise SystemExit(subprocess.run(command, cwd=copy, env=environment).returncode)


if __name__ == "__main__":
    main()
