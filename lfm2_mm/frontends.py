"""The seam between the core and its frontends: what a frontend offers, and how the core finds it.

A frontend is a package that teaches the backbone a modality. It registers an object under the
entry-point group `lfm2_mm.frontends`; ours register exactly as a stranger's would. This module
knows the protocols and the discovery, and deliberately nothing about any modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.loading import LoadOptions

__all__ = ["FRONTEND_GROUP", "Frontend", "InputEncoder", "Prepared", "frontends"]

FRONTEND_GROUP = "lfm2_mm.frontends"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One content part, ready to be encoded, and how it appears in a prompt.

    Attributes:
        text: The text that takes the place of the part's placeholder in the rendered prompt,
            for instance `<|image_start|><image>…<image><|image_end|>`; empty where the positions
            carry the modality alone (audio in).
        n_positions: How many positions of the prompt the encoded features fill.
        tensors: What the encoder needs, for instance patches; CPU tensors.
        key: Identifies the content and every setting that changes its features (a digest), so
            that equal keys mean equal features. Caches rely on it.
        info: What a user may want to see (sizes, number of tiles); plain JSON values.
    """

    text: str
    n_positions: int
    tensors: Mapping[str, Tensor]
    key: str
    info: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class InputEncoder(Protocol):
    """Turns content parts of some types into rows of embeddings.

    Attributes:
        types: The content types it claims in messages, for instance `{"image", "image_url"}`.
        placeholder: The text that the checkpoint's chat template renders for one part
            (`<image>`), or "" when the template knows nothing of the modality.
        token_id: The id that stands at every position the features fill.
    """

    types: frozenset[str]
    placeholder: str
    token_id: int

    def accepts(self, source: str) -> bool:
        """Whether a file name, URL or `-` given on a command line looks like this modality."""
        ...

    def prepare(self, part: Mapping[str, Any]) -> Prepared:
        """Read one content part (a message part in OpenAI or Hugging Face form).

        Raises:
            InputError: if the part cannot be read.
        """
        ...

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """Features of each part, `[n_positions, d]`, in the order given."""
        ...


@runtime_checkable
class Frontend(Protocol):
    """Claims checkpoints and builds what `lfm2_mm.load` returns for them.

    Attributes:
        name: Short name, used in messages.
        options: The keyword arguments beyond the core's that `load` may pass on.
    """

    name: str
    options: frozenset[str]

    def claims(self, checkpoint: Checkpoint) -> bool:
        """Whether this frontend builds this checkpoint; judge by its JSON files, not its tensors.

        The `config.json` alone does not decide: a retriever has that of a text model.
        """
        ...

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Any:
        """Build the model; `options.extra` holds only names listed in `self.options`."""
        ...


@cache
def frontends() -> tuple[Frontend, ...]:
    """The installed frontends, sorted by entry-point name."""
    found = sorted(entry_points(group=FRONTEND_GROUP), key=lambda point: point.name)
    return tuple(point.load() for point in found)
