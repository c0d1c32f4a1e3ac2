"""The library: built, found, switched off, and set to a path by name."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lfm2_mm.errors import SettingError
from lfm2_mm.kernels import native
from lfm2_mm.kernels.memory import huge

ROOT = Path(__file__).resolve().parents[2]
BUILT = native.LIBRARY.exists()


@pytest.fixture(autouse=True)
def best_path() -> Iterator[None]:
    yield
    os.environ.pop("LFM2_MM_CPU", None)
    os.environ.pop("LFM2_MM_NATIVE", None)
    native.choose(None)


@pytest.fixture
def hatch_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with one small source."""
    folder = tmp_path / "lfm2_mm" / "kernels" / "src"
    folder.mkdir(parents=True)
    (folder / "one.h").write_text("#pragma once\n#define ONE 1\n")
    seen = '__attribute__((visibility("default")))'
    text = f'#include "one.h"\nextern "C" {seen} int lfm2_interface() {{ return ONE; }}\n'
    (folder / "one.cpp").write_text(text)
    return tmp_path


def compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


# ---- building ----


def test_sources_are_compiled_once(project: Path, hatch_build: ModuleType) -> None:
    if not compiler():  # then that is what is said
        with pytest.raises(hatch_build.NoLibrary, match="no C.. compiler was found"):
            hatch_build.build(project)
        return
    library = project / hatch_build.LIBRARY
    assert hatch_build.build(project)
    assert ctypes.CDLL(str(library)).lfm2_interface() == 1
    before = library.stat().st_mtime_ns
    assert not hatch_build.build(project)
    assert library.stat().st_mtime_ns == before
    (library.parent / "src" / "one.h").write_text("#pragma once\n#define ONE 2\n")
    assert hatch_build.build(project)
    assert library.stat().st_mtime_ns > before
    assert [path.name for path in library.parent.iterdir()] in (
        ["_native.so", "src"],
        ["src", "_native.so"],
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"CXX": "compiler-of-nowhere"}, "no C++ compiler was found (looked for compiler-of-now"),
        ({"CXX": "false"}, "the compiler false cannot build a program"),
        ({"LFM2_MM_NATIVE": "0"}, "LFM2_MM_NATIVE=0 asks for none"),
    ],
)
def test_what_stands_in_the_way_is_said(
    project: Path,
    hatch_build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    words: dict[str, str],
    text: str,
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hatch_build.NoLibrary) as caught:
        hatch_build.build(project)
    assert text in str(caught.value)
    assert not (project / hatch_build.LIBRARY).exists()


def test_a_source_that_does_not_compile_leaves_the_old_library(
    project: Path, hatch_build: ModuleType
) -> None:
    if compiler():
        hatch_build.build(project)
    (project / hatch_build.SOURCES / "one.cpp").write_text("int broken(\n")
    before = [path.stat().st_mtime_ns for path in project.rglob("_native.so")]
    with pytest.raises(hatch_build.NoLibrary, match="failed on one.cpp: .*error|no C.. compiler"):
        hatch_build.build(project)
    assert [path.stat().st_mtime_ns for path in project.rglob("_native.so")] == before


def test_the_script_says_it_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "hatch_build.py"],
        env={**os.environ, "CXX": "compiler-of-nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "lfm2_mm: no native kernels, torch computes everything: "
        "no C++ compiler was found (looked for compiler-of-nowhere)\n"
    )


def test_flags_are_those_of_the_architecture(hatch_build: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("// flags x86-64: -DA -DB\n// flags aarch64: -DC\nint a;\n")
    assert hatch_build.own_flags(source, "x86-64") == ["-DA", "-DB"]
    assert hatch_build.own_flags(source, "aarch64") == ["-DC"]
    assert hatch_build.own_flags(source, "riscv64") == []


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("x86_64-linux-gnu\n", "x86-64"),
        ("aarch64-linux-gnu\n", "aarch64"),
        ("arm64-apple-darwin23.5.0\n", "aarch64"),
        ("x86_64-apple-darwin23.5.0\n", "x86-64"),
        ("riscv64-linux-gnu\n", "riscv64"),
    ],
)
def test_the_architecture_is_what_the_compiler_compiles_for(
    hatch_build: ModuleType, target: str, name: str
) -> None:
    assert hatch_build.architecture(target) == name


