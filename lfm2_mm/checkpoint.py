"""A checkpoint folder becomes a config and memory-mapped tensors under their stored names.

It knows files, formats and what can be wrong with them; it deliberately knows nothing of what the
names mean: `weights` does.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfm2_mm.errors import CheckpointError, CorruptWeights, ModelNotFound, TensorMismatch

__all__ = ["INDEX", "SINGLE", "Checkpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHERS = (".gguf", ".onnx", ".npz", ".h5", ".msgpack")
_JSON_LIMIT = 64 * 2**20
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class _Entry(NamedTuple):
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A checkpoint folder whose headers have been read and whose tensors are mapped on demand.

    Attributes:
        folder: Where it lies.
        name: What the user calls it; used in messages.
        config: `config.json` as a dict.
        names: All stored tensor names, sorted.
        nbytes: Size of all tensors, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: dict[str, Any],
        files: dict[str, Any],
        entries: dict[str, _Entry],
    ) -> None:
        self.folder, self.name, self.config = folder, name, config
        self._files, self._entries = files, entries
        self.names: tuple[str, ...] = tuple(sorted(entries))
        self.nbytes = sum(prod(e.shape) * e.dtype.itemsize for e in entries.values())

    @classmethod
    def open(cls, folder: Path | str, name: str | None = None) -> Checkpoint:
        """Read `config.json` and the headers of the weight files; no tensor is read.

        Weights are `model.safetensors`, or the shards of `model.safetensors.index.json`, or the
        folder's only `*.safetensors` file. Pickle formats are never opened.

        Raises:
            ModelNotFound: if there is no such folder.
            CheckpointError: if a JSON file is missing or unreadable.
            CorruptWeights: if a weight file is missing, damaged or of a refused format.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFound(f"there is no checkpoint folder {folder}; check the path")
        if not (folder / "config.json").is_file():
            hint = (
                "it holds an adapter, so load its base model instead"
                if (folder / "adapter_config.json").is_file()
                else "point to a folder as downloaded, with its config.json"
            )
            raise CheckpointError(f"the folder {folder} has no config.json; {hint}")
        config = _read_json(folder / "config.json")
        weight_map = _find_weights(folder)
        files = {file: _open_file(folder / file) for file in dict.fromkeys(weight_map.values())}
        entries: dict[str, _Entry] = {}
        for file, handle in files.items():
            for tensor in handle.keys():  # noqa: SIM118 - a handle is not a mapping
                if weight_map.get(tensor, file) == file:
                    entries[tensor] = _read_entry(folder / file, handle, tensor)
        if absent := [t for t in weight_map if t not in entries and t]:
            file = weight_map[absent[0]]
            raise CorruptWeights(
                f"{folder / INDEX} says that {absent[0]} is in {file}, but that file does not hold "
                f"it ({len(absent)} such in all); download the checkpoint again"
            )
        return cls(folder, name or folder.name or str(folder), config, files, entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a stored tensor, from the header."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, mapped into memory privately: no copy, and writes stay out of the file.

        Raises:
            TensorMismatch: if no tensor has this name.
        """
        handle = self._files[self._entry(name).file]
        mapped: Tensor = handle.get_tensor(name)
        return mapped

    def json(self, filename: str) -> dict[str, Any] | None:
        """A JSON side file such as `generation_config.json`, or None if there is none.

        Raises:
            CheckpointError: if the file is not a JSON object.
        """
        path = self.file(filename)
        return None if path is None else _read_json(path)

    def file(self, filename: str) -> Path | None:
        """The path of a side file, or None if there is none.

        Raises:
            CheckpointError: if the name leads out of the folder.
        """
        inside = PurePosixPath(filename)
        if inside.is_absolute() or ".." in inside.parts or "\\" in filename:
            raise CheckpointError(
                f"{self.name} refers to the file {filename!r} outside its folder; "
                "use a checkpoint from a source you trust"
            )
        path = self.folder / inside
        return path if path.is_file() else None

    def _entry(self, name: str) -> _Entry:
        if (entry := self._entries.get(name)) is None:
            raise TensorMismatch(
                f"{self.name} stores no tensor {name!r} among its {len(self.names)}; "
                "use a checkpoint whose weights belong to its config.json"
            )
        return entry


def _read_json(path: Path) -> dict[str, Any]:
    again = "download the checkpoint again"
    try:
        size = path.stat().st_size
        if size > _JSON_LIMIT:
            raise CheckpointError(
                f"{path} has {size} bytes, over the limit of {_JSON_LIMIT} for JSON; {again}"
            )
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); {again}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; {again}")
    return value


def _find_weights(folder: Path) -> dict[str, str]:
    """Tensor name -> file; for a single file the empty name stands for all it holds."""
    if (folder / SINGLE).exists():
        return {"": SINGLE}
    if (folder / INDEX).exists():
        return _read_index(folder)
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [file for file in files if file.endswith(".safetensors")]
    if len(weights) == 1:
        return {"": weights[0]}
    if weights:
        raise CorruptWeights(
            f"{folder} holds {len(weights)} safetensors files ({weights[0]}, …) but no {INDEX} "
            "that says how they belong together; download the checkpoint again"
        )
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        raise CorruptWeights(
            f"{folder} stores its weights as {pickles[0]}, a pickle format that can run code when "
            "opened and is never read here; convert it to safetensors or ask its author to"
        )
    others = [file for file in files if file.endswith(_OTHERS)]
    seen = f"only {others[0]}" if others else "no weight file"
    raise CorruptWeights(
        f"{folder} has a config.json but {seen}; use the safetensors version of this checkpoint"
    )


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptWeights(f"{path} has no weight_map; download the checkpoint again")
    for file in dict.fromkeys(map(str, weight_map.values())):
        if "/" in file or "\\" in file or ":" in file or not file.endswith(".safetensors"):
            raise CorruptWeights(
                f"{path} points to {file!r}, which is no safetensors file in the same folder; "
                "use a checkpoint from a source you trust"
            )
        if not (folder / file).is_file():
            raise CorruptWeights(
                f"{path} names the shard {file}, which is not there; download the checkpoint again"
            )
    return {name: str(file) for name, file in weight_map.items()}


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        what, advice = _diagnose(path, error)
        raise CorruptWeights(f"{path} cannot be read as safetensors ({what}); {advice}") from error


def _diagnose(path: Path, error: Exception) -> tuple[str, str]:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as cause:
        return str(cause.strerror), "check the file and its permissions"
    if not start:
        return "the file is empty", "download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights", "fetch the file with `git lfs pull`"
    return str(error), "download it again"


def _read_entry(path: Path, handle: Any, name: str) -> _Entry:
    part = handle.get_slice(name)
    kind = str(part.get_dtype())
    if kind not in _DTYPES:
        raise CorruptWeights(
            f"{path} stores {name} in the number format {kind}, which is not supported; "
            "use a bf16 or fp32 version of this checkpoint"
        )
    return _Entry(path.name, tuple(part.get_shape()), _DTYPES[kind])
