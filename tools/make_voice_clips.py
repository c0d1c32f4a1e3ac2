"""Makes the short clips of speech that the tests of the voice loop hear (tests/audio/clips).

Speech of espeak-ng, mono, 16 kHz, 16 bits, FLAC; needs the program espeak-ng, which tests do not.
`python tools/make_voice_clips.py [FOLDER]`
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from lfm2_audio.waveform import Audio, read_audio

__all__ = ["CLIPS", "main", "speak"]

RATE = 16000

CLIPS = {
    "question": ("en-us", 150, "What is the capital of France?"),
    "second": ("en-gb", 160, "And what is seven times eight?"),
    "stop": ("en-us", 165, "Wait, stop. Tell me something else."),
    "short": ("en-us", 150, "No."),
    "backchannel": ("en-gb", 190, "Uh"),
}
"""Name of a clip: voice, words per minute, what is said."""


def speak(voice: str, speed: int, text: str) -> np.ndarray:
    """What espeak-ng says, trimmed, fp32 at 16 kHz with a peak of 0.5."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    samples = read_audio(wav, rate=RATE).samples.numpy()
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return np.asarray(0.5 * samples / np.abs(samples).max(), dtype=np.float32)


def main(folder: Path) -> None:
    """Write every clip."""
    if shutil.which("espeak-ng") is None:
        sys.exit("the program espeak-ng is not installed (Debian, Ubuntu: apt install espeak-ng)")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (voice, speed, text) in CLIPS.items():
        path = folder / f"{name}.flac"
        Audio(torch.from_numpy(speak(voice, speed, text)), RATE).save(path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1] / "tests" / "audio" / "clips"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
