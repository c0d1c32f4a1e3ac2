"""Fewer vectors for a document: near ones become their mean (Ward clustering of cosine distances).

Equals PyLate later than 1.3.4 and `HierarchicalTokenPooling(normalize_embeddings=False)` of
sentence-transformers. Knows vectors only.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.errors import MissingExtra, SettingError

__all__ = ["pool_tokens"]


def pool_tokens(
    vectors: Float[Tensor, "n d"], factor: int, *, protected: int = 1
) -> Float[Tensor, "m d"]:
    """Cluster the rows behind the first `protected` into a `factor`-th of their number.

    The means are not normalised again: a mean of vectors that agree less counts less.

    Args:
        vectors: One document's unit vectors, fp32.
        factor: 1 keeps all, 2 about half, 3 a third.
        protected: Rows at the start that stay as they are (the begin token).

    Raises:
        SettingError: if the factor is below 1.
        MissingExtra: if scipy is not installed.
    """
    if factor < 1:
        raise SettingError(f"the pool factor is {factor}; use 1 (no pooling) or more")
    kept, rest = vectors[:protected], vectors[protected:]
    wanted = max(len(rest) // factor, 1)
    if wanted >= len(rest):
        return vectors
    try:
        from scipy.cluster import hierarchy  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra(
            "pooling document tokens needs scipy, which is not installed; "
            "run: pip install 'lfm2-mm[retrieval]'"
        ) from error
    distances = (1 - rest @ rest.T).numpy()[np.triu_indices(len(rest), k=1)]
    tree = hierarchy.linkage(distances, method="ward")
    labels = hierarchy.fcluster(tree, t=wanted, criterion="maxclust")
    _, cluster = torch.unique(torch.from_numpy(labels).long(), return_inverse=True)
    sums = torch.zeros(int(cluster.max()) + 1, rest.shape[1]).index_add_(0, cluster, rest)
    means = sums / torch.bincount(cluster)[:, None]
    return torch.cat([kept, means])
