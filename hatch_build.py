"""Compiles the native kernels when the package is built: lfm2_mm/kernels/src/*.cpp, one library.

hatchling runs the hook for wheels and editable installs; `python hatch_build.py` does the same by
hand, in place, and does nothing when no source has changed. Where there is no compiler, or it
fails, the package is built without the library and computes with torch alone. A source whose first
lines say `// flags x86-64: …` or `// flags aarch64: …` is compiled with those flags where that is
what the compiler compiles for.

Environment: CXX names the compiler, CXXFLAGS adds flags, LFM2_MM_NATIVE=0 leaves the library out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface as _Hook
else:
    try:
        from hatchling.builders.hooks.plugin.interface import BuildHookInterface as _Hook
    except ImportError:  # run by hand where hatchling is not installed
        _Hook = object

__all__ = ["CustomBuildHook", "NoLibrary", "Toolchain", "build"]

SOURCES = Path("lfm2_mm/kernels/src")
LIBRARY = Path("lfm2_mm/kernels/_native.so")
OBJECTS = Path("build/native")

_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math".split()
_WARNINGS = "-Wall -Wextra -Wno-psabi".split()  # psabi: vectors that never leave a file
_OPENMP = "-fopenmp"
_ARCHITECTURES = {"amd64": "x86-64", "x86_64": "x86-64", "arm64": "aarch64", "aarch64": "aarch64"}
_MARK = b"lfm2_mm kernels from sources "  # and their digest, within the library


class NoLibrary(Exception):
    """The library cannot be built here; the text says why."""


class Toolchain(NamedTuple):  # no dataclass: hatchling does not register this module
    """A compiler that works, and the flags that it gets for every source."""

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    identity: str
    architecture: str

    @classmethod
    def find(cls) -> Toolchain:
        """The compiler that CXX names, or the first of the usual ones.

        Raises:
            NoLibrary: if there is none, or it cannot compile.
        """
        asked = shlex.split(os.environ.get("CXX", ""))
        names = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
        command = next((name for name in names if shutil.which(name[0])), None)
        if command is None:
            looked = ", ".join(name[0] for name in names)
            raise NoLibrary(f"no C++ compiler was found (looked for {looked})")
        flags = [*_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        with tempfile.TemporaryDirectory(prefix="lfm2-mm-probe-") as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("int main() { return 0; }\n", encoding="utf-8")
            for openmp in ([_OPENMP], []):
                words = [*command, *flags, *openmp, "-o", str(probe.with_suffix("")), str(probe)]
                if _run(words).returncode == 0:
                    said = _run([*command, "--version"]).stdout.partition("\n")[0]
                    target = _run([*command, *flags, "-dumpmachine"])
                    made_for = architecture("" if target.returncode else target.stdout)
                    return cls(tuple(command), (*flags, *openmp), said, made_for)
        raise NoLibrary(f"the compiler {shlex.join(command)} cannot build a program")

    def compile(self, source: Path, target: Path) -> None:
        """One object file, moved into place when it is complete."""
        words = [*self.compiler, *self.flags, *_WARNINGS, *own_flags(source, self.architecture)]
        self._write([*words, "-c", str(source)], target)

    def link(self, objects: Sequence[Path], target: Path) -> None:
        """The shared library, moved into place: processes that use the old one keep it."""
        words = [*self.compiler, *self.flags, "-shared", *map(str, objects)]
        self._write(words, target)

    def _write(self, words: list[str], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        try:
            done = _run([*words, "-o", scratch])
            if done.returncode:
                first = next((line for line in done.stdout.splitlines() if "error" in line), "")
                raise NoLibrary(
                    f"{self.compiler[0]} failed on {Path(words[-1]).name}: "
                    f"{first.strip() or done.stdout.strip()[:200]}"
                )
            os.chmod(scratch, 0o755)
            os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)


def architecture(target: str) -> str:
    """The architecture of a target as compilers name it (`arm64-apple-darwin23`); "" is here."""
    name = target.strip().partition("-")[0] or platform.machine()
    return _ARCHITECTURES.get(name.lower(), name)


def own_flags(source: Path, architecture: str) -> list[str]:
    """The flags that a source asks for on an architecture."""
    head = source.read_text("utf-8").split("\n", 8)[:8]
    found = (re.match(r"// flags ([\w-]+): (.*)$", line) for line in head)
    return [w for match in found if match and match[1] == architecture for w in match[2].split()]


def build(root: Path) -> bool:
    """Compile what has changed, link it, and put the library in place.

    Args:
        root: The repository, or the unpacked sdist.

    Returns:
        Whether anything had to be done.

    Raises:
        NoLibrary: if it cannot be built here.
    """
    if os.environ.get("LFM2_MM_NATIVE") == "0":
        raise NoLibrary("LFM2_MM_NATIVE=0 asks for none")
    if sys.platform == "win32":
        raise NoLibrary("Windows is not supported")
    tools = Toolchain.find()
    sources = sorted((root / SOURCES).glob("*.cpp"))
    headers = b"".join(path.read_bytes() for path in sorted((root / SOURCES).glob("*.h")))
    base = " ".join([*tools.compiler, *tools.flags, tools.identity]).encode() + headers
    digests = {path: hashlib.sha256(base + path.read_bytes()).hexdigest()[:20] for path in sources}
    whole = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:20].encode()
    target = root / LIBRARY
    if target.exists() and _MARK + whole in target.read_bytes():
        return False
    folder = root / OBJECTS
    objects = {path: folder / f"{path.stem}-{digests[path]}.o" for path in sources}
    missing = [path for path in sources if not objects[path].exists()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda path: tools.compile(path, objects[path]), missing))
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-mark-") as scratch:
        mark = Path(scratch) / "mark.cpp"
        text = f'extern "C" const char lfm2_sources[] = "{(_MARK + whole).decode()}";\n'
        mark.write_text(text, encoding="utf-8")
        tools.link([*objects.values(), mark], target)
    for old in set(folder.glob("*.o")) - set(objects.values()):  # of former versions
        if old.stat().st_mtime < time.time() - 86400:
            old.unlink(missing_ok=True)
    return True


class CustomBuildHook(_Hook[Any] if TYPE_CHECKING else _Hook):  # type: ignore[misc]
    """hatchling's entry: adds the library to the wheel, which then fits one platform only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        if self.target_name != "wheel":
            return
        try:
            build(Path(self.root))
        except NoLibrary as why:
            self.app.display_warning(_without(why))
            return
        if version != "editable":
            system = re.sub(r"[^0-9A-Za-z]", "_", sysconfig.get_platform())
            build_data["tag"] = f"py3-none-{system}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")


def _without(why: NoLibrary) -> str:
    return f"lfm2_mm: no native kernels, torch computes everything: {why}"


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return subprocess.CompletedProcess(words, 1, stdout=f"error: {error}")


def main() -> None:
    """Build in place; exit 1 with one line where that cannot be done."""
    try:
        done = build(Path(__file__).resolve().parent)
    except NoLibrary as why:
        raise SystemExit(_without(why)) from None
    print(f"{LIBRARY}: {'built' if done else 'nothing has changed'}")


if __name__ == "__main__":
    main()
