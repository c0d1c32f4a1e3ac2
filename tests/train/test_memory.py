"""The allocator keeps what was freed."""

from __future__ import annotations

import subprocess
import sys

from lfm2_mm.train.memory import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from lfm2_mm.train.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(25):
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_tensor_made_again_costs_no_page_faults() -> None:
    counts = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("kept", "given-back")
    }
    assert counts["kept"] < counts["given-back"] / 10


def test_another_system_is_left_alone(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
