"""What the audio frontend adds to the command line: `transcribe`, `speak`, `talk`, the demo.

Imported for `--help`, so nothing here imports torch before a verb runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfm2_audio.opening import DEFAULT_MODEL
from lfm2_audio.recipes import RECIPES
from lfm2_audio.speaking import speak
from lfm2_audio.talking import talk
from lfm2_audio.transcribing import transcribe
from lfm2_mm.cli import terminal
from lfm2_mm.cli.plugins import Answered, Demo, Plugin, Recipe
from lfm2_mm.locate import embedded_models

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = ["AudioPlugin", "plugin"]

_NOTE = (
    f"note: the embedded {DEFAULT_MODEL} knows about 300 English words in synthetic voices; for "
    "real speech use -m LiquidAI/LFM2.5-Audio-1.5B"
)


class AudioPlugin(Plugin):
    """The plug-in object; see `lfm2_mm.cli.plugins.Plugin`."""

    commands: Sequence[click.Command] = (
        transcribe,
        speak,
        talk,
    )
    notes: Mapping[str, str] = {DEFAULT_MODEL: _NOTE}
    recipes: Mapping[str, Recipe] = RECIPES

    @property
    def demos(self) -> Sequence[Demo]:  # type: ignore[override]  # read-only here
        """A recording transcribed and a spoken question answered, where the model is embedded."""
        return (_demo,) if any(m.name == DEFAULT_MODEL for m in embedded_models()) else ()


def _demo(model: Model, seed: int, folder: Path) -> Iterator[Answered]:
    missing = [name for name in ("soundfile", "soxr") if find_spec(name) is None]
    if missing:
        terminal.say(
            f"note: the demo of speech is left out, for {', '.join(missing)} is not installed; run "
            "pip install 'lfm2-mm[audio]'"
        )
        return
    from lfm2_audio.demo import run

    yield from run(seed, folder)


plugin = AudioPlugin()
