"""The tiny official checkpoint as a loaded model, and what tests say to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import lfm2_mm
from lfm2_audio.model import AudioModel
from lfm2_audio.speech_head import Speech
from lfm2_audio.waveform import Audio
from lfm2_mm.chat import Prompt, Slot, content_identities
from lfm2_mm.events import AudioFrame, Error, Event, TextDelta
from lfm2_mm.request import Handle, Request
from tests.audio import official

Steps = list[int | list[int]]
"""A token as a number, a frame as a list: the form of the golden answers."""


def model(**options: Any) -> AudioModel:
    """The official checkpoint, freshly loaded."""
    made = lfm2_mm.load(official.folder(), **{"threads": 1, "dtype": "float32", **options})
    assert isinstance(made, AudioModel)
    return made


@cache
def _kept() -> AudioModel:
    return model()


def shared() -> AudioModel:
    """The same without loading it again; nothing is computed yet, the codec is that of the file."""
    made = _kept()
    made.engine.prefixes.clear()
    return made


def recording(name: str, n: int) -> Audio:
    """A made-up recording at 16 kHz."""
    return Audio(official.signal(name, n), official.RATE)


def prompt(of: AudioModel, which: int) -> Prompt:
    """A golden prompt: five tokens, a recording, five tokens."""
    encoder = of.encoders["audio"]
    prepared = encoder.prepare({"type": "audio", "audio": recording(f"prompt {which}", 12000)})
    text, n = official.prompt_text(which), prepared.n_positions
    ids = torch.cat([text[:5], torch.full((n,), encoder.token_id), text[5:]])
    identity = ids.clone()
    identity[5 : 5 + n] = content_identities(prepared.key, n)
    slot = Slot(encoder=encoder, prepared=prepared, positions=torch.arange(5, 5 + n), end=5 + n)
    return Prompt(ids=ids, identity=identity, slots=(slot,))


def submit(of: AudioModel, which: int, n: int = 200, *, reuse: bool = False, **how: Any) -> Handle:
    """Answer a golden prompt; greedy unless `how` says otherwise."""
    generation = Speech(head=of.speech, **how)
    return of.engine.submit(
        Request(prompt=prompt(of, which), generation=generation, max_tokens=n, reuse=reuse)
    )


def steps(events: list[Event]) -> Steps:
    """What was generated, token by token and frame by frame."""
    found: Steps = []
    for event in events:
        if isinstance(event, Error):
            raise event.exception
        if isinstance(event, TextDelta):
            found += event.ids
        elif isinstance(event, AudioFrame):
            found.append(event.codes.tolist())
    return found


def said(answer: Steps) -> list[TextDelta | AudioFrame]:
    """A golden answer as events."""
    return [
        TextDelta("", (step,)) if isinstance(step, int) else AudioFrame(torch.tensor(step))
        for step in answer
    ]
