"""A folder becomes a config and memory-mapped tensors, and tensors become a module's weights.

It knows files, key layouts and the names of the text backbone; it deliberately knows nothing of how
a module computes, and nothing of any modality: frontends bring rules for their own names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lfm2_mm.errors import CheckpointError, CorruptWeights, ModelNotFound, TensorMismatch

__all__ = [
    "BACKBONE_RULES",
    "HEAD_RULES",
    "Checkpoint",
    "Rule",
    "backbone_rules",
    "backbone_tensors",
    "head_is_tied",
    "load_weights",
    "rename",
    "same_values",
    "split_experts",
    "stored_head",
    "unclaimed",
]

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
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


class Rule(NamedTuple):
    """Names that begin with `stored` in a file begin with `own` in a module."""

    stored: str
    own: str


def backbone_rules(*prefixes: str) -> tuple[Rule, ...]:
    """Rules that map the text backbone, stored under any of these prefixes, to `Backbone`'s names.

    They match its three children only, so they never take another module's tensors.
    """
    children = ("embed_tokens.", "embedding_norm.", "layers.")
    return tuple(Rule(prefix + child, child) for prefix in prefixes for child in children)


BACKBONE_RULES = backbone_rules("model.language_model.", "language_model.model.", "model.", "")
"""Official vision-language files, old remote code and MLX, text models, bare `Lfm2Model`."""

HEAD_RULES = tuple(
    Rule(prefix + "lm_head.", "lm_head.") for prefix in ("", "language_model.", "model.")
)


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

    def tensors(self, rules: Sequence[Rule]) -> dict[str, Tensor]:
        """The stored tensors that the rules claim, under the module's own names; all mapped."""
        return {own: self.tensor(stored) for own, stored in rename(self.names, rules).items()}

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


