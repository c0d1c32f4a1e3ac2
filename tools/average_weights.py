"""The mean of several checkpoints' weights, as a checkpoint: `average_weights.py OUT MODEL MODEL…`.

Runs that began at the same weights often lie around a better point than any of them reaches
(Wortsman et al., "Model soups", 2022); nano-colbert and nano-vl are made so (docs/LOG.md). A
checkpoint named twice counts twice. All other files are the first one's. Knows no model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.locate import locate

WEIGHTS = "*.safetensors"


def average(folders: list[Path], out: Path) -> None:
    """Write the mean of the folders' tensors, computed in fp32, each in the first one's dtype.

    Args:
        folders: Checkpoints with the same files, names and shapes of tensors.
        out: A new folder.

    Raises:
        InputError: A checkpoint has other tensors than the first.
    """
    first = folders[0]
    means = {}
    for path in sorted(first.rglob(WEIGHTS)):
        name = path.relative_to(first)
        facts, mine = _read(path)
        sums = {key: value.float() for key, value in mine.items()}
        for folder in folders[1:]:
            _, theirs = _read(folder / name)
            if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in mine.items()}:
                raise InputError(
                    f"{str(folder / name)!r} has other tensors than {str(path)!r}; average "
                    "checkpoints of one model."
                )
            for key, value in theirs.items():
                sums[key] += value.float()
        mean = {key: (value / len(folders)).to(mine[key].dtype) for key, value in sums.items()}
        means[name] = facts, mean
    shutil.copytree(first, out)
    for name, (facts, mean) in means.items():
        save_file(mean, out / name, metadata=facts)
        shutil.copymode(first / name, out / name)


def _read(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """A file's metadata and tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("models", nargs="+", help="folders or embedded names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    average([locate(name).folder for name in args.models], args.out)


if __name__ == "__main__":
    main()
