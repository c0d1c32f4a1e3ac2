"""What the voice loop needs of a model and of a conversation, as protocols.

`lfm2_audio.model.AudioModel` and `lfm2_audio.conversation.Conversation` are these; so is the
scripted model of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lfm2_audio.codec import Codec
from lfm2_mm.events import Event

__all__ = ["Dialogue", "Reporting", "VoiceModel"]


class Reporting(Protocol):
    """A running request: iterate it for events."""

    def __iter__(self) -> Iterator[Event]:
        """Events, the last of which is `Done` or `Error`."""
        ...

    def cancel(self) -> None:
        """Ask for the end; may be called from any thread, and never waits."""
        ...


class Dialogue(Protocol):
    """What was said; every method gives a new one."""

    @property
    def turns(self) -> Sequence[Any]:
        """The user's and the model's turns, oldest first, without the system prompt."""
        ...

    def user(self, content: Any) -> Dialogue:
        """With what the user said: an `Audio`, or text."""
        ...

    def assistant(self, segments: Sequence[Any]) -> Dialogue:
        """With what the model said: its events of text and frames in the order they came."""
        ...

    def cut(self, n_frames: int) -> Dialogue:
        """With no more of the model's last turn than so many frames, and the text said by then."""
        ...

    def drop(self, n_turns: int) -> Dialogue:
        """Without so many of the oldest turns."""
        ...

    def to_prompt(self, model: Any) -> Any:
        """What the model is given; its length is the number of positions."""
        ...


class VoiceModel(Protocol):
    """Who answers."""

    @property
    def codec(self) -> Codec:
        """Turns frames into samples."""
        ...

    @property
    def max_positions(self) -> int:
        """What the context holds."""
        ...

    @property
    def reply_stream(self) -> Callable[..., Reporting]:
        """Given a conversation, answers its last turn in text and frames; takes `max_frames`."""
        ...

    @property
    def warm(self) -> Callable[..., Reporting]:
        """Given a conversation, computes it ahead; reports nothing but the end."""
        ...
