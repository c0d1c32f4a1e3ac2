"""Writes the recordings that the demo hears: sentences and questions, by espeak-ng.

    .venv/bin/python tools/make_speech_samples.py audio/lfm2_audio/samples

Sentences and voices are held out; so are the voices of questions. The sentences are chosen by
number, not by what a model makes of them; the questions are three that nano-audio answers rightly
(of a hundred it answers ninety so: docs/scores/speech.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lfm2_audio.speech.manifest import evaluation, trimmed
from lfm2_audio.speech.synthesis import RATE, synthesise
from lfm2_audio.waveform import Audio
from lfm2_evals.speech_answers import questions

CHOSEN, QUESTIONS = (1, 3, 4), (7, 10, 14)


def main(folder: Path) -> None:
    """Write the waves and `samples.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in CHOSEN:
        one = evaluation("both", max(CHOSEN) + 1)[i]
        wave = torch.from_numpy(trimmed(synthesise(one.text, one.voice)).copy())
        name = f"{one.voice.variant.lower()}-{one.text.split()[0]}.wav"
        Audio(wave, RATE).save(folder / name)
        rows.append({"file": name, "text": one.text})
    asked = questions("answers", max(QUESTIONS) + 1)
    for number in QUESTIONS:
        found = asked[number]
        name = f"{found.voice.split('+')[1].lower()}-{found.kind}.wav"
        found.audio.save(folder / name)
        rows.append({"file": name, "text": found.text, "answer": found.answer})
    text = json.dumps(rows, indent=1) + "\n"
    (folder / "samples.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
