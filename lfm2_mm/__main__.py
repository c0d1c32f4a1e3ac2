"""`python -m lfm2_mm`: the command line under the package's own name."""

from __future__ import annotations

from lfm2_mm.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
