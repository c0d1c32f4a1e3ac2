"""Passages sorted by how well they answer a query, without an index.

Knows an encoder and MaxSim only. Imports no torch until it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lfm2_mm.errors import InputError, ModelNotFound

if TYPE_CHECKING:
    from lfm2_retrieval.index.encoders import EncoderLike

__all__ = ["DEFAULT_MODEL", "load_encoder", "rerank"]

DEFAULT_MODEL = "nano-colbert"
"""The retriever used where none is named."""


def rerank(
    query: str,
    passages: Sequence[str],
    *,
    encoder: EncoderLike | str = DEFAULT_MODEL,
    k: int | None = None,
) -> list[tuple[int, float]]:
    """Sort passages by their MaxSim with a query.

    Args:
        query: The question.
        passages: The texts; what is longer than the model's document length is not seen.
        encoder: What `lfm2_mm.load` returned for a retriever, or its name (loaded at each call).
        k: How many to return; None for all.

    Returns:
        Place in `passages` and score, best first; equal scores in the order given.

    Raises:
        InputError: if the query is empty, `passages` is one text, or `k` is below 1.
        ModelNotFound: if the model named is no retriever.

    Example:
        >>> import lfm2_mm                                               # doctest: +SKIP
        >>> encoder = lfm2_mm.load("nano-colbert")                       # doctest: +SKIP
        >>> rerank("Datei löschen", ["Open file", "Delete file"], encoder=encoder)[0][0]
        1                                                                # doctest: +SKIP
    """
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"the query is {query!r}; write what to look for")
    if isinstance(passages, str):
        raise InputError("one text was given where a list of passages is expected; use [text]")
    if k is not None and k < 1:
        raise InputError(f"k is {k!r}; ask for at least 1 passage")
    if not len(passages):
        return []
    from lfm2_retrieval.scoring import maxsim

    model = load_encoder(encoder) if isinstance(encoder, str) else encoder
    scores = maxsim(model.encode_queries([query])[0], model.encode_documents(list(passages)))
    ranked = sorted(enumerate(scores.tolist()), key=lambda pair: -pair[1])
    return ranked[:k]


def load_encoder(name: str, **options: Any) -> EncoderLike:
    """Load a retriever by name; `options` are those of `lfm2_mm.load`.

    Raises:
        ModelNotFound: if there is no such model, or it is none that makes vectors.
    """
    import lfm2_mm

    loaded: Any = lfm2_mm.load(name, **options)
    if not hasattr(loaded, "encode_queries"):
        raise ModelNotFound(
            f"the model {name!r} is a {type(loaded).__name__} and makes no vectors; name a "
            f"retriever such as {DEFAULT_MODEL}"
        )
    found: EncoderLike = loaded
    return found
