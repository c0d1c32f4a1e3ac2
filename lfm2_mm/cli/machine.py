"""What this machine is: processor, its features that matter for speed, memory. No torch."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "look"]

_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "asimddp": "NEON-DOT",
    "bf16": "NEON-BF16",
    "i8mm": "NEON-I8MM",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """Facts of a machine.

    Attributes:
        system: Operating system and architecture.
        cpu: The processor's own name.
        features: Instruction sets that the computation profits from.
        memory: Bytes of memory, or None where it cannot be told.
        available: Bytes of it that are free, or None.
    """

    system: str
    cpu: str
    features: tuple[str, ...]
    memory: int | None
    available: int | None


def look(root: Path = Path("/")) -> Machine:
    """Ask the system; `root` is where `proc` lies, another folder only in tests."""
    info = _read(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    total, free = _memory(root)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=name[1].strip() if name else platform.processor() or platform.machine(),
        features=tuple(text for flag, text in _FEATURES.items() if flag in present),
        memory=total,
        available=free,
    )


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in all and available."""
    info = _read(root / "proc/meminfo")
    found = [re.search(rf"^{key}:\s*(\d+) kB", info, re.M) for key in ("MemTotal", "MemAvailable")]
    total, free = (int(match[1]) * 1024 if match else None for match in found)
    if total is None:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            pass
    return total, free


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
