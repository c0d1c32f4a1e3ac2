"""How the results of the kernels for ARM are judged; to run them takes an emulator."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "tools/check_kernels.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(**named: np.ndarray) -> bytes:
    """Records as the program writes them; the kind is the name's first letter."""
    parts = [f"{k}\t{k[0]}\t{v.size}\n".encode() + v.tobytes() for k, v in named.items()]
    return b"".join(parts)


WHOLE = np.array([10, 2, -3], np.int32)  # whose first byte ends lines elsewhere
REAL = np.array([1.0, -2.0], np.float32)


def test_what_the_tests_read_is_copied_for_the_sanitizers(tool: ModuleType) -> None:
    folder = ROOT / "tests" / "kernels"
    assert str(folder.relative_to(ROOT)) in tool.TESTS
    read = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r'ROOT / "([\w.]+)', path.read_text("utf-8"))
    }
    assert {"hatch_build.py", "tools"} <= read <= set(tool.COPIED)


def test_records_are_read_as_they_were_written(tool: ModuleType) -> None:
    found = tool.records(written(i_codes=WHOLE, f_sums=REAL))
    assert list(found) == ["i_codes", "f_sums"]
    assert found["i_codes"][0] == "i" and found["f_sums"][0] == "f"
    np.testing.assert_array_equal(found["i_codes"][1], WHOLE)
    np.testing.assert_array_equal(found["f_sums"][1], REAL)


def test_what_is_near_passes_and_is_counted(tool: ModuleType) -> None:
    one = tool.records(written(i=WHOLE, f=REAL, n=REAL))
    other = tool.records(written(i=WHOLE, f=REAL * np.float32(1 + 2e-6), n=REAL * np.float32(1.01)))
    said = tool.compare(other, one)
    assert said.startswith("1 of integers (at most 0 apart), 1 in fp32 (at most ")
    assert said.endswith(", 0 in bf16 (at most 0 apart), 1 of whole steps (at most 0.01 apart)")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (written(i=WHOLE + 1, f=REAL), "i is 0.16 away, more than 0."),
        (written(i=WHOLE, f=REAL * np.float32(1.00001)), "f is 1e-05 away, more than 3e-06."),
        (written(i=WHOLE, f=REAL * np.float32("nan")), "f is nan away, more than 3e-06."),
        (written(i=WHOLE, f=REAL[:1]), "f is inf away, more than 3e-06."),
        (written(i=WHOLE), "the two runs have written different records."),
    ],
)
def test_what_is_far_or_missing_is_named(tool: ModuleType, found: bytes, text: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"check-kernels: {text}")):
        tool.compare(tool.records(found), tool.records(written(i=WHOLE, f=REAL)))


def test_a_missing_emulator_is_said_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/check_kernels.py", "--neon"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "check-kernels: --neon needs aarch64-linux-gnu-g++, which is not there: install a cross "
        "compiler for aarch64 and QEMU's user mode (on Debian g++-aarch64-linux-gnu and "
        "qemu-user).\n"
    )
