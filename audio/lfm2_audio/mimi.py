"""Mimi, the codec of the first LFM2-Audio and the one that can encode: through transformers.

Reads the official file, which is laid out as Kyutai's own code has it. Weights and encoding are the
MimiModel of transformers; decoding is streamed, over its layers, by `lfm2_audio.streaming`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfm2_audio.mimi_names import config_of, to_transformers
from lfm2_audio.streaming import MimiStream
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import CheckpointError, CorruptWeights, ModelNotFound, TensorMismatch
from lfm2_mm.weights import load_weights

if TYPE_CHECKING:
    from transformers import MimiModel

__all__ = ["PATTERN", "Mimi"]

PATTERN = "tokenizer-*.safetensors"
"""How a checkpoint names the file."""

_REST = "quantizer.rvq_rest.vq.layers."


class Mimi:
    """Kyutai's Mimi; see `lfm2_audio.codec.Codec`. It also encodes.

    1920 samples of 24 kHz per frame. Nothing is held back when streaming: it is causal throughout.
    """

    def __init__(self, net: MimiModel) -> None:
        self.net: Any = net.train(False)
        config = net.config
        self.rate = int(config.sampling_rate)
        self.codebooks = int(config.num_quantizers)
        self.samples_per_frame = int(config.frame_size)
        self.entries = int(config.codebook_size)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        codebooks: int = 8,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> Mimi:
        """Read the file, or the one that a checkpoint's folder holds.

        Args:
            path: `tokenizer-….safetensors`, or the folder it lies in.
            codebooks: How many of the stored codebooks are used; the others are not read.
            config: Keyword arguments for `MimiConfig` that the shapes do not tell, where they
                differ from the released ones (heads, windows).
            device: Where it runs.

        Raises:
            ModelNotFound: if there is no such file.
            CorruptWeights: if it is damaged.
            CheckpointError: if it is no Mimi, or has fewer codebooks.
            TensorMismatch: if tensors are missing, unknown or of another shape; names them.
        """
        path = _find(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                values = config_of(shapes) | dict(config or {})
                stored = int(values["num_quantizers"])
                if not values["num_semantic_quantizers"] < codebooks <= stored:
                    raise CheckpointError(
                        f"{path.name} holds {stored} codebooks, but {codebooks} are asked for; "
                        "use the codec of the same checkpoint"
                    )
                first = int(values["num_semantic_quantizers"])
                names = [name for name in shapes if _number(name) < codebooks - first]
                state = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CorruptWeights(
                f"{path} cannot be read as safetensors ({error}); download the checkpoint again"
            ) from error
        from transformers import MimiConfig, MimiModel

        net: Any = MimiModel(MimiConfig(**{**values, "num_quantizers": codebooks}))
        tensors, unknown = to_transformers(state, int(net.config.num_attention_heads))
        if unknown:
            more = ", …" if len(unknown) > 3 else ""
            raise TensorMismatch(
                f"{path.name} holds tensors that no Mimi has ({', '.join(unknown[:3])}{more}); use "
                "the tokenizer-….safetensors of an LFM2-Audio checkpoint"
            )
        load_weights(net, tensors, dtype=torch.float32, device=device, where=path.name)
        return cls(net.to(device))

    def encode(self, audio: Audio) -> Int[Tensor, "t k"]:
        """Codes of a recording at any rate; the last frame is filled up with silence."""
        samples = audio.resampled(self.rate).samples.to(self.net.device)
        # as Kyutai's code does; transformers would fill up layer by layer, with other codes
        samples = F.pad(samples, (0, -len(samples) % self.samples_per_frame))
        with torch.no_grad():
            codes: Tensor = self.net.encode(samples[None, None]).audio_codes
        return codes[0].T.contiguous().cpu()

    def decode(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `Codec.decode`."""
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.flush()])

    def stream(self) -> MimiStream:
        """See `Codec.stream`."""
        return MimiStream(self.net)


def _find(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob(PATTERN))
        if len(files) != 1:
            raise ModelNotFound(
                f"the folder {path} holds {len(files)} files {PATTERN}, not one; point to the file"
            )
        return files[0]
    if not path.is_file():
        raise ModelNotFound(f"there is no Mimi file {path}; check the path")
    return path


def _number(name: str) -> int:
    """Which acoustic codebook a tensor belongs to; -1 for every other tensor."""
    number = name.removeprefix(_REST).partition(".")[0]
    return int(number) if name.startswith(_REST) and number.isdigit() else -1
