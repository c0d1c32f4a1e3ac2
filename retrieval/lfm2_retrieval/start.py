"""A start for token embeddings: tokens that occur in the same things, whatever the language.

Latent semantic indexing over concepts, each taken as one document that holds its texts in all
languages (Dumais, Letsche, Littman and Landauer, "Automatic cross-language retrieval using latent
semantic indexing", 1997): words that translate each other begin close together, and the training
proper only has to refine that. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.errors import MissingExtra

__all__ = ["shared_space"]

_ROUNDS, _SPARE = 4, 16


def shared_space(
    concepts: Sequence[Sequence[Sequence[int]]], vocabulary: int, dim: int, *, seed: int = 0
) -> Float[Tensor, "v d"]:
    """A unit vector for each token id; tokens that never occur get noise.

    Each token counts once a text, damped over a concept's texts and weighted by how rare it is;
    concepts have unit length. The matrix is cut down by a randomised singular value decomposition
    (Halko, Martinsson and Tropp, SIAM Review 53, 2011, algorithm 4.4).

    Args:
        concepts: For each concept the ids of each of its texts.
        vocabulary: Number of ids.
        dim: Size of the vectors.
        seed: Of the decomposition.

    Raises:
        MissingExtra: if SciPy is not installed.
    """
    try:
        from scipy.sparse import csr_matrix, diags  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra(
            "training a retriever needs SciPy, which is not installed; run `pip install "
            "'lfm2-mm[retrieval]'`"
        ) from None
    token = np.array([t for texts in concepts for text in texts for t in set(text)])
    sizes = [sum(len(set(text)) for text in texts) for texts in concepts]
    concept = np.repeat(np.arange(len(concepts)), sizes)
    counts = csr_matrix(
        (np.ones(len(token), dtype=np.float32), (token, concept)), (vocabulary, len(concepts))
    )
    counts.data = np.log1p(counts.data)
    frequency = np.maximum(counts.getnnz(axis=1), 1)
    weighted = diags(np.log(len(concepts) / frequency).astype(np.float32)) @ counts
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=0)).ravel())
    matrix = (weighted @ diags(1 / np.maximum(length, 1e-6))).astype(np.float32).tocsr()
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((len(concepts), dim + _SPARE), dtype=np.float32)
    basis, _ = np.linalg.qr(matrix @ rows)
    for _ in range(_ROUNDS):
        rows, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ rows)
    left, values, _ = np.linalg.svd(basis.T @ matrix @ rows)
    vectors = (basis @ left)[:, :dim] * np.sqrt(values[:dim])
    vectors = np.pad(vectors, ((0, 0), (0, dim - vectors.shape[1])))  # of a tiny corpus
    noise = rng.standard_normal((vocabulary, dim), dtype=np.float32)
    known = np.linalg.norm(vectors, axis=1, keepdims=True) > 1e-6
    found = torch.from_numpy(np.where(known, vectors, noise).astype(np.float32))
    return torch.nn.functional.normalize(found, dim=-1)
