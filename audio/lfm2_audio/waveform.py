"""Anything that holds sound becomes one mono waveform: path, URL, bytes, file, array, stdin.

Knows file formats, channels, sample rates and the limits that keep hostile files cheap; knows
nothing of features, codes or models. libsndfile parses files, by what they hold and not by how
they are named; soxr resamples.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lfm2_audio.filetypes import not_sound, plain
from lfm2_mm.errors import AudioError, AudioTooLong, MissingExtra, SettingError
from lfm2_mm.fetch import fetch, is_url, shown

if TYPE_CHECKING:
    import httpx2

__all__ = [
    "MAX_SECONDS",
    "MIN_SECONDS",
    "Audio",
    "AudioSource",
    "Readable",
    "check_ending",
    "read_audio",
]

MAX_SECONDS = 7200.0
"""The longest recording that is read unless `max_seconds` says otherwise."""

MIN_SECONDS = 0.1
"""The shortest recording that is read unless `min_seconds` says otherwise."""

MAX_BYTES = 2**30
_RATES = (1_000, 1_536_000)
_BLOCK = 2**20  # values decoded at a time, all channels together
_WRITE_BLOCK = 2**16  # libsndfile's Vorbis encoder fails on one long write
_INTEGER_ZERO = {"uint8": 128}
_SUBTYPES = {"WAV": "PCM_16", "FLAC": "PCM_16", "AIFF": "PCM_16", "AU": "PCM_16", "CAF": "PCM_16"}
_ENDINGS = {"opus": ("OGG", "OPUS"), "oga": ("OGG", "VORBIS"), "aif": ("AIFF", "PCM_16")}


@runtime_checkable
class Readable(Protocol):
    """A binary file, or anything that reads like one."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Audio:
    """Mono sound.

    Attributes:
        samples: fp32 on the CPU, full scale is [-1, 1].
        rate: Samples per second.
    """

    samples: Float[Tensor, " n"]
    rate: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of rate and samples: equal digests mean equal sound."""
        text = hashlib.sha256(b"%d %d\n" % (self.rate, len(self.samples)))
        text.update(self.samples.contiguous().numpy().tobytes())
        return text.hexdigest()

    def resampled(self, rate: int) -> Audio:
        """The same sound at another sample rate, `ceil(n * rate / self.rate)` samples or one off.

        Raises:
            MissingExtra: if soxr is not installed.
        """
        if rate == self.rate:
            return self
        soxr = _extra("soxr")
        samples = soxr.resample(self.samples.numpy(), self.rate, rate)
        return Audio(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)), rate)

    def to_bytes(self, form: str = "wav") -> bytes:
        """The contents of a sound file; PCM of 16 bits where the format has it, NaN as silence.

        Args:
            form: The format as a file name would end: `wav`, `flac`, `ogg`, `opus`, `mp3`, …

        Raises:
            SettingError: if no such format can be written, or not at this rate.
            MissingExtra: if soundfile is not installed.
        """
        sf = _extra("soundfile")
        container, subtype = _format(sf, form)
        loud = self.samples.nan_to_num(0.0).clamp(-1, 1).numpy()  # of NaN LAME ends the process
        target = io.BytesIO()
        try:
            with sf.SoundFile(
                target, "w", samplerate=self.rate, channels=1, format=container, subtype=subtype
            ) as file:
                for start in range(0, len(loud), _WRITE_BLOCK):
                    file.write(loud[start : start + _WRITE_BLOCK])
        except (RuntimeError, ValueError) as error:
            raise SettingError(
                f"sound of {self.rate} Hz cannot be written as {form!r} ({plain(error)}); "
                "write a .wav file"
            ) from None
        return target.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a sound file, in the format that the name ends with.

        Raises:
            SettingError: if the ending is no format that can be written.
            AudioError: if the file cannot be written.
            MissingExtra: if soundfile is not installed.
        """
        target = Path(path).expanduser()
        data = self.to_bytes(target.suffix.removeprefix("."))
        try:
            target.write_bytes(data)
        except OSError as error:
            raise AudioError(
                f"{str(target)!r} cannot be written ({error.strerror or error}); check the path"
            ) from None


AudioSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | Readable
    | Audio
    | tuple[NDArray[Any] | Tensor, int]
)