@pytest.mark.parametrize(("machine", "name"), [("AMD64", "x86-64"), ("arm64", "aarch64")])
def test_a_compiler_that_does_not_say_it_compiles_for_this_machine(
    hatch_build: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: str, name: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert hatch_build.architecture("") == name


def test_every_instruction_set_has_a_file_and_its_flags(hatch_build: ModuleType) -> None:
    sources = ROOT / hatch_build.SOURCES
    for path, architecture in (("avx2", "x86-64"), ("avx512", "x86-64"), ("neon", "aarch64")):
        assert path in native._PATHS
        for part in ("linear", "forward", "search"):
            source = sources / f"{part}_{path}.cpp"
            flags = {name: hatch_build.own_flags(source, name) for name in ("x86-64", "aarch64")}
            assert [name for name, own in flags.items() if own] == [architecture], source.name


def test_paths_have_the_numbers_of_the_sources() -> None:
    text = (ROOT / "lfm2_mm/kernels/src/native.h").read_text()
    numbers = {name.lower(): int(at) for name, at in re.findall(r"LFM2_([A-Z0-9]+) = (\d)", text)}
    assert numbers == {name: at for at, name in enumerate(native._PATHS)}


def test_the_library_is_not_older_than_its_sources(hatch_build: ModuleType) -> None:
    """In a checkout: run `python hatch_build.py` after a change."""
    if compiler():
        assert hatch_build.build(ROOT) in (True, False)
        assert native.LIBRARY.exists()


# ---- finding ----


def test_the_best_path_is_taken_and_named() -> None:
    status = native.status()
    if not BUILT:
        assert status.path == "torch" and "install a C++ compiler" in status.reason
        return
    assert status.path == status.features[-1]
    assert status.features[0] == "plain"
    assert status.reason == "the best that this CPU can run"


@pytest.mark.parametrize("path", ["plain", "avx2", "avx512", "amx", "neon"])
def test_the_environment_asks_for_a_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available = native.status().features
    monkeypatch.setenv("LFM2_MM_CPU", path)
    status = native.status()
    if path in available:
        assert (status.path, status.reason) == (path, f"LFM2_MM_CPU={path}")
    elif available:
        assert status.path == available[-1]
        assert status.reason == f"LFM2_MM_CPU={path} is more than this CPU can run"


def test_the_library_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    assert native.library() is None
    assert native.function("lfm2_paths", []) is None
    assert native.choose("plain") == "torch"
    assert native.status() == native.NativeStatus("torch", (), "LFM2_MM_NATIVE=0")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "LFM2_MM_CPU",
            "sse9",
            "LFM2_MM_CPU is 'sse9': set it to one of plain, avx2, avx512, amx, neon",
        ),
        ("LFM2_MM_NATIVE", "no", "LFM2_MM_NATIVE is 'no': set it to 0 or 1, or not at all"),
    ],
)
def test_unknown_values_are_refused(
    name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError) as caught:
        native.status()
    assert str(caught.value) == text
    with pytest.raises(SettingError):
        native.library()


def test_a_library_that_is_none_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"no library")
    loaded = native._load(True, "", tmp_path / "_native.so")
    assert loaded.library is None
    assert loaded.reason.startswith("_native.so cannot be loaded (")
    assert native._load(True, "", tmp_path / "none.so").reason.startswith("no library was built")


def test_a_library_of_another_interface_is_left_alone(
    project: Path, hatch_build: ModuleType
) -> None:
    (project / hatch_build.SOURCES / "one.h").write_text("#pragma once\n#define ONE 99\n")
    if compiler():
        hatch_build.build(project)
        loaded = native._load(True, "", project / hatch_build.LIBRARY)
        assert loaded.library is None
        assert loaded.reason == (
            f"_native.so has interface 99, not {native._INTERFACE}: install the package again"
        )


def test_a_function_that_the_library_lacks_is_none() -> None:
    assert native.function("lfm2_of_nowhere", []) is None


def test_threads_meet() -> None:
    count = native.function("lfm2_count_threads", [ctypes.c_int], ctypes.c_int)
    if count is not None:
        assert [count(n) for n in (0, 1, 2, 5)] == [1, 1, 2, 5]


def test_threads_are_those_of_torch() -> None:
    torch.set_num_threads(3)
    assert native.threads() == 3


def test_one_openmp_serves_torch_and_the_library() -> None:
    if not (BUILT and sys.platform == "linux"):
        return
    code = (
        "from lfm2_mm.kernels import native; import torch; native.library();"
        "maps = open('/proc/self/maps').read().split();"
        "print(len({word for word in maps if 'libgomp' in word}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "1\n", done.stderr


# ---- memory ----


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 3 * 2**21 + 7, 2**25 + 1])
def test_memory_is_there_and_starts_on_a_border(nbytes: int) -> None:
    room = huge(nbytes)
    assert room.shape == (nbytes,)
    assert room.data_ptr() % 64 == 0
    assert not room.any()
    room.fill_(7)
    assert int(room.long().sum()) == 7 * nbytes


def test_pieces_of_memory_do_not_overlap() -> None:
    pieces = [huge(n).fill_(i) for i, n in enumerate([10, 2**24, 65, 2**24, 1, 2**24, 64])]
    assert all(bool((piece == i).all()) for i, piece in enumerate(pieces))


def test_doctor_says_which_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2_mm.cli import doctor

    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    assert doctor._kernels() == {"path": "torch", "reason": "LFM2_MM_NATIVE=0", "available": []}
