"""Every error a user of this package can meet, as one tree.

Lfm2Error
├── ModelNotFound            no such embedded name, folder or Hub repository
├── CheckpointError          a checkpoint was found but cannot be used
│   ├── UnsupportedArchitecture   its config names a model that nothing here claims
│   ├── CorruptWeights            a weight file is damaged, or of a refused format
│   └── TensorMismatch            tensors are missing, unknown or of another shape
├── InputError               what the caller handed in cannot be used
│   ├── ImageError                an image cannot be read, or is over a limit
│   ├── AudioError                a recording cannot be read, or is over a limit
│   │   └── AudioTooLong              it is over the limit of its length
│   ├── FetchError                a URL could not be fetched
│   ├── MessageError              chat messages are malformed
│   ├── PlaceholderMismatch       placeholders and attachments differ in number
│   ├── DocumentError             a document cannot be read, or is over a limit
│   ├── FilterError               a metadata filter cannot be understood
│   ├── ContextOverflow           the prompt does not fit into the context
│   └── ConstraintError           a JSON schema or regex cannot be used
├── IndexFault               a search index cannot be used
│   ├── IndexMismatch             it was made by another model or format version
│   ├── CorruptIndex              a file of it is damaged or missing
│   └── IndexLocked               another writer is at work
├── DeviceError              a microphone or loudspeaker is missing, refuses or went away
├── MissingExtra             an optional dependency is not installed
└── SettingError             an option or environment variable has an unusable value

Each message is one sentence that says what happened, the value seen and what to do.
This module knows nothing of the code that raises: it imports nothing of ours.
"""

from __future__ import annotations

__all__ = [
    "AudioError",
    "AudioTooLong",
    "CheckpointError",
    "ConstraintError",
    "ContextOverflow",
    "CorruptIndex",
    "CorruptWeights",
    "DeviceError",
    "DocumentError",
    "FetchError",
    "FilterError",
    "ImageError",
    "IndexFault",
    "IndexLocked",
    "IndexMismatch",
    "InputError",
    "Lfm2Error",
    "MessageError",
    "MissingExtra",
    "ModelNotFound",
    "PlaceholderMismatch",
    "SettingError",
    "TensorMismatch",
    "UnsupportedArchitecture",
]


class Lfm2Error(Exception):
    """Base of every error raised on purpose by this package."""


class ModelNotFound(Lfm2Error):
    """No embedded model, folder or Hub repository has the name that was asked for."""


class CheckpointError(Lfm2Error):
    """A checkpoint was found but cannot be used."""


class UnsupportedArchitecture(CheckpointError):
    """The checkpoint's config names an architecture that no frontend claims."""


class CorruptWeights(CheckpointError):
    """A weight file is damaged, empty or of a format that is refused."""


class TensorMismatch(CheckpointError):
    """Tensors are missing, unknown or of another shape than the config says."""


class InputError(Lfm2Error):
    """Something that the caller handed in cannot be used."""


class ImageError(InputError):
    """An image cannot be read, or is over a limit."""


class AudioError(InputError):
    """A recording cannot be read, or is over a limit."""


class AudioTooLong(AudioError):
    """A recording is over the limit of its length."""


class FetchError(InputError):
    """A URL could not be fetched."""


class MessageError(InputError):
    """Chat messages or tools are malformed."""


class PlaceholderMismatch(InputError):
    """The number of placeholders differs from the number of attachments or features."""


class DocumentError(InputError):
    """A document cannot be read, or is over a limit."""


class FilterError(InputError):
    """A metadata filter cannot be understood."""


class ContextOverflow(InputError):
    """The prompt and the tokens asked for do not fit into the model's context."""


class ConstraintError(InputError):
    """A JSON schema or regular expression cannot be compiled."""


class IndexFault(Lfm2Error):
    """A search index cannot be used."""


class IndexMismatch(IndexFault):
    """The index was made by another model, or in another format version."""


class CorruptIndex(IndexFault):
    """A file of the index is damaged or missing."""


class IndexLocked(IndexFault):
    """Another process is writing to the index."""


class DeviceError(Lfm2Error):
    """There is no microphone or loudspeaker, or it cannot be used, or it went away."""


class MissingExtra(Lfm2Error):
    """An optional dependency is not installed."""


class SettingError(Lfm2Error):
    """An option or environment variable has a value that cannot be used."""