def read_audio(
    source: AudioSource,
    *,
    rate: int | None = None,
    max_seconds: float = MAX_SECONDS,
    min_seconds: float = MIN_SECONDS,
    max_bytes: int = MAX_BYTES,
    client: httpx2.Client | None = None,
) -> Audio:
    """Read sound from wherever it is; several channels become their mean.

    Args:
        source: A path; an http, https or data URL; `-` for standard input; the bytes of a sound
            file; a binary file object; an `Audio`; or an array and its sample rate, integers of
            full scale or floats, `[n]` or two dimensions of which the shorter are the channels.
        rate: Samples per second of the result; by default those of the source. Long files are
            then resampled as they are read, which saves memory.
        max_seconds: The longest recording that is accepted.
        min_seconds: The shortest.
        max_bytes: The most bytes of a download, upload or standard input.
        client: Sends the request when the source is a URL (see `lfm2_mm.fetch`).

    Raises:
        AudioError: if it cannot be read, is no sound, or is over a limit.
        FetchError: if the source is a URL that cannot be fetched.
        MissingExtra: if soundfile or soxr is needed and not installed.
    """
    if isinstance(source, Audio):
        audio, name = source, "the sound given"
    elif isinstance(source, tuple):
        audio, name = _from_array(source), "the sound given as an array"
    else:
        with _opened(source, max_bytes, client) as (handle, start, name):
            audio = _decode(handle, start, name, rate, max_seconds)
    _check(audio, name, min_seconds, max_seconds)
    return audio if rate is None else audio.resampled(rate)


def _check(audio: Audio, name: str, min_seconds: float, max_seconds: float) -> None:
    if not len(audio.samples):
        raise AudioError(f"{name} holds no samples; record it again")
    _check_rate(audio.rate, name)
    if audio.duration < min_seconds:
        raise AudioError(
            f"{name} is {audio.duration:.3g} seconds long, too short to hold a word; "
            f"give at least {min_seconds:g} seconds"
        )
    if audio.duration > max_seconds:
        raise AudioTooLong(_too_long(name, audio.duration, max_seconds))
    bad = ~torch.isfinite(audio.samples)
    if bad.any():
        count, place = int(bad.sum()), int(bad.nonzero()[0]) / audio.rate
        many = (
            "1 sample that is no number" if count == 1 else f"{count:,} samples that are no numbers"
        )
        raise AudioError(
            f"{name} holds {many} (NaN or infinite), the first at {place:.3f} s; export it again, "
            "as 16-bit WAV or FLAC"
        )


def _too_long(name: str, seconds: float, limit: float) -> str:
    return (
        f"{name} is {seconds / 60:,.1f} minutes long, over the limit of {limit / 60:g} minutes; "
        "cut it into parts, or raise max_seconds (--max-seconds)"
    )


def _check_rate(rate: int, name: str) -> None:
    low, high = _RATES
    if not low <= rate <= high:
        raise AudioError(
            f"{name} has {rate:,} samples a second, but {low:,} to {high:,} can be read; "
            "export it again at 16,000 or more"
        )


def _from_array(source: tuple[NDArray[Any] | Tensor, int]) -> Audio:
    if len(source) != 2 or not isinstance(source[1], int | np.integer):
        raise AudioError(
            "sound given as an array needs its sample rate beside it; give (array, rate)"
        )
    given, rate = source
    values = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if values.ndim not in (1, 2) or values.dtype.kind not in "fiu":
        raise AudioError(
            f"an array of {values.ndim} dimensions and type {values.dtype} is no sound; give one "
            "dimension, or two of which the shorter are the channels, of numbers"
        )
    if values.dtype.kind in "iu":
        zero = _INTEGER_ZERO.get(values.dtype.name, 0)
        values = (values.astype(np.float64) - zero) / -float(np.iinfo(f"i{values.itemsize}").min)
    if values.ndim == 2:
        values = values.mean(axis=int(values.shape[1] <= values.shape[0]))
    return Audio(torch.from_numpy(np.array(values, dtype=np.float32)), int(rate))


