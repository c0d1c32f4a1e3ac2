"""The demo of speech: a shipped recording is written down, a spoken question answered aloud.

Writes the spoken answer into the demo's folder, and lets a second recogniser hear it. Knows the
shipped recordings, what is said in them (`samples/samples.json`), and the public face of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_audio.opening import DEFAULT_MODEL
from lfm2_audio.waveform import read_audio
from lfm2_mm.cli.plugins import Answered

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel

__all__ = ["Sample", "run", "samples"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A shipped recording.

    Attributes:
        file: Its name in `samples/`.
        text: What is said in it.
        answer: What the answer to it must hold; None where it is no question.
    """

    file: str
    text: str
    answer: str | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return _folder() / self.file


def _folder() -> Path:
    return Path(str(resources.files("lfm2_audio").joinpath("samples")))


def samples() -> list[Sample]:
    """The shipped recordings, questions and others; none where none are shipped."""
    path = _folder() / "samples.json"
    if not path.is_file():
        return []
    return [Sample(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def run(seed: int, folder: Path, *, model: AudioModel | None = None) -> Iterator[Answered]:
    """Transcribe every recording, answer those that are questions, and hear the answers.

    Args:
        seed: Of the demo; nothing here is drawn.
        folder: Where the spoken answers go.
        model: By default the embedded one.
    """
    if model is None:
        from lfm2_mm.loading import load

        model = load(DEFAULT_MODEL)
    assert model is not None
    ears, who = _ears(model)
    for sample in samples():
        audio = read_audio(sample.path)
        about = f"{sample.file}: {audio.duration:.1f} s of speech"
        heard = model.transcribe(audio).text
        yield Answered(
            about=about,
            question="What is said?",
            answer=heard,
            truth=sample.text,
            right=_plain(heard) == _plain(sample.text),
        )
        if sample.answer is None:
            continue
        reply = model.reply(audio)
        target = f"{Path(sample.file).stem}-answer.wav"
        reply.audio.save(folder / target)
        yield Answered(
            about=about,
            question=f"{sample.text} (asked aloud)",
            answer=f"{reply.text} ({reply.audio.duration:.1f} s of speech in {target})",
            truth=sample.answer,
            right=_holds(reply.text, sample.answer),
            files=(target,),
        )
        said = ears.transcribe(read_audio(folder / target)).text
        yield Answered(
            about=f"{target}: {reply.audio.duration:.1f} s of speech",
            question=f"What is said? (heard by {who})",
            answer=said,
            truth=sample.answer,
            right=_holds(said, sample.answer),
        )


def _ears(model: AudioModel) -> tuple[Any, str]:
    """Who checks what is said: a second recogniser where one lies beside the model."""
    from lfm2_audio.nano_judge import FILE, load_judge

    if (model.folder / FILE).is_file():
        return load_judge(model.folder), "a second recogniser"
    return model, "the model itself"


def _holds(text: str, answer: str) -> bool:
    """Whether a text holds the words of an answer."""
    return f" {_plain(answer)} " in f" {_plain(text)} "


def _plain(text: str) -> str:
    """Words only, in lower case: what a transcript is compared by."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold()))
