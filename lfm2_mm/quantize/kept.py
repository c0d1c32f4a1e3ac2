"""Packed copies of models, kept from one `load(quantize=..., keep_packed=True)` to the next.

A copy is an ordinary packed checkpoint in the user's cache folder, named by what it was made of:
the files it came from as they lay there (sizes and times), the recipe, the number format and the
frontend's options. Knows folders and their names; neither weights nor how a model is built.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_mm.errors import Lfm2Error
from lfm2_mm.quantize.files import VERSION

__all__ = ["forget", "keep", "kept_folder"]

_READ = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # what a model is loaded from


def kept_folder(source: Path, recipe: str, dtype: str, extra: Mapping[str, Any]) -> Path:
    """Where the packed copy of a checkpoint folder is, or would be.

    Args:
        source: The folder of the original.
        recipe: How it is packed.
        dtype: Number format of what is not packed.
        extra: Options of the frontend.
    """
    import platformdirs

    from lfm2_mm import __version__

    source = source.resolve()
    asked = [str(source), recipe, dtype, sorted((name, repr(extra[name])) for name in extra)]
    found = [
        [str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(source.rglob("*"))
        if path.suffix in _READ and path.is_file()
    ]
    name = re.sub(r"[^\w.]+", "-", source.name)[:40]
    made = _digest([found, VERSION, __version__])
    root = Path(platformdirs.user_cache_dir("lfm2-mm", appauthor=False)) / "packed"
    return root / f"{name}-{recipe}-{_digest(asked)}-{made}"


def keep(model: Any, folder: Path) -> bool:
    """Save a packed model there, in the place of copies of earlier states of its original.

    Returns:
        Whether it is there now; a disk that takes none is told to the log.
    """
    if not hasattr(model, "save"):
        return False
    try:
        model.save(folder)
    except (Lfm2Error, OSError) as error:
        logging.getLogger("lfm2_mm").warning("the packed model is not kept: %s", error)
        return False
    for old in folder.parent.glob(folder.name.rpartition("-")[0] + "-*"):
        if old != folder:
            forget(old)
    return True


def forget(folder: Path) -> None:
    """Remove a copy; what is mapped from it stays readable."""
    shutil.rmtree(folder, ignore_errors=True)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
