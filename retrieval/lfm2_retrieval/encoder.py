"""A retriever's encoder: texts in, unit vectors out, one per kept token or one per text.

Sequences of any lengths are packed behind each other, so no position is padding and a batch gives
what each text gives alone. Knows backbone, head and inputs; deliberately nothing of indexes,
scores or files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.errors import SettingError, TensorMismatch
from lfm2_mm.kernels.packed import SCHEMES
from lfm2_mm.mixing import Packed
from lfm2_mm.quantize.files import ENTRY
from lfm2_mm.quantize.layers import Packed as PackedMatrix
from lfm2_mm.tokenizer import Tokenizer
from lfm2_retrieval.inputs import Inputs, Sequences, TokenSpan
from lfm2_retrieval.layout import RetrieverSpec
from lfm2_retrieval.pooling import pool_tokens

__all__ = ["FOUR_BITS", "PACKED_FROM", "Encoder", "ExpansionStates"]

PACKED_FROM = "packed_from"
"""What `config.json` of a packed retriever calls the fingerprint of the one it was packed from."""
FOUR_BITS = "-int4"
"""What stands behind the fingerprint of a retriever whose weights have 4 bits."""

_DIGITS = re.compile("[0-9a-f]{16}")
ExpansionStates = Literal["keep", "zero"]

# On a CPU more rows at once gain nothing: the widest activations leave the caches, and blocks over
# 32 MB are fresh pages from the system at every call. An accelerator wants to be filled.
_CPU_ROWS, _DEVICE_ROWS = 2048, 16384


class Encoder:
    """What `lfm2_mm.load` returns for a retriever.

    Args:
        backbone: With its weights.
        head: The Dense modules behind it; may be empty.
        tokenizer: The checkpoint's.
        spec: What the side files say.
        name: What the user calls the checkpoint.
        expansion_states: What the short convolutions see of the filling of queries: "keep" its
            states (PyLate with transformers 4), or "zero" (transformers 5.23). Documents are the
            same in both.
        stored: Yields the stored weights by own name, for the fingerprint; the modules' own by
            default.
        folder: Where the checkpoint lies, if it does; tokenizer files are copied from there.
        config: Its `config.json`.

    Attributes:
        dim: Width of the vectors.

    Raises:
        SettingError: if `expansion_states` is something else.
        CheckpointError: if tokenizer, spec and weights do not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Sequential,
        tokenizer: Tokenizer,
        spec: RetrieverSpec,
        *,
        name: str,
        expansion_states: ExpansionStates = "keep",
        stored: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if expansion_states not in ("keep", "zero"):
            raise SettingError(f"expansion_states is {expansion_states!r}; use 'keep' or 'zero'")
        rows = backbone.embed_tokens.num_embeddings
        if tokenizer.vocab_size > rows:
            raise TensorMismatch(
                f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, its embedding only "
                f"{rows} rows; use a checkpoint whose files belong together"
            )
        self.backbone, self.head, self.tokenizer = backbone, head, tokenizer
        self.spec, self.name, self.folder = spec, name, folder
        self.expansion_states: ExpansionStates = expansion_states
        self.config = config or backbone.config.to_dict()
        self.dim = spec.dense[-1].out_features if spec.dense else backbone.config.hidden_size
        self._stored = stored
        self._inputs = Inputs(
            tokenizer, spec, max_positions=backbone.config.max_positions, where=name
        )
        self._skipped = torch.tensor(sorted(self._inputs.skipped), dtype=torch.long)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.backbone.embed_tokens.weight.device

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over weights, rules and tokenizer: equal if documents encode equally.

        Taken of what is stored, so device, number format and `expansion_states` do not change it.
        A packed model has that of the model it was packed from, whether it was packed on the way or
        is stored so: 8 bits rank as before within a rank correlation of 0.99. 4 bits rank otherwise
        often enough, so `-int4` is put behind it.
        """
        return self.origin + (FOUR_BITS if self._in_four_bits() else "")

    @cached_property
    def origin(self) -> str:
        """The fingerprint of the model as it was before its weights were packed, if they are."""
        said = self.config.get(PACKED_FROM)
        if ENTRY in self.config and isinstance(said, str) and _DIGITS.fullmatch(said):
            return said
        digest = hashlib.sha256()
        rules = {k: v for k, v in asdict(self.spec).items() if k != "settings"}
        digest.update(json.dumps(rules, sort_keys=True, default=str).encode())
        digest.update(self.tokenizer.hf.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self._stored() if self._stored else self._own()):
            digest.update(f"\n{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @property
    def packed(self) -> bool:
        """Whether any of its weights are packed."""
        return bool(self._matrices())

    def _matrices(self) -> list[PackedMatrix]:
        parts = [*self.backbone.modules(), *self.head.modules()]
        return [part for part in parts if isinstance(part, PackedMatrix)]

    def _in_four_bits(self) -> bool:
        return any(SCHEMES[part.scheme].bits == 4 for part in self._matrices())

    def encode_queries(
        self, texts: Sequence[str], *, batch_tokens: int | None = None
    ) -> list[Float[Tensor, "_ d"]]:
        """Vectors of each query: fp32 on the CPU, unit length, `[n_tokens, dim]` (or `[1, dim]`).

        Args:
            texts: Queries; an empty one has vectors too, of special tokens alone.
            batch_tokens: Most rows computed at once.
        """
        return self._encode(self._inputs.queries(_checked(texts)), None, batch_tokens)

    def encode_documents(
        self, texts: Sequence[str], *, batch_tokens: int | None = None, pool_factor: int = 1
    ) -> list[Float[Tensor, "_ d"]]:
        """Vectors of each document; tokens of the skiplist are left out.

        Args:
            texts: Passages; what is longer than the spec's length is cut.
            batch_tokens: Most rows computed at once; a longer document still goes alone.
            pool_factor: Above 1, near vectors are merged to about one in so many (`pool_tokens`);
                those are means, shorter than 1.

        Raises:
            SettingError: if the pool factor is below 1.
            MissingExtra: if pooling is asked for and scipy is not installed.
        """
        if pool_factor < 1:
            raise SettingError(f"pool_factor is {pool_factor}; use 1 (no pooling) or more")
        found = self._encode(self._inputs.documents(_checked(texts)), self._skipped, batch_tokens)
        if pool_factor == 1 or self.spec.kind == "dense":
            return found
        return [pool_tokens(vectors, pool_factor) for vectors in found]

    def query_tokens(self, text: str) -> list[TokenSpan]:
        """Per row of `encode_queries`: token text, first and last + 1 character in the query.

        -1, -1 for special tokens, prefix, prompt and filling.
        """
        spans = self._inputs.query_spans(text)
        return spans if self.spec.kind == "late-interaction" else spans[:1]

    def document_tokens(self, text: str) -> list[TokenSpan]:
        """Per row of `encode_documents` (without pooling): token text and its place in `text`."""
        spans = self._inputs.document_spans(text)
        return spans if self.spec.kind == "late-interaction" else spans[:1]

    def count_tokens(self, text: str) -> int:
        """Tokens of the bare text, without special ones, uncut; for chunking."""
        return self._inputs.count(text)

    def save(self, folder: Path | str) -> None:
        """Write the encoder in PyLate's layout (see `lfm2_retrieval.saving`)."""
        from lfm2_retrieval.saving import save_retriever

        save_retriever(folder, self)

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.backbone.state_dict().items()
        yield from (("head." + name, t) for name, t in self.head.state_dict().items())

    def _encode(
        self, sequences: Sequences, skipped: Tensor | None, batch_tokens: int | None
    ) -> list[Tensor]:
        if batch_tokens is None:
            batch_tokens = _CPU_ROWS if self.device.type == "cpu" else _DEVICE_ROWS
        found: list[Tensor] = [torch.empty(0)] * len(sequences.ids)
        for batch in _batches(sequences.ids, batch_tokens):
            ids = [sequences.ids[i] for i in batch]
            vectors, counts = self._vectors(ids, [sequences.fill[i] for i in batch], skipped)
            for i, rows in zip(batch, torch.split(vectors, counts), strict=True):
                found[i] = rows.clone()  # outside inference mode, with memory of its own
        return found

    @torch.inference_mode()
    def _vectors(
        self, ids: list[list[int]], fill: list[int], skipped: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """Unit vectors of some sequences behind each other, and how many are whose."""
        lengths = [len(row) for row in ids]
        flat = torch.tensor([i for row in ids for i in row], dtype=torch.long)
        hidden = None
        if any(fill):
            filled = [[False] * (n - m) + [True] * m for n, m in zip(lengths, fill, strict=True)]
            hidden = torch.tensor([x for row in filled for x in row], device=self.device)
        mixing = Packed(
            lengths,
            causal=self.backbone.config.causal,
            hidden=hidden,
            mask_convs=self.expansion_states == "zero",
            device=self.device,
        )
        states = self.backbone(self.backbone.embed(flat.to(self.device)), mixing)
        if self.spec.kind == "dense":
            states, lengths = self._pool(states, lengths), [1] * len(lengths)
        elif skipped is not None and len(skipped):
            keep = ~torch.isin(flat, skipped)
            states = states[keep.to(self.device)]
            lengths = [int(part.sum()) for part in torch.split(keep, lengths)]
        return F.normalize(self.head(states).float(), dim=-1).cpu(), lengths

    def _pool(self, states: Float[Tensor, "n d"], lengths: list[int]) -> Float[Tensor, "b d"]:
        """One state per sequence, by the spec's rule."""
        sizes = torch.tensor(lengths, device=states.device)
        ends = sizes.cumsum(0)
        if self.spec.pooling == "cls":
            return states[ends - sizes]
        if self.spec.pooling == "lasttoken":
            return states[ends - 1]
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=states.device), sizes)
        sums = states.new_zeros(len(lengths), states.shape[1], dtype=torch.float32)
        return (sums.index_add_(0, owner, states.float()) / sizes[:, None]).to(states.dtype)


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise SettingError("one text was given where a list of texts is expected; use [text]")
    return texts


def _batches(ids: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Numbers of sequences, longest first, so many at once as have at most `most` rows."""
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        if batch and rows + len(ids[i]) > most:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(ids[i])
    if batch:
        yield batch
