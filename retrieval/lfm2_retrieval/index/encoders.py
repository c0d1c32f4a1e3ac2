"""The model behind an index: found by name when it is first needed, and checked against the index.

Knows what an encoder offers, not how it works.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lfm2_mm.errors import IndexFault, IndexMismatch, ModelNotFound
from lfm2_retrieval.index.manifest import Model

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EncoderLike", "ModelSource"]


class EncoderLike(Protocol):
    """What an index asks of an encoder: `lfm2_retrieval.Encoder` has it."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of weights and spec."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def encode_queries(self, texts: Sequence[str], *, batch_tokens: int = ...) -> list[Tensor]:
        """Normalised fp32 rows of each query."""
        ...

    def encode_documents(
        self, texts: Sequence[str], *, batch_tokens: int = ..., pool_factor: int = ...
    ) -> list[Tensor]:
        """Normalised fp32 rows of each text."""
        ...

    def query_tokens(self, text: str) -> list[tuple[str, int, int]]:
        """Text and place of each row of a query."""
        ...

    def document_tokens(self, text: str) -> list[tuple[str, int, int]]:
        """Text and place of each row of a text."""
        ...

    def count_tokens(self, text: str) -> int:
        """Plain content tokens."""
        ...


class ModelSource:
    """Gives the encoder of one index.

    Args:
        folder: The index, for messages.
        given: An encoder, its name, or None for the one that the index names.
    """

    def __init__(self, folder: Path, given: str | EncoderLike | None) -> None:
        self._folder, self._given = folder, given
        self._encoder: EncoderLike | None = None
        if given is not None and not isinstance(given, str):
            self._encoder = given

    def describe(self) -> Model:
        """What a new index shall say of its model."""
        if self._given is None:
            return Model(name=None, fingerprint="", dim=0)
        encoder = self._load(self._given if isinstance(self._given, str) else "")
        return Model(name=encoder.name, fingerprint=encoder.fingerprint, dim=encoder.dim)

    def check(self, model: Model) -> None:
        """Compare with what an index says, as far as that needs no loading.

        Raises:
            IndexMismatch: if another model made it; names both.
        """
        if self._given is None or self._given == model.name:
            return
        encoder = self._load(self._given if isinstance(self._given, str) else "")
        self._compare(encoder, model)

    def encoder(self, model: Model) -> EncoderLike:
        """The encoder, loaded and checked.

        Raises:
            IndexFault: if vectors were handed in, so that there is none.
            IndexMismatch: if another model made the index.
        """
        if model.name is None and self._given is None:
            raise IndexFault(
                f"the index {str(self._folder)!r} holds vectors that were handed in and names no "
                "model; search it with search_vectors and extend it with add_vectors"
            )
        encoder = self._load(model.name or "")
        self._compare(encoder, model)
        return encoder

    def _load(self, name: str) -> EncoderLike:
        if self._encoder is None:
            import lfm2_mm

            name = self._given if isinstance(self._given, str) else name
            loaded: Any = lfm2_mm.load(name)
            if not hasattr(loaded, "encode_queries"):
                raise ModelNotFound(
                    f"the model {name!r} is a {type(loaded).__name__} and cannot search; name a "
                    "retriever such as nano-colbert"
                )
            self._encoder = loaded
        return self._encoder

    def _compare(self, encoder: EncoderLike, model: Model) -> None:
        if (encoder.fingerprint, encoder.dim) != (model.fingerprint, model.dim):
            made = "handed-in vectors" if model.name is None else f"the model {model.name!r}"
            stem, _, packing = encoder.fingerprint.partition("-")
            other, _, packed = model.fingerprint.partition("-")
            if stem == other and packing != packed:
                raise IndexMismatch(
                    f"the index {str(self._folder)!r} was made by {made} in "
                    f"{packed or 'full precision or 8 bits'}, and {encoder.name!r} is the same "
                    f"model in {packing or 'full precision or 8 bits'}, whose vectors rank "
                    "otherwise; open it with quantize="
                    f"{'int8 or none' if not packed else packed}, or make a new index"
                )
            raise IndexMismatch(
                f"the index {str(self._folder)!r} was made by {made} (fingerprint "
                f"{model.fingerprint or 'none'}, {model.dim} dimensions), not by "
                f"{encoder.name!r} (fingerprint {encoder.fingerprint}, {encoder.dim} dimensions); "
                "open it with the model that made it, or make a new index"
            )
