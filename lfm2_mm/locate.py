"""A name becomes a folder: an embedded model, a local folder, or a Hub id with a revision.

Light: huggingface_hub is imported only when the Hub or its cache is asked. This module knows
nothing of tensors or architectures; it looks no deeper than for a `config.json`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lfm2_mm.errors import ModelNotFound

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = [
    "KNOWN_MODELS",
    "CachedModel",
    "EmbeddedModel",
    "KnownModel",
    "Located",
    "cached_models",
    "embedded_models",
    "locate",
    "suggest",
]

Kind = Literal["embedded", "folder", "hub"]

# What is fetched of a repository: weights without pickle, no code.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_UNWANTED = ("onnx/*", "openvino/*", "*.bin", "*.pt", "*.py")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_FILE_SUFFIXES = (".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth", ".onnx")


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model lies.

    Attributes:
        folder: Holds its `config.json`; or a GGUF file.
        name: What to call it: the embedded name, the path as given, or the Hub id.
        kind: How it was found.
        revision: Commit of a Hub model; None otherwise.
    """

    folder: Path
    name: str
    kind: Kind
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class KnownModel:
    """An official checkpoint.

    Attributes:
        id: Its Hub id.
        task: `text`, `vision`, `audio`, `retrieval` or `embedding`.
        parameters: Their number; the nominal size where no count was published.
    """

    id: str
    task: str
    parameters: int


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that ships with the package; `size` in bytes."""

    name: str
    folder: Path
    size: int


@dataclass(frozen=True, slots=True)
class CachedModel:
    """An LFM2 model in the Hugging Face cache; `size` on disk in bytes, `revision` a commit."""

    id: str
    revision: str
    size: int
    folder: Path


KNOWN_MODELS = tuple(
    KnownModel(f"LiquidAI/{name}", task, parameters)
    for name, task, parameters in (
        ("LFM2-350M", "text", 354_483_968),
        ("LFM2-700M", "text", 742_489_344),
        ("LFM2-1.2B", "text", 1_170_340_608),
        ("LFM2-2.6B", "text", 2_569_272_320),
        ("LFM2-8B-A1B", "text", 8_339_929_856),
        ("LFM2-24B-A2B", "text", 24_000_000_000),
        ("LFM2.5-230M", "text", 230_000_000),
        ("LFM2.5-350M", "text", 354_483_968),
        ("LFM2.5-1.2B-Instruct", "text", 1_170_340_608),
        ("LFM2.5-1.2B-Thinking", "text", 1_170_340_608),
        ("LFM2.5-2.6B", "text", 2_600_000_000),
        ("LFM2.5-8B-A1B", "text", 8_300_000_000),
        ("LFM2-VL-450M", "vision", 450_000_000),
        ("LFM2-VL-1.6B", "vision", 1_600_000_000),
        ("LFM2-VL-3B", "vision", 3_000_000_000),
        ("LFM2.5-VL-450M", "vision", 448_720_000),
        ("LFM2.5-VL-1.6B", "vision", 1_600_000_000),
        ("LFM2.5-VL-3B", "vision", 3_123_483_888),
        ("LFM2-Audio-1.5B", "audio", 1_500_000_000),
        ("LFM2.5-Audio-1.5B", "audio", 1_500_000_000),
        ("LFM2-ColBERT-350M", "retrieval", 353_000_000),
        ("LFM2.5-ColBERT-350M", "retrieval", 353_000_000),
        ("LFM2.5-Embedding-350M", "embedding", 353_000_000),
    )
)


def locate(
    name: str | os.PathLike[str], *, revision: str | None = None, offline: bool | None = None
) -> Located:
    """Find a model's folder, downloading it if it is a Hub id that is not in the cache.

    Embedded names go first, then what exists as a folder or looks like a path, then the Hub, with
    the cache and the variables of the Hugging Face tools (`HF_HOME`, `HF_HUB_OFFLINE`,
    `HF_TOKEN`). Only safetensors, JSON, templates and tokenizer files are fetched. A progress bar
    shows on a terminal.

    Args:
        name: An embedded name, a folder, or `org/name` with an optional `@revision`.
        revision: Branch, tag or commit of a Hub model, instead of `@revision`.
        offline: Use only the cache; None follows `HF_HUB_OFFLINE`.

    Raises:
        ModelNotFound: Nothing has this name, or it cannot be fetched; says why and what to do.
    """
    text = os.fspath(name)
    embedded = {model.name: model.folder for model in embedded_models()}
    base, at, tag = text.partition("@")
    if text in embedded or (at and base in embedded):
        _refuse_revision(base, "is embedded", revision or (tag if at else None))
        return Located(embedded[base], base, "embedded")
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        _refuse_revision(text, "is a local file", revision)
        return Located(path, text, "folder")
    if isinstance(name, os.PathLike) or _looks_like_a_path(text) or (text and path.exists()):
        located = Located(_local_folder(text, path), text, "folder")
        _refuse_revision(text, "is a local folder", revision)
        return located
    if not _HUB_ID.fullmatch(base):
        raise ModelNotFound(f'no model "{text}": {_hint(base, list(embedded))}')
    if at and revision is not None and tag != revision:
        raise ModelNotFound(f'two revisions for "{base}", "{tag}" and "{revision}": give only one')
    wanted = tag if at else revision
    if wanted is not None and (not _REVISION.fullmatch(wanted) or ".." in wanted):
        raise ModelNotFound(
            f'"{wanted}" is no revision of "{base}": give a branch, a tag or a commit'
        )
    folder = _fetch(base, wanted, offline)
    return Located(folder, base, "hub", folder.name)


def suggest(name: str) -> str | None:
    """The embedded name or official Hub id nearest to `name`, case and organisation aside."""
    bare = name.partition("@")[0].rpartition("/")[2].lower().replace("_", "-")
    known = {model.id.rpartition("/")[2].lower(): model.id for model in KNOWN_MODELS}
    known |= {model.name.lower(): model.name for model in embedded_models()}
    near = [bare] if bare in known else difflib.get_close_matches(bare, known, n=1, cutoff=0.6)
    return known[near[0]] if near else None


def embedded_models() -> list[EmbeddedModel]:
    """The models inside the package, by name: folders of `pretrained` with a `config.json`."""
    found = []
    home = _pretrained()
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        if (folder / "config.json").is_file():
            found.append(EmbeddedModel(folder.name, folder, _size(folder)))
    return found


def cached_models() -> list[CachedModel]:
    """The LFM2 models in the Hugging Face cache, each revision by itself, sorted by id."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = [
        CachedModel(repo.repo_id, rev.commit_hash, rev.size_on_disk, Path(rev.snapshot_path))
        for repo in cache.repos
        if repo.repo_type == "model"
        for rev in repo.revisions
        if _is_lfm2(repo.repo_id, Path(rev.snapshot_path))
    ]
    return sorted(found, key=lambda model: (model.id.lower(), model.revision))


