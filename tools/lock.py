"""Writes constraints.txt from the packages of the environment that runs it (`make lock`).

Local version suffixes (`+cpu`) are cut, so that one file serves every build of torch; what only
CUDA builds bring, pip and the project itself are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["pins"]

HEADER = """\
# Every package of `pip install -e '.[all,dev]'`, at the versions the project is tested with.
# Made by `make lock`; do not edit. torch is pinned by hand, in the Makefile.
"""
PLATFORM_ONLY = ("cuda-", "nvidia-", "triton")


def pins(freeze: str) -> list[str]:
    """The lines of `pip freeze` as exact pins without local version suffixes, sorted by name.

    Raises:
        SystemExit: if a line is no exact pin, such as a package installed from a folder.
    """
    found = []
    for line in freeze.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if match is None:
            raise SystemExit(f"lock: {line!r} is no exact pin: install it from an index instead.")
        if not match[1].lower().startswith(PLATFORM_ONLY):
            found.append(f"{match[1]}=={match[2]}")
    return sorted(found, key=str.lower)


def main() -> None:
    """Freeze this environment into the file named by the first argument."""
    target = Path(sys.argv[1])
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"]
    command += ["--exclude", "pip"]
    frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = pins(frozen)
    target.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"lock: wrote {len(lines)} pins to {target}")


if __name__ == "__main__":
    main()
