"""The official package liquid-audio under measurement on a CPU, in a process of its own.

Run as a script by an interpreter that has what the package needs, and nothing of ours; the package
itself (LFM Open License) is read from a wheel that somebody unpacked. How to get both, 2 GB of
disk, on Python 3.11 or newer:

    python -m venv official && official/bin/pip install torch==2.13.0 transformers==5.23.0 \
        accelerate einops safetensors sentencepiece librosa
    official/bin/pip download --no-deps --python-version 3.12 --only-binary=:all: \
        liquid-audio==1.3.0
    python -m zipfile -e liquid_audio-1.3.0-*.whl wheel
    lfm2-mm bench audio --peer-python official/bin/python --peer-wheel wheel

Where pip would bring a torch with CUDA, name the index of torch's CPU builds. One JSON object a
line on stdin, one a line on stdout, as `speech_worker`: `load`, `answer`, `hear`. `prepare_import`
serves tools/audio_oracle.py, too. Knows no rounds and no report.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

__all__ = ["Official", "prepare_import", "version"]

_RATE, _RATE_OUT, _END = 16000, 24000, 2048


def prepare_import(wheel: Path) -> None:
    """Make `liquid_audio` importable: on a CPU, without torchaudio, on Python 3.11.

    Works on a copy, which goes when the process ends. Of torchaudio the package wants only to
    resample, which recordings of 16 kHz need not be; `.cuda()` leaves modules where they are.

    Args:
        wheel: Folder with the unpacked wheel.
    """
    torch: Any = importlib.import_module("torch")
    copy = Path(tempfile.mkdtemp(prefix="liquid-audio-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(wheel / "liquid_audio", copy / "liquid_audio")
    if sys.version_info < (3, 12):  # its four generic signatures and aliases are of Python 3.12
        for file in copy.rglob("*.py"):
            text = file.read_text("utf-8")
            text = re.sub(
                r"^(\s*def \w+)\[[^\]]+\]\((\w+)[^)]*\) -> \w+:", r"\1(\2):", text, flags=re.M
            )
            file.write_text(re.sub(r"^type (\w+) = .*", r"\1 = object", text, flags=re.M), "utf-8")
    stub: Any = types.ModuleType("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    stub.functional = types.SimpleNamespace(resample=lambda wave, rate, wanted: wave)
    sys.modules["torchaudio"] = stub
    sys.path.insert(0, str(copy))
    torch.nn.Module.cuda = lambda self, *_: self


def version(wheel: Path) -> str:
    """The version that an unpacked wheel says it has; "?" where it does not say."""
    said = sorted(wheel.glob("liquid_audio-*.dist-info"))
    return said[0].name.removesuffix(".dist-info").partition("-")[2] if said else "?"


class Official:
    """liquid-audio, used as its README shows: one chat state a question, whole answers decoded."""

    def load(self, folder: str, threads: int, wheel: str) -> dict[str, Any]:
        """Load a checkpoint in bf16, and its detokenizer; versions, seconds, bytes kept."""
        prepare_import(Path(wheel))
        self.torch: Any = importlib.import_module("torch")
        self.package: Any = importlib.import_module("liquid_audio")
        self.torch.set_num_threads(threads)
        began = time.perf_counter()
        self.processor = self.package.LFM2AudioProcessor.from_pretrained(
            Path(folder), device="cpu"
        ).eval()
        self.model = self.package.LFM2AudioModel.from_pretrained(
            Path(folder), dtype=self.torch.bfloat16, device="cpu"
        ).eval()
        self._decode([self.torch.zeros(self.model.codebooks, dtype=self.torch.long)])
        return {
            "versions": {
                "liquid_audio": version(Path(wheel)),
                "transformers": importlib.metadata.version("transformers"),
                "torch": str(self.torch.__version__),
            },
            "seconds": time.perf_counter() - began,
            "resident_bytes": _resident_bytes(),
        }

    def answer(self, seconds: float, frames: int, seed: int, system: str) -> dict[str, float]:
        """Answer a question of so many seconds; see `Speech.answer` of `speech_worker`.

        The prompt is written before the clock runs but read while it does: nothing is kept between
        questions. The first frame is decoded alone, all frames together at the end.
        """
        chat, noise = self._chat(system), self._noise(seconds, seed)
        began = time.perf_counter()
        self._ask(chat, noise)
        first = sounded = 0.0
        n_frames, heard = 0, []
        for step in self.model.generate_interleaved(**chat, max_new_tokens=4 * frames + 64):
            if step.numel() == 1:
                continue
            n_frames += 1
            if not (step >= _END).any():  # a frame that ends speech is not sound
                heard.append(step)
                if not first:
                    sounded = self._decode(heard)
                    first = time.perf_counter() - began
            if n_frames == frames:
                break
        if not first:
            raise RuntimeError("the random weights answered without speech")
        rest_audio = self._decode(heard) - sounded
        return {
            "first_audio": first,
            "rest": time.perf_counter() - began - first,
            "rest_audio": rest_audio,
            "frames": n_frames,
            "prompt_tokens": int(chat.modality_flag.shape[1]),
        }

    def hear(self, seconds: float, tokens: int, seed: int, system: str) -> dict[str, float]:
        """Transcribe so many seconds, with as many tokens as speech of that length has."""
        noise = self._noise(seconds, seed)
        began = time.perf_counter()
        chat = self._chat(system)
        self._ask(chat, noise)
        made = sum(1 for _ in self.model.generate_sequential(**chat, max_new_tokens=tokens))
        return {
            "seconds": time.perf_counter() - began,
            "tokens": made,
            "prompt_tokens": int(chat.modality_flag.shape[1]),
        }

    def _chat(self, system: str) -> Any:
        chat = self.package.ChatState(self.processor, codebooks=self.model.codebooks)
        chat.new_turn("system")
        chat.add_text(system)
        chat.end_turn()
        chat.new_turn("user")
        return chat

    def _noise(self, seconds: float, seed: int) -> Any:
        """The question of `Speech.answer`, sample by sample."""
        generator = self.torch.Generator().manual_seed(seed)
        return 0.1 * self.torch.randn(int(seconds * _RATE), generator=generator)

    @staticmethod
    def _ask(chat: Any, noise: Any) -> None:
        chat.add_audio(noise[None], _RATE)
        chat.end_turn()
        chat.new_turn("assistant")

    def _decode(self, frames: list[Any]) -> float:
        """Seconds of the sound that the detokenizer makes of frames."""
        wave = self.processor.decode(self.torch.stack(frames, 1)[None])
        return float(wave.shape[-1]) / _RATE_OUT


def _resident_bytes() -> int:
    """Bytes of this process in memory now, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _neighbour(name: str) -> Any:
    """A module beside this file, which must not be on the path: it would hide others' modules."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Be the official package."""
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    sys.dont_write_bytecode = True
    serve, peak_bytes = _neighbour("speech_worker").serve, _neighbour("workers").peak_bytes
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        serve(Official(), sys.stdin, answers, peak_bytes)


if __name__ == "__main__":
    main()
