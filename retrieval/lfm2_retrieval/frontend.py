"""The retrieval frontend: claims LFM2 checkpoints in the layout of PyLate or sentence-transformers.

Light: torch is imported inside `load`. Knows which files belong together; nothing of search.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lfm2_retrieval.layout import is_retriever, read_spec

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.loading import LoadOptions
    from lfm2_retrieval.encoder import Encoder

__all__ = ["RetrievalFrontend", "frontend"]


class RetrievalFrontend:
    """Builds encoders of LFM2-ColBERT, LFM2.5-ColBERT and LFM2.5-Embedding."""

    name = "retrieval"
    options = frozenset({"expansion_states"})

    def claims(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is an LFM2 with a `modules.json`."""
        return is_retriever(checkpoint.folder, checkpoint.config)

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Encoder:
        """Build backbone and head.

        Raises:
            CheckpointError: if files are missing, damaged, refused or do not fit together.
            SettingError: if `expansion_states` is neither "keep" nor "zero".
        """
        import torch

        from lfm2_mm.backbone import Backbone
        from lfm2_mm.config import BackboneConfig
        from lfm2_mm.loading import check_claimed
        from lfm2_mm.tokenizer import Tokenizer
        from lfm2_mm.weights import BACKBONE_RULES, HEAD_RULES, backbone_tensors, load_weights
        from lfm2_retrieval.dense import build_head, head_tensors
        from lfm2_retrieval.encoder import Encoder

        spec = read_spec(checkpoint.folder, checkpoint.config, name=checkpoint.name)
        check_claimed(checkpoint, (*BACKBONE_RULES, *HEAD_RULES))
        config = BackboneConfig.from_dict(checkpoint.config, causal=not spec.bidirectional)
        with torch.device("meta"):
            backbone = Backbone(config)
        load_weights(
            backbone,
            backbone_tensors(checkpoint),
            dtype=options.dtype,
            device=options.device,
            where=checkpoint.name,
            quantize=options.backbone_schemes,
        )

        def stored() -> Iterator[tuple[str, Tensor]]:
            yield from backbone_tensors(checkpoint).items()
            yield from head_tensors(checkpoint, spec.dense)

        return Encoder(
            backbone.eval(),
            build_head(checkpoint, spec.dense, config.hidden_size, options),
            Tokenizer.load(checkpoint.folder),
            spec,
            name=checkpoint.name,
            expansion_states=options.extra.get("expansion_states", "keep"),
            stored=stored,
            folder=checkpoint.folder,
            config=dict(checkpoint.config),
        )


frontend = RetrievalFrontend()