def _pretrained() -> Path:
    return Path(str(resources.files("lfm2_mm").joinpath("pretrained")))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_lfm2(repo_id: str, snapshot: Path) -> bool:
    """Whether a cached snapshot has a config, and it or the id says LFM2."""
    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict):
        return False
    said = [repo_id, config.get("model_type"), config.get("architectures")]
    return "lfm2" in json.dumps(said).lower()


def _looks_like_a_path(text: str) -> bool:
    return (
        text in (".", "..")
        or text.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or "\\" in text
        or text.endswith("/")
        or text.partition("@")[0].count("/") > 1
        or text.lower().endswith(_FILE_SUFFIXES)
    )


def _local_folder(text: str, path: Path) -> Path:
    """The folder at `path`, if it holds a config; sentences that help where it does not."""
    if path.is_file():
        raise ModelNotFound(f'"{text}" is a file: give its folder "{path.parent}"')
    if not path.is_dir():
        raise ModelNotFound(f'there is no folder "{text}": check the path')
    if not (path / "config.json").is_file():
        inner = sorted(p.parent for p in path.glob("*/config.json"))
        hint = f'there is one in "{inner[0]}"' if inner else "give a folder that holds a checkpoint"
        raise ModelNotFound(f'the folder "{text}" has no config.json: {hint}')
    return path


