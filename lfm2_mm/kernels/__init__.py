"""Native kernels for the CPU, compiled when the package is installed, each with a twin in torch.

README.md in this folder says how they are laid out. Nothing is loaded or chosen by importing this.
"""

from __future__ import annotations

__all__: list[str] = []
