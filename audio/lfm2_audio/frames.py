"""Frames of speech that were said become rows of embeddings again, and have an identity.

A frame is `[k]` codes, one a codebook; runs of frames are `[t, k]`. Knows the audio embedding, and
nothing of how frames come about or sound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_audio.config import AudioConfig
from lfm2_mm.errors import InputError
from lfm2_mm.frontends import Prepared

__all__ = ["FRAMES_TYPE", "FrameEmbedding", "FrameEncoder", "frame_identities"]

FRAMES_TYPE = "audio_frames"
"""The content type of speech that the model itself has said."""


class FrameEmbedding(nn.Module):
    """Frames become inputs of the backbone: the sum of their codes' embeddings, without a norm."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.codebooks, self.classes = config.codebooks, config.audio_vocab
        self.embedding = nn.Embedding(self.codebooks * self.classes, config.backbone.hidden_size)

    def forward(self, codes: Int[Tensor, "*n k"]) -> Float[Tensor, "*n d"]:
        """One row a frame; code c of codebook j is row `classes * j + c` of the table."""
        first = torch.arange(self.codebooks, device=codes.device) * self.classes
        rows: Tensor = self.embedding(codes + first).sum(-2)
        return rows


def frame_identities(codes: Int[Tensor, "t k"]) -> list[int]:
    """A negative number of 62 bits for each frame, for prefix reuse (see `Prompt.identity`)."""
    numbers = codes.detach().to("cpu", torch.int64).contiguous().numpy()
    found = []
    for row in numbers:
        digest = hashlib.blake2b(row.tobytes(), digest_size=8, person=b"lfm2-mm frame").digest()
        found.append(-1 - (int.from_bytes(digest, "little") & ((1 << 62) - 1)))
    return found


class FrameEncoder:
    """What the model said before, as input; an `InputEncoder` of the core.

    Args:
        embedding: The audio embedding.
        token_id: The id that stands at the positions; nothing reads it.
    """

    types = frozenset({FRAMES_TYPE})
    placeholder = ""

    def __init__(self, embedding: FrameEmbedding, *, token_id: int) -> None:
        self.embedding, self.token_id = embedding, token_id

    def accepts(self, source: str) -> bool:
        """No file is taken for frames."""
        return False

    def prepare(self, part: Mapping[str, Any]) -> Prepared:
        """Take `{"type": "audio_frames", "frames": codes [t, k]}`. See `InputEncoder.prepare`.

        Raises:
            InputError: if they are no frames of this model.
        """
        codes = torch.as_tensor(part.get("frames", ())).to("cpu", torch.int64)
        k, last = self.embedding.codebooks, self.embedding.classes - 1
        if codes.dim() != 2 or codes.shape[1] != k:
            raise InputError(
                f"frames of speech have the shape {list(codes.shape)}, but this model's are "
                f"[frames, {k}]; give what the same model said"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= last:
            raise InputError(
                f"frames of speech hold codes from {int(codes.min())} to {int(codes.max())}, but "
                f"this model's go from 0 to {last}; give what the same model said"
            )
        digest = hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()
        return Prepared(
            text="", n_positions=len(codes), tensors={"codes": codes}, key=f"frames:{digest}"
        )

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """One row a frame. See `InputEncoder.encode`."""
        device = self.embedding.embedding.weight.device
        codes = torch.cat([part.tensors["codes"] for part in batch]).to(device)
        return list(torch.split(self.embedding(codes), [part.n_positions for part in batch]))
