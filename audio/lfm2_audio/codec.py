"""What a codec is: frames of codes become samples, whole or as they come.

Depthformer, engine and voice loop speak to codecs through these protocols only, so that a model
with another codec needs no change there. Knows no codec.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from lfm2_mm.errors import InputError

__all__ = ["Codec", "CodecStream", "check_codes"]


@runtime_checkable
class CodecStream(Protocol):
    """Decodes one utterance as its frames come.

    What `push` and `flush` return, one after the other, is what `Codec.decode` makes of all
    frames, within 1e-5 of its peak, however the frames were cut. The state has a fixed size.
    """

    def push(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """Samples that are settled by these further frames: fp32, none for no frames."""
        ...

    def flush(self) -> Float[Tensor, " n"]:
        """What was held back; the stream then begins anew."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Frames `[t, k]` of int64 codes become mono samples in fp32.

    Attributes:
        rate: Samples per second.
        samples_per_frame: Samples of one frame.
        codebooks: Codes of one frame, `k`.
        entries: Codes of each codebook that have a sound, from 0 on.
    """

    rate: int
    samples_per_frame: int
    codebooks: int
    entries: int

    def decode(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """All samples of an utterance, `t * samples_per_frame` of them.

        Raises:
            InputError: if a code is out of range, such as the one that ends speech.
        """
        ...

    def stream(self) -> CodecStream:
        """A fresh stream; any number of them may run at once."""
        ...


def check_codes(codes: Int[Tensor, "t k"], codebooks: int, entries: int) -> None:
    """Refuse frames that a codec of so many codebooks and entries cannot decode.

    Raises:
        InputError: if the frames have another width or a code is out of range.
    """
    if codes.shape[1] != codebooks:
        raise InputError(
            f"the frames have {codes.shape[1]} codes, but this codec decodes {codebooks}; "
            "use the codec of the same checkpoint"
        )
    if not len(codes):
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= entries:
        wrong = low if low < 0 else high
        raise InputError(
            f"the code {wrong} stands for no sound (codes are 0 to {entries - 1}); leave out the "
            "frame that ends speech"
        )
