"""A model is written back in the official layout: config, safetensors, tokenizer and side files.

It knows files and how to put them in place so that an interruption never leaves half a checkpoint
that looks whole; it deliberately knows nothing of training or of how weights came about.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lfm2_mm.checkpoint import INDEX, SINGLE
from lfm2_mm.errors import CheckpointError, InputError
from lfm2_mm.quantize.files import ENTRY, config_entry, has_four_bits
from lfm2_mm.weights import (
    BACKBONE_RULES,
    EMBEDDING,
    HEAD,
    HEAD_RULES,
    PACKED,
    head_is_tied,
    rename,
    same_values,
)

__all__ = ["SIDE_FILES", "check_target", "official_names", "save_checkpoint"]

SIDE_FILES = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files (and one folder) that travel from the checkpoint a model came from; glob patterns."""

_PREFIXES = {"text": "model.", "vl": "model.language_model."}


def official_names(state: Mapping[str, Tensor], kind: Literal["text", "vl"]) -> dict[str, Tensor]:
    """Name the tensors of a `Backbone` (and `lm_head.weight`) as the official files do.

    Args:
        state: Tensors under `Backbone`'s own names.
        kind: "text" for `model.…`, "vl" for `model.language_model.…`.
    """
    prefix = _PREFIXES[kind]
    return {name if name == HEAD else prefix + name: tensor for name, tensor in state.items()}


def save_checkpoint(
    folder: Path | str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    copy_from: Path | None = None,
    beside: Sequence[str] = (),
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint that this package and `transformers` load.

    Everything is written to a hidden folder beside `folder`, its `config.json` last, and then moved
    into place. An older checkpoint there is replaced only then; files in it that are no part of a
    checkpoint are kept, and so are its side files unless `copy_from` brings others. A head that
    equals the embedding is left out where the config ties them; other tensors that share memory
    are each written out.

    Args:
        folder: Where to write; missing, empty, or an older checkpoint.
        state: Official name -> tensor, on any device; may be mapped from `folder` itself.
        config: What becomes `config.json`.
        copy_from: A checkpoint folder whose `SIDE_FILES` are taken along.
        beside: Glob patterns of further files and folders to take along from there.
        extra_files: Relative name -> content; wins over files of `copy_from`.
        max_shard_bytes: Above this size the weights are sharded; a larger tensor stays whole.
        metadata: Text in the header of each weight file; `{"format": "pt"}` by default.

    Raises:
        InputError: if the folder holds something else, or the state or a file name cannot be
            written.
        CheckpointError: if writing fails, for instance on a full disk.
    """
    folder = Path(folder).resolve()
    check_target(folder)
    extra = {**(extra_files or {})}
    _check_names(extra)
    extra["config.json"] = _json(_packing(config, state))
    shards = _shards(_without_tied_head(state, config), max_shard_bytes)
    new = folder.with_name(f".{folder.name}.saving-{secrets.token_hex(4)}")
    try:
        new.mkdir(parents=True)
        _write_weights(new, shards, dict(metadata or {"format": "pt"}))
        if copy_from is not None:
            _copy_side_files(Path(copy_from), new, (*SIDE_FILES, *beside))
        for name, content in extra.items():
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        _open_to_readers(new)
        _flush(new)
        _move_into_place(new, folder, keep_side_files=copy_from is None)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}); "
            "check the free space and the permissions of its parent folder"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _packing(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config, with what it must say where weights are packed."""
    said = {key: value for key, value in config.items() if key != ENTRY}
    if any(name.endswith(PACKED) for name in state):
        said[ENTRY] = config_entry("int4" if has_four_bits(state) else "int8")
    return said


def check_target(folder: Path) -> None:
    """Refuse to overwrite what is no checkpoint.

    Raises:
        InputError: if there is a file, or a folder that holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder; choose another place to save to")
    if any(folder.iterdir()) and not (
        (folder / "config.json").is_file() and any(map(_is_weights, folder.iterdir()))
    ):
        raise InputError(
            f"the folder {folder} is not empty and holds no checkpoint, so it is not overwritten; "
            "choose a new or empty folder"
        )


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise InputError(f"the extra file {name!r} is not inside the checkpoint; rename it")
        if len(path.parts) == 1 and (path.name == "config.json" or _is_weights(path)):
            raise InputError(
                f"the extra file {name} is written from the config and the state; leave it out"
            )


def _is_weights(path: PurePath) -> bool:
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def _without_tied_head(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    if not state:
        raise InputError("there are no tensors to save; pass the model's state")
    if unset := [name for name, tensor in state.items() if tensor.is_meta]:
        raise InputError(
            f"{unset[0]} and {len(unset) - 1} other tensors have no values yet; "
            "load the weights before saving"
        )
    head = rename(state, HEAD_RULES).get(HEAD)
    embedding = rename(state, BACKBONE_RULES).get(EMBEDDING)
    if head is None or embedding is None or not head_is_tied(config, ()):
        return dict(state)
    if not same_values(state[head], state[embedding]):
        raise InputError(
            f"{head} differs from {embedding}, but the config ties them; "
            "set tie_word_embeddings to false before saving"
        )
    return {name: tensor for name, tensor in state.items() if name != head}


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Fill one shard after the other, in the order of the state."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in state.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_weights(folder: Path, shards: list[dict[str, Tensor]], metadata: dict[str, str]) -> None:
    if len(shards) == 1:
        save_file(_own_memory(shards[0]), folder / SINGLE, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_own_memory(shard), folder / file, metadata)
        weight_map.update(dict.fromkeys(shard, file))
    tensors = [tensor for shard in shards for tensor in shard.values()]
    totals = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(_json(index), encoding="utf-8")


def _own_memory(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous; copied where they overlap another (safetensors asks)."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    end = 0
    for name, tensor in sorted(plain.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            plain[name] = tensor.clone()
        end = max(end, start + tensor.nbytes)
    return plain


def _copy_side_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    if not source.is_dir():
        raise InputError(f"there is no folder {source} to copy the tokenizer from; check copy_from")
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the config cannot be written as JSON ({error}); pass plain values only"
        ) from error


def _open_to_readers(folder: Path) -> None:
    """Give weight files the mode of any other new file: safetensors writes them for the owner."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _flush(folder: Path) -> None:
    """Force everything to the disk, so that even a power cut finds whole files."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name != "posix":
            continue  # only there can a folder be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(new: Path, folder: Path, *, keep_side_files: bool) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.replaced-{secrets.token_hex(4)}")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for path in list(old.iterdir()):
        side = any(path.match(pattern) for pattern in SIDE_FILES)
        stale = _is_weights(path) or (side and not keep_side_files)
        if not stale and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(old)