def _refuse_revision(name: str, why: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelNotFound(f'"{name}" {why} and has no revision "{revision}": leave it out')


def _hint(name: str, embedded: Sequence[str]) -> str:
    """The second half of "no model": the nearest name, or what names look like."""
    near = suggest(name)
    if near is not None:
        return f"did you mean {near}?"
    names = f"an embedded name ({', '.join(embedded)})" if embedded else "an embedded name"
    return f"use {names}, a folder or a Hub id such as LiquidAI/LFM2.5-VL-450M"


def _fetch(repo: str, revision: str | None, offline: bool | None) -> Path:
    """The snapshot of a Hub model in the cache, downloaded where it is missing."""
    import httpx2
    import huggingface_hub
    from huggingface_hub import constants

    only_cache = constants.HF_HUB_OFFLINE if offline is None else offline
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                local_files_only=only_cache,
                tqdm_class=None if sys.stderr.isatty() else _silent_bar(),
            )
        )
    except (OSError, ValueError, httpx2.HTTPError) as error:
        _explain(repo, revision, only_cache, error)
    if not (folder / "config.json").is_file() or not any(folder.rglob("*.safetensors")):
        if only_cache:
            raise ModelNotFound(
                f"offline and only partly in the cache: {repo}; load it once with a network"
            )
        near = suggest(re.sub(r"-(GGUF|ONNX|MLX.*)$", "", repo, flags=re.IGNORECASE))
        hint = f"use a checkpoint such as {near or 'LiquidAI/LFM2.5-VL-450M'}"
        raise ModelNotFound(
            f'the Hub model "{repo}" lacks config.json or safetensors weights: {hint}'
        )
    return folder


def _silent_bar() -> Any:
    """A progress bar that shows nothing, for output that is no terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    return Silent


def _explain(repo: str, revision: str | None, only_cache: bool, error: Exception) -> NoReturn:
    """Turn what huggingface_hub raised into one sentence."""
    from huggingface_hub import errors

    at = f"@{revision}" if revision else ""
    match error:
        case errors.GatedRepoError():
            token = (
                "the token in HF_TOKEN has no access"
                if os.environ.get("HF_TOKEN")
                else ("set HF_TOKEN to a token of that account")
            )
            text = f'the Hub model "{repo}" is gated: accept its terms on its page, and {token}'
        case errors.RepositoryNotFoundError():
            near = suggest(repo)
            hint = "check the id, or set HF_TOKEN to a token that may read it"
            if near is not None and near != repo:
                hint = f"did you mean {near}?"
            text = f'the Hub has no model "{repo}", or it is private: {hint}'
        case errors.RevisionNotFoundError():
            text = (
                f'the Hub model "{repo}" has no revision "{revision}": '
                "give a branch, a tag or a commit of it, or leave it out"
            )
        case errors.IncompleteSnapshotError():
            lack = "offline" if only_cache else "the Hub cannot be reached,"
            text = f"{lack} and only partly in the cache: {repo}{at}; load it once with a network"
        case errors.LocalEntryNotFoundError():
            off = only_cache or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
            lack = "offline" if off else "the Hub cannot be reached,"
            text = (
                f"{lack} and not in the cache: {repo}{at}; "
                "load it once with a network, or use an embedded model such as nano-vl"
            )
        case errors.HFValidationError():
            text = f'"{repo}" is no Hub id: it must look like LiquidAI/LFM2.5-VL-450M'
        case errors.HfHubHTTPError():
            text = f'the Hub answered {error.response.status_code} for "{repo}": try again later'
        case _:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = str(reason).splitlines()[0]
            text = (
                f'"{repo}" could not be downloaded: {reason}; '
                "check the network and the free space of HF_HOME"
            )
    raise ModelNotFound(text) from error
