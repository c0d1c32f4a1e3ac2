"""What an index consists of at one moment: a manifest, and how the next one takes its place.

`CURRENT` names the manifest in force and its checksum; it is replaced by a rename, so a reader sees
one state or the next, never a mixture. Knows the files' names and checksums, not what is in them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lfm2_mm.errors import CorruptIndex, IndexMismatch
from lfm2_retrieval.index import files
from lfm2_retrieval.index.files import Stored

__all__ = ["Codes", "Deleted", "Manifest", "Model", "Part", "commit", "current", "sweep"]

FORMAT, VERSION = "lfm2-index", 4
OLDEST = 2
"""Of this version on indexes can be read; what changes them writes the newest."""
CURRENT = "CURRENT"

Kind = Literal["flat", "residual"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What made the vectors.

    Attributes:
        name: As the user named it; None for vectors that were handed in.
        fingerprint: Of weights and spec; empty for vectors that were handed in.
        dim: Length of a vector; 0 while nothing is stored.
        pool_factor: Of so many token vectors of a text one is kept.
    """

    name: str | None
    fingerprint: str
    dim: int
    pool_factor: int = 1


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The codebook: a folder below `codebooks`, and what it was trained for."""

    name: str
    centroids: int
    trained_tokens: int
    files: Mapping[str, Stored]


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """The passages of a segment that are gone: a bitmap file below `deleted`."""

    name: str
    stored: Stored
    passages: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """A segment: a folder below `segments`."""

    name: str
    kind: Kind
    documents: int
    passages: int
    tokens: int
    files: Mapping[str, Stored]
    deleted: Deleted | None = None

    @property
    def live_tokens(self) -> int:
        """Tokens of the passages that are not deleted."""
        return self.tokens - (self.deleted.tokens if self.deleted else 0)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One state of an index."""

    generation: int
    model: Model
    bits: int
    codebook: Codes | None = None
    segments: tuple[Part, ...] = field(default=())

    @property
    def tokens(self) -> int:
        """Tokens of all passages that are not deleted."""
        return sum(part.live_tokens for part in self.segments)

    def next(self, **changes: Any) -> Manifest:
        """The state after this one."""
        return replace(self, generation=self.generation + 1, **changes)

    def named(self, folder: Path) -> dict[Path, Stored]:
        """Every file that belongs to this state."""
        found: dict[Path, Stored] = {}
        if self.codebook is not None:
            for name, stored in self.codebook.files.items():
                found[folder / "codebooks" / self.codebook.name / name] = stored
        for part in self.segments:
            for name, stored in part.files.items():
                found[folder / "segments" / part.name / name] = stored
            if part.deleted is not None:
                found[folder / "deleted" / part.deleted.name] = part.deleted.stored
        return found


def _name(value: Any) -> str:
    """A name in one of the rooms; a manifest cannot point out of its folder."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError(f"a file is named {value!r}")
    return value


def _stored(value: Mapping[str, Any]) -> dict[str, Stored]:
    return {_name(name): Stored.from_json(entry) for name, entry in value.items()}


def _dump(manifest: Manifest) -> bytes:
    def part(one: Part) -> dict[str, Any]:
        gone = one.deleted
        return {
            "name": one.name,
            "kind": one.kind,
            "documents": one.documents,
            "passages": one.passages,
            "tokens": one.tokens,
            "files": {name: stored.to_json() for name, stored in one.files.items()},
            "deleted": gone
            and {
                "name": gone.name,
                "stored": gone.stored.to_json(),
                "passages": gone.passages,
                "tokens": gone.tokens,
            },
        }

    model, codes = manifest.model, manifest.codebook
    content = {
        "format": FORMAT,
        "version": VERSION,
        "generation": manifest.generation,
        "model": asdict(model),
        "bits": manifest.bits,
        "codebook": codes
        and {
            "name": codes.name,
            "centroids": codes.centroids,
            "trained_tokens": codes.trained_tokens,
            "files": {name: stored.to_json() for name, stored in codes.files.items()},
        },
        "segments": [part(one) for one in manifest.segments],
    }
    return json.dumps(content, indent=1).encode()


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError("another format")
        version = content["version"]
        if version not in range(OLDEST, VERSION + 1):
            raise IndexMismatch(
                f"the index {str(path.parent)!r} has format version {version!r}, but this program "
                f"reads {OLDEST} to {VERSION}; build it anew or use the program that made it"
            )
        codes = content["codebook"]
        return Manifest(
            generation=int(content["generation"]),
            model=Model(**content["model"]),
            bits=int(content["bits"]),
            codebook=codes
            and Codes(**{**codes, "name": _name(codes["name"]), "files": _stored(codes["files"])}),
            segments=tuple(_part(one) for one in content["segments"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptIndex(
            f"the index file {str(path)!r} is no manifest ({error}); restore it from a backup or "
            "build the index anew"
        ) from error


def _part(value: Mapping[str, Any]) -> Part:
    gone = value["deleted"]
    if gone is not None:
        gone = Deleted(
            **{**gone, "name": _name(gone["name"]), "stored": Stored.from_json(gone["stored"])}
        )
    if value["kind"] not in ("flat", "residual"):
        raise ValueError(f"segment of kind {value['kind']!r}")
    name, stored = _name(value["name"]), _stored(value["files"])
    return Part(**{**value, "name": name, "files": stored, "deleted": gone})


def current(folder: Path) -> Manifest | None:
    """The state in force; None if the folder holds no index.

    Raises:
        CorruptIndex: if `CURRENT` or its manifest is damaged.
        IndexMismatch: if it was made in another format version.
        FileNotFoundError: if a writer replaced the manifest meanwhile; ask again.
    """
    path = folder / CURRENT
    try:
        line = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    name, _, checksum = line.decode("ascii", "replace").strip().partition(" ")
    if not name.startswith("manifest-") or "/" in name or len(checksum) != 64:
        raise CorruptIndex(
            f"the index file {str(path)!r} names no manifest; restore it from a backup or build "
            "the index anew"
        )
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != checksum:
        raise CorruptIndex(
            f"the index file {str(folder / name)!r} does not have its checksum; restore it from a "
            "backup or build the index anew"
        )
    return _parse(folder / name, data)


def commit(folder: Path, manifest: Manifest) -> None:
    """Make a state the one in force. All its files must be durable before.

    When this returns the state is acknowledged: no crash can undo it.
    """
    name = f"manifest-{manifest.generation:08d}.json"
    stored = files.put(folder / name, _dump(manifest))
    files.put(folder / CURRENT, f"{name} {stored.sha256}\n".encode())


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove what the state in force does not name: leftovers of crashes and of earlier states.

    Only the writer may do this. Readers of earlier states have their files open, so they keep them.
    """
    for path in folder.glob("manifest-*"):
        if path.name != f"manifest-{manifest.generation:08d}.json":
            files.remove(path)
    files.remove(folder / f"{CURRENT}.tmp")
    keep = {
        "segments": {part.name for part in manifest.segments},
        "deleted": {part.deleted.name for part in manifest.segments if part.deleted},
        "codebooks": {manifest.codebook.name} if manifest.codebook else set(),
    }
    for room, names in keep.items():
        for path in (folder / room).glob("*"):
            if path.name not in names:
                files.remove(path)