def rename(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Own name -> stored name, for every name that a rule's prefix matches; the first rule wins.

    Raises:
        TensorMismatch: if two stored names map to the same own name.
    """
    found: dict[str, str] = {}
    for name in names:
        rule = next((rule for rule in rules if name.startswith(rule.stored)), None)
        if rule is None:
            continue
        own = rule.own + name.removeprefix(rule.stored)
        if own in found:
            raise TensorMismatch(
                f"the tensors {found[own]} and {name} both stand for {own}; "
                "use a checkpoint that stores every weight once"
            )
        found[own] = name
    return found


def unclaimed(names: Iterable[str], rules: Sequence[Rule]) -> list[str]:
    """The stored names that no rule matches."""
    return [n for n in names if not any(n.startswith(rule.stored) for rule in rules)]


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace fused expert tensors by views of one expert each; other tensors pass through.

    `experts.gate_up_proj` `[e, 2i, h]` holds w1 above w3, `experts.down_proj` `[e, h, i]` holds w2
    (the form transformers 5 keeps in memory).

    Raises:
        TensorMismatch: if a fused tensor has another number of dimensions or an odd width.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            split[name] = tensor
            continue
        if tensor.dim() != 3 or (last == "gate_up_proj" and tensor.shape[1] % 2):
            raise TensorMismatch(
                f"the fused experts {name} have the shape {list(tensor.shape)}, not "
                "[experts, width, width] with an even first width; use a checkpoint of an LFM2-MoE"
            )
        for e, expert in enumerate(tensor):
            if last == "gate_up_proj":
                split[f"{stem}.{e}.w1.weight"], split[f"{stem}.{e}.w3.weight"] = expert.chunk(2)
            else:
                split[f"{stem}.{e}.w2.weight"] = expert
    return split


def backbone_tensors(
    checkpoint: Checkpoint, rules: Sequence[Rule] = BACKBONE_RULES
) -> dict[str, Tensor]:
    """All weights of the text backbone under `Backbone`'s names, mapped, experts one by one.

    Where only the head is stored and the config ties it, it serves as the embedding too, as in
    transformers 5.23.
    """
    tensors = split_experts(checkpoint.tensors(rules))
    if EMBEDDING not in tensors and head_is_tied(checkpoint.config, ()):
        head = rename(checkpoint.names, HEAD_RULES).get(HEAD)
        if head is not None:
            tensors[EMBEDDING] = checkpoint.tensor(head)
    return tensors


def head_is_tied(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether the embedding serves as the head, as far as the config and the stored names tell.

    At the top level of the config `tie_embedding` overrides `tie_word_embeddings`; silence means
    tied. transformers 5.23 (`PreTrainedModel.tie_weights`) keeps a stored head that differs from
    the embedding even where the config ties them, and ties one that is equal. So a head stored
    beside the embedding counts as untied here, which gives the right scores in both cases;
    `stored_head` compares the values and saves the memory. What a text section says about tying
    changes nothing in transformers, so it is not read here either.

    Args:
        config: The whole `config.json` as a dict.
        names: The stored tensor names.
    """
    both = HEAD in rename(names, HEAD_RULES) and any(name.endswith(EMBEDDING) for name in names)
    key = "tie_embedding" if "tie_embedding" in config else "tie_word_embeddings"
    return bool(config.get(key, True)) and not both


def stored_head(
    checkpoint: Checkpoint, rules: Sequence[Rule] = BACKBONE_RULES
) -> Shaped[Tensor, "v d"] | None:
    """The head's own weight, mapped; None where the embedding serves as head.

    Raises:
        TensorMismatch: if the config asks for a head of its own and none is stored.
    """
    if head_is_tied(checkpoint.config, checkpoint.names):
        return None
    name = rename(checkpoint.names, HEAD_RULES).get(HEAD)
    if name is None:
        raise TensorMismatch(
            f"the config of {checkpoint.name} unties the output head, but no {HEAD} is stored; "
            "set tie_word_embeddings to true or use a complete checkpoint"
        )
    head = checkpoint.tensor(name)
    embedding = rename(checkpoint.names, rules).get(EMBEDDING)
    ties = head_is_tied(checkpoint.config, ())
    if ties and embedding is not None and same_values(head, checkpoint.tensor(embedding)):
        return None
    return head


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: str,
    keep_dtype: Collection[str] = ("expert_bias",),
) -> None:
    """Assign tensors to a module's parameters and persistent buffers, in place.

    A tensor whose dtype and device already fit is used as it is, mapped or not; the module may
    have been built on the meta device. Parameters come out with `requires_grad=False`. Buffers
    that are not persistent are left alone, and so is a stored `inv_freq`, which is derived.

    Args:
        module: What is filled.
        tensors: Own name -> tensor; any mapping, so it may make its tensors when asked.
        dtype: Number format of floating-point weights; None keeps the stored one.
        device: Where the weights shall live.
        where: What the user calls the source; used in messages.
        keep_dtype: Ends of names that are fp32 whatever `dtype` says.

    Raises:
        TensorMismatch: if tensors are missing, unknown or of another shape; names them.
    """
    wanted = module.state_dict()
    given = {
        name: tensors[name] for name in tensors if name in wanted or not name.endswith(".inv_freq")
    }
    _check_fit({name: tuple(t.shape) for name, t in wanted.items()}, given, where)
    for name, tensor in given.items():
        kind = torch.float32 if name.endswith(tuple(keep_dtype)) else dtype
        if not tensor.dtype.is_floating_point:
            kind = None
        given[name] = tensor.detach().to(device=device, dtype=kind or tensor.dtype)
    module.requires_grad_(False)
    module.load_state_dict(given, strict=True, assign=True)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and values."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _check_fit(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], where: str
) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} is {list(given[name].shape)}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    clauses = [
        _count(names, *verbs)
        for names, verbs in (
            (missing, ("is missing", "are missing")),
            (unknown, ("is unknown", "are unknown")),
            (misshapen, ("has another shape", "have another shape")),
        )
        if names
    ]
    if clauses:
        raise TensorMismatch(
            f"the weights of {where} do not fit: {'; '.join(clauses)}; "
            "use a checkpoint whose weights belong to its config.json"
        )


def _count(items: Sequence[str], one: str, many: str, shown: int = 3) -> str:
    more = ", …" if len(items) > shown else ""
    subject = f"1 tensor {one}" if len(items) == 1 else f"{len(items)} tensors {many}"
    return f"{subject} ({', '.join(items[:shown])}{more})"


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
