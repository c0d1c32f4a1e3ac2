"""Builds the wheel through the sdist, compares it with the tree, imports it where nothing else is.

Run by `make check`. It knows the packages' names and nothing of what is in them; the environment
holds the wheel and click only, so whatever imports torch too early fails here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

__all__ = ["expected_files", "problems"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "lfm2_mm": "lfm2_mm",
    "lfm2_vision": "vision/lfm2_vision",
    "lfm2_audio": "audio/lfm2_audio",
    "lfm2_retrieval": "retrieval/lfm2_retrieval",
    "lfm2_evals": "evals/lfm2_evals",
}
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
NOT_IN_SDIST = (".venv", "demo-out", "runs", "build")
BUILT = "lfm2_mm/kernels/_native.so"  # by hatch_build.py, where there is a compiler

PROBE = """
import importlib, importlib.util, sys
from importlib.metadata import entry_points, version
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), f"{name} came from {module.__file__}"
assert "torch" not in sys.modules, "importing the packages imports torch"
for folder in ("vision", "audio", "retrieval", "evals"):
    assert importlib.util.find_spec(folder) is None, f"{folder} can be imported"
groups = {g: sorted(entry_points(group=g).names) for g in ("lfm2_mm.frontends", "lfm2_mm.commands")}
assert all(groups.values()), f"entry points are missing: {groups}"
print(version("lfm2-mm"))
"""


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """The output of a command; if it fails, print what it said and exit."""
    words = [str(word) for word in command]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        words, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nwheel: {shlex.join(words[:3])} … failed, see above.")
    return done.stdout


def expected_files(root: Path) -> set[str]:
    """The paths inside the wheel of every file of the packages that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listing = run([*command, *PACKAGES.values()], cwd=root)
    paths = {PurePosixPath(path) for path in listing.split("\0") if path and (root / path).exists()}
    return {
        str(PurePosixPath(name) / path.relative_to(folder))
        for name, folder in PACKAGES.items()
        for path in paths
        if path.is_relative_to(folder)
    }


def problems(wheel: Iterable[str], sdist: Iterable[str], expected: set[str]) -> list[str]:
    """One sentence for each thing that is wrong with the two lists of file names."""
    packed = {name for name in wheel if ".dist-info/" not in name}
    found = [f"the wheel lacks {name}." for name in sorted(expected - packed)]
    strange = packed - expected - {BUILT}
    found += [f"the wheel holds {name}, which is not in the tree." for name in strange]
    found += [
        f"the wheel has no {name}/py.typed."
        for name in PACKAGES
        if f"{name}/py.typed" not in packed
    ]
    models = [n for n in packed if n.startswith("lfm2_mm/pretrained/") and "safetensors" in n]
    if not models:
        found.append("the wheel has no weights under lfm2_mm/pretrained.")
    if not any(name.endswith(IMAGES) for name in packed):
        found.append("the wheel has no demo image.")
    for name in sdist:  # lfm2_mm-0.1.0/path
        top = name.partition("/")[2].partition("/")[0]
        if top.startswith(NOT_IN_SDIST) or name.endswith(BUILT):
            found.append(f"the sdist holds {name}.")
    return found


def main() -> None:
    """Build, compare, install, import; exit 1 with a sentence for each problem."""
    with tempfile.TemporaryDirectory(prefix="lfm2-mm-wheel-") as folder:
        work = Path(folder)
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", work, ROOT], cwd=ROOT)
        wheel, sdist = next(work.glob("*.whl")), next(work.glob("*.tar.gz"))
        names = zipfile.ZipFile(wheel).namelist()
        with tarfile.open(sdist) as archive:
            found = problems(names, archive.getnames(), expected_files(ROOT))
        if found:
            raise SystemExit("\n".join(f"wheel: {problem}" for problem in found))

        run([sys.executable, "-m", "venv", work / "empty"], cwd=work)
        python = work / "empty" / "bin" / "python"
        install: list[str | Path] = [python, "-m", "pip", "install", "-q"]
        extra = shlex.split(os.environ.get("PIP_ARGS", ""))
        run([*install, "-c", ROOT / "constraints.txt", *extra, "click"], cwd=work)
        run([*install, "--no-deps", wheel], cwd=work)
        version = run([python, "-I", "-c", PROBE, *PACKAGES], cwd=work).strip()
        said = run([work / "empty" / "bin" / "lfm2-mm", "--version"], cwd=work).strip()
        if version not in said:
            raise SystemExit(f"wheel: `lfm2-mm --version` says {said!r}, the wheel is {version}.")
        size = wheel.stat().st_size / 1e6
        print(f"wheel: {wheel.name}, {len(names)} files, {size:.1f} MB, imports without torch")


if __name__ == "__main__":
    main()
