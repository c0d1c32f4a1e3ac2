"""A codec without a network: residual vector quantisation of log-mel frames, phases by iteration.

Eight mel frames are one frame of codes. Phases are found as sound is made, from what was already
said and one frame ahead (RTISI-LA: Zhu, Beauregard and Wyse, IEEE TASLP 15(5), 2007; Griffin and
Lim, IEEE TASSP 32(2), 1984), so whole and streamed results are the same. Serves where a trained
detokenizer is not yet better. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm2_audio.codec import check_codes
from lfm2_audio.config import MelConfig
from lfm2_audio.mel import mel_filters
from lfm2_mm.errors import CheckpointError, ModelNotFound

__all__ = ["FOLDER", "GriffinLim", "GriffinLimConfig", "GriffinLimStream", "fit_codebooks"]

FOLDER = "audio_griffin_lim"
"""Where a checkpoint keeps it."""

_FLOOR = 1e-4  # of mel magnitudes
_TINY = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class GriffinLimConfig:
    """Shapes of the codec.

    Attributes:
        rate: Samples per second.
        n_mels: Bands of a mel frame.
        n_fft: Samples of a transform and its window.
        hop: Samples from one mel frame to the next.
        stack: Mel frames in one frame of codes.
        iterations: How often phases are improved for each frame of codes.
        ahead: Frames of codes that are heard before one is settled.
    """

    rate: int = 24_000
    n_mels: int = 80
    n_fft: int = 1024
    hop: int = 240
    stack: int = 8
    iterations: int = 12
    ahead: int = 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GriffinLimConfig:
        """Read its `config.json`.

        Raises:
            CheckpointError: if a value is missing or makes no sense.
        """
        try:
            built = cls(**{name: int(raw[name]) for name in asdict(cls())})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the config of the Griffin-Lim codec holds no usable value for {error}; "
                "export the model again"
            ) from None
        if min(asdict(built).values()) < 0 or not 0 < built.hop <= built.n_fft or built.stack < 1:
            raise CheckpointError(
                f"the config of the Griffin-Lim codec gives {built}; export the model again"
            )
        return built


class GriffinLim:
    """See `lfm2_audio.codec.Codec`.

    Args:
        config: Shapes.
        books: Codebooks of PCA vectors, `[k, entries, q]`.
        basis: The PCA, `[stack * n_mels, q]`.
        mean: Of all stacked log-mel frames, `[stack * n_mels]`.
    """

    def __init__(
        self,
        config: GriffinLimConfig,
        books: Float[Tensor, "k e q"],
        basis: Float[Tensor, "s q"],
        mean: Float[Tensor, " s"],
    ) -> None:
        self.config = config
        self.books, self.basis, self.mean = books.float(), basis.float(), mean.float()
        self.rate, self.codebooks, self.entries = config.rate, len(books), books.shape[1]
        self.samples_per_frame = config.stack * config.hop
        self.window = torch.hann_window(config.n_fft)
        mels = MelConfig(rate=config.rate, n_mels=config.n_mels, n_fft=config.n_fft)
        self.filters = mel_filters(mels)
        self._inverse = torch.linalg.pinv(self.filters)

    @classmethod
    def load(cls, folder: Path | str) -> GriffinLim:
        """Read the codec's folder, or a checkpoint's folder that holds one.

        Raises:
            ModelNotFound: if there is no such folder.
            CheckpointError: if it cannot be used.
        """
        folder = Path(folder)
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "model.safetensors")
            found = tensors["books"], tensors["basis"], tensors["mean"]
        except FileNotFoundError:
            raise ModelNotFound(
                f"{str(folder)!r} holds no Griffin-Lim codec (config.json, model.safetensors); "
                "check the path"
            ) from None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            why = " ".join(str(error).split())
            raise CheckpointError(
                f"the codec in {str(folder)!r} cannot be read ({why}); export the model again"
            ) from None
        return cls(GriffinLimConfig.from_dict(raw), *found)

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` (bf16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.config), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tensors = {"books": self.books, "basis": self.basis, "mean": self.mean}
        stored = {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    def encode(self, samples: Float[Tensor, " n"]) -> Int[Tensor, "t k"]:
        """Codes of a sound at the codec's rate; a last part of less than a frame is left out."""
        return self.quantise(self.stacked(samples))

    def stacked(self, samples: Float[Tensor, " n"]) -> Float[Tensor, "t s"]:
        """Log-mel frames, so many behind each other as one frame of codes holds."""
        config = self.config
        whole = len(samples) // self.samples_per_frame * self.samples_per_frame
        side = (config.n_fft - config.hop) // 2
        padded = torch.nn.functional.pad(samples[:whole].float(), (side, side))
        if not whole:
            return samples.new_zeros(0, len(self.mean))
        frames = padded.unfold(0, config.n_fft, config.hop) * self.window
        mel = torch.fft.rfft(frames).abs() @ self.filters.T
        logs: Tensor = mel.clamp(min=_FLOOR).log()
        return logs.reshape(-1, config.stack * config.n_mels)

    def quantise(self, stacked: Float[Tensor, "t s"]) -> Int[Tensor, "t k"]:
        """Nearest entry of each codebook to what the ones before it left."""
        rest = (stacked - self.mean) @ self.basis
        codes = []
        for book in self.books:
            nearest = torch.cdist(rest, book).argmin(1)
            codes.append(nearest)
            rest = rest - book[nearest]
        return torch.stack(codes, 1)

    def mels(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, "n m"]:
        """Log-mel frames of codes."""
        vectors = sum(book[codes[:, k]] for k, book in enumerate(self.books))
        assert isinstance(vectors, Tensor)
        return (vectors @ self.basis.T + self.mean).reshape(-1, self.config.n_mels)

    def magnitudes(self, mels: Float[Tensor, "n m"]) -> Float[Tensor, "n f"]:
        """Linear magnitudes that have about these log-mels: by the pseudo-inverse."""
        linear: Tensor = mels.exp() @ self._inverse.T
        return linear.clamp(min=_TINY)

    def decode(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `Codec.decode`."""
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.flush()])

    def stream(self) -> GriffinLimStream:
        """See `Codec.stream`."""
        return GriffinLimStream(self)


class GriffinLimStream:
    """See `lfm2_audio.codec.CodecStream`; holds back a frame of codes and half a window."""

    def __init__(self, codec: GriffinLim) -> None:
        self._codec = codec
        self._reset()

    def _reset(self) -> None:
        config = self._codec.config
        self._open = torch.zeros(0, config.n_fft // 2 + 1)  # magnitudes not yet settled
        self._guess = torch.zeros(0, config.n_fft // 2 + 1, dtype=torch.complex64)  # unit phases
        self._tail = torch.zeros(config.n_fft - config.hop)  # what settled frames reach ahead
        self._weight = torch.zeros_like(self._tail)
        self._skip = (config.n_fft - config.hop) // 2
        self._chance = torch.Generator().manual_seed(0)

    def push(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `CodecStream.push`."""
        codec, config = self._codec, self._codec.config
        check_codes(codes, codec.codebooks, codec.books.shape[1])
        out = [torch.zeros(0)]
        for i in range(len(codes)):  # one by one, so that the result is the same for every cut
            fresh = codec.magnitudes(codec.mels(codes[i : i + 1]))
            phase = torch.rand(fresh.shape, generator=self._chance) * (2 * math.pi)
            self._open = torch.cat([self._open, fresh])
            self._guess = torch.cat([self._guess, torch.polar(torch.ones_like(phase), phase)])
            if len(self._open) > config.ahead * config.stack:
                out.append(self._settle())
        return torch.cat(out)

    def flush(self) -> Float[Tensor, " n"]:
        """See `CodecStream.flush`."""
        out = [torch.zeros(0)]
        began = self._skip < (self._codec.config.n_fft - self._codec.config.hop) // 2
        while len(self._open):
            out.append(self._settle())
            began = True
        if began:
            side = (self._codec.config.n_fft - self._codec.config.hop) // 2
            out.append(self._tail[:side] / self._weight[:side].clamp(min=_TINY))
        self._reset()
        return torch.cat(out)

    def _settle(self) -> Float[Tensor, " n"]:
        """Improve the open frames, then let go of the first `stack` of them."""
        config, window = self._codec.config, self._codec.window
        n, reach = len(self._open), config.n_fft - config.hop
        size = n * config.hop + reach
        weight = torch.zeros(size)
        weight[:reach] += self._weight
        square = window.square()
        for i in range(n):
            weight[i * config.hop : i * config.hop + config.n_fft] += square
        weight.clamp_(min=_TINY)
        frames = self._spoken()
        for _ in range(config.iterations):
            total = _added(frames, config.hop)
            total[:reach] += self._tail
            heard = torch.fft.rfft((total / weight).unfold(0, config.n_fft, config.hop) * window)
            self._guess = heard / heard.abs().clamp(min=_TINY)
            frames = self._spoken()
        settled, done = frames[: config.stack], config.stack * config.hop
        total, sums = _added(settled, config.hop), torch.zeros(done + reach)
        total[:reach] += self._tail
        sums[:reach] += self._weight
        for i in range(config.stack):
            sums[i * config.hop : i * config.hop + config.n_fft] += square
        self._tail, self._weight = total[done:].clone(), sums[done:].clone()
        self._open, self._guess = self._open[config.stack :], self._guess[config.stack :]
        begin, self._skip = min(self._skip, done), max(0, self._skip - done)
        return total[begin:done] / sums[begin:done].clamp(min=_TINY)

    def _spoken(self) -> Float[Tensor, "n f"]:
        """Windowed samples of each open frame."""
        frames: Tensor = torch.fft.irfft(self._open * self._guess)
        return frames * self._codec.window


def _added(frames: Float[Tensor, "n f"], hop: int) -> Float[Tensor, " m"]:
    """Sum of frames, each `hop` samples after the one before."""
    n, width = frames.shape
    total = torch.zeros((n - 1) * hop + width)
    for i, frame in enumerate(frames):
        total[i * hop : i * hop + width] += frame
    return total


def fit_codebooks(
    stacked: Float[Tensor, "t s"], *, books: int, entries: int, width: int = 96, rounds: int = 10
) -> tuple[Float[Tensor, "k e q"], Float[Tensor, "s q"], Float[Tensor, " s"]]:
    """Codebooks, PCA and mean for log-mel frames, by k-means on what the books before left.

    Entries that nothing is nearest to begin again at a random vector; seeded by torch's generator.
    """
    mean = stacked.mean(0)
    _, _, basis = torch.pca_lowrank(stacked - mean, q=width, center=False, niter=3)
    rest, found = (stacked - mean) @ basis, []
    for _ in range(books):
        centres = rest[torch.randperm(len(rest))[:entries]].clone()
        for _ in range(rounds):
            nearest = torch.cdist(rest, centres).argmin(1)
            counts = torch.bincount(nearest, minlength=len(centres))[:, None]
            sums = torch.zeros_like(centres).index_add_(0, nearest, rest)
            strays = rest[torch.randint(len(rest), (len(centres),))]
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), strays)
        found.append(centres)
        rest = rest - centres[torch.cdist(rest, centres).argmin(1)]
    return torch.stack(found), basis, mean