@contextmanager
def _opened(
    source: object, max_bytes: int, client: httpx2.Client | None
) -> Iterator[tuple[Any, bytes, str]]:
    """What libsndfile can open (a descriptor or a buffer), its first bytes, and its name."""
    if isinstance(source, str | os.PathLike) and not (
        isinstance(source, str) and (source == "-" or is_url(source))
    ):
        name = repr(os.fspath(source))
        with _open_file(source, name) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                start = file.read(16)
                _refuse_empty(start, name)
                os.lseek(file.fileno(), 0, os.SEEK_SET)  # past the buffer of the file object
                yield file.fileno(), start, name
                return
            data = file.read(max_bytes + 1)  # a pipe: cannot be rewound
    elif isinstance(source, str) and source == "-":
        data, name = sys.stdin.buffer.read(max_bytes + 1), "the sound on standard input"
    elif isinstance(source, str):
        data, name = fetch(source, max_bytes=max_bytes, client=client), shown(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the sound given as bytes"
    elif isinstance(source, Readable):
        given = getattr(source, "name", None)
        name = repr(given) if isinstance(given, str) else "the sound in the file object"
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise AudioError(f"{name} was opened as text; open it in binary mode ('rb')")
    else:
        raise AudioError(
            f"sound cannot be read from a value of type {type(source).__name__}; "
            "give a path, a URL, bytes, a binary file, an Audio or (array, rate)"
        )
    _refuse_empty(data, name)
    if len(data) > max_bytes:
        raise AudioError(
            f"{name} holds more than the limit of {max_bytes:,} bytes; cut it into parts or use a "
            "compressed format such as FLAC or Ogg"
        )
    yield io.BytesIO(data), data[:16], name


def _refuse_empty(data: bytes, name: str) -> None:
    if not data:
        raise AudioError(f"{name} is empty (0 bytes); record or download it again")


@contextmanager
def _open_file(source: str | os.PathLike[str], name: str) -> Iterator[Any]:
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise AudioError(f"{name} is a folder, not a recording; name the files in it")
        file = path.open("rb")
    except FileNotFoundError:
        raise AudioError(f"there is no file {name}; check the path") from None
    except PermissionError:
        raise AudioError(f"{name} may not be read by this user; change its permissions") from None
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise AudioError(f"{name} cannot be read ({why}); check the path") from None
    with file:
        yield file


def _decode(handle: Any, start: bytes, name: str, rate: int | None, max_seconds: float) -> Audio:
    sf = _extra("soundfile")
    try:
        file = sf.SoundFile(handle, closefd=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise AudioError(not_sound(start, name, error)) from None
    with file:
        own = int(file.samplerate)
        _check_rate(own, name)
        if 0 < file.frames < 2**62 and file.frames / own > max_seconds:
            raise AudioTooLong(_too_long(name, file.frames / own, max_seconds))
        target = own if rate is None else rate
        stream = None if target == own else _extra("soxr").ResampleStream(own, target, 1)
        pieces, seen = [], 0
        try:
            while len(block := file.read(max(1, _BLOCK // file.channels), "float32", True)):
                seen += len(block)
                if seen / own > max_seconds:  # what the header says need not be so
                    raise AudioTooLong(_too_long(name, seen / own, max_seconds))
                mono = np.ascontiguousarray(block.mean(axis=1))
                pieces.append(mono if stream is None else stream.resample_chunk(mono))
        except RuntimeError as error:
            raise AudioError(
                f"{name} is damaged or cut short ({plain(error)}); save or download it again"
            ) from None
    if stream is not None:
        pieces.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    whole = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)
    return Audio(torch.from_numpy(whole), target)


def check_ending(ending: str) -> None:
    """Refuse a file ending in whose format no sound can be written.

    Raises:
        SettingError: if there is no such format.
        MissingExtra: if soundfile is not installed.
    """
    _format(_extra("soundfile"), ending)


def _format(sf: ModuleType, form: str) -> tuple[str, str | None]:
    """Container and encoding of libsndfile for a file ending."""
    ending = form.lower().removeprefix(".")
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    container = ending.upper()
    if container not in sf.available_formats() or container == "RAW":
        raise SettingError(
            f"sound cannot be written as {ending!r}; use a name that ends with .wav, .flac, .ogg, "
            ".opus or .mp3"
        )
    return container, _SUBTYPES.get(container)


def _extra(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: the package is there, its library is not
        raise MissingExtra(
            f"the package {name} is needed for sound files and cannot be imported "
            f"({plain(error)}); run pip install 'lfm2-mm[audio]'"
        ) from None
