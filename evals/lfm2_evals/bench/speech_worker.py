"""An audio model under measurement, in a process of its own.

Run as a script: `python speech_worker.py`. One JSON object a line on stdin, one a line on stdout:
`load`, `answer`, `hear`. Knows no rounds and no report.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Speech", "bandwidth", "serve"]

_RATE = 16000


class Speech:
    """lfm2_mm, through its public face."""

    def load(self, folder: str, threads: int, dtype: str, quantize: str) -> dict[str, Any]:
        """Load a checkpoint; versions, bytes that each kind of step reads, bytes per second."""
        import torch

        import lfm2_mm
        from lfm2_audio.model import AudioModel

        torch.set_num_threads(threads)
        speed = bandwidth()
        began = time.perf_counter()
        model = lfm2_mm.load(folder, device="cpu", dtype=dtype, threads=threads, quantize=quantize)
        assert isinstance(model, AudioModel)
        self.model = model
        self.began = model.conversation()
        from lfm2_evals.bench.workers import peak_bytes

        return {
            "versions": {"lfm2_mm": lfm2_mm.__version__, "torch": str(torch.__version__)},
            "reading": self._reading(),
            "bandwidth": speed,
            "seconds": time.perf_counter() - began,
            "peak_bytes": peak_bytes(),
        }

    def _reading(self) -> dict[str, int]:
        """Bytes of the weights that a step reads, as they lie in memory."""
        from lfm2_audio.depthformer import Depthformer
        from lfm2_audio.detokenizer import Detokenizer

        model = self.model
        depth = model.speech.depthformer
        assert isinstance(depth, Depthformer)
        books = _nbytes(depth.depth_embeddings)
        stack = _nbytes(depth.depthformer)
        codec = model.codec
        assert isinstance(codec, Detokenizer)
        weight = model.head.weight
        return {
            "backbone": _nbytes(model.backbone.layers),
            "head": _nbytes(weight),
            "depth": _nbytes(depth.depth_linear) + depth.codebooks * stack + books,
            "codec": _nbytes(codec.net.lfm) + _nbytes(codec.net.lin),
        }

    def answer(self, seconds: float, frames: int, seed: int) -> dict[str, float]:
        """Answer a question of so many seconds, with the system prompt computed before.

        Returns:
            `first_audio` and `rest` in seconds, `rest_audio` of sound after the first chunk.
        """
        import torch

        from lfm2_audio.sounding import chunks
        from lfm2_audio.waveform import Audio

        model = self.model
        for _ in model.warm(self.began):
            pass
        generator = torch.Generator().manual_seed(seed)
        noise = 0.1 * torch.randn(int(seconds * _RATE), generator=generator)
        began = time.perf_counter()
        conversation = self.began.user(Audio(noise, _RATE))
        handle = model.reply_stream(conversation, max_frames=frames, temperature=0.0, began=began)
        first = last = 0.0
        sounding = 0.0
        for chunk in chunks(model.codec, handle):
            last = time.perf_counter() - began
            if not first:
                first = last
            else:
                sounding += chunk.duration
        done = handle.done
        assert done is not None
        return {
            "first_audio": first,
            "rest": last - first,
            "rest_audio": sounding,
            "encode": done.timings.encode,
            "prefill": done.timings.prefill,
            "first_token": done.timings.first_token,
            "cached": done.usage.cached_tokens,
            "frames": done.usage.audio_frames,
            "prompt_tokens": done.usage.prompt_tokens,
        }

    def hear(self, seconds: float, tokens: int, seed: int) -> dict[str, float]:
        """Transcribe so many seconds, with as many tokens as speech of that length has."""
        import torch

        from lfm2_audio.prompts import ASR
        from lfm2_audio.speech_head import Speech as Speaking
        from lfm2_audio.waveform import Audio
        from lfm2_mm.request import Request

        model = self.model
        generator = torch.Generator().manual_seed(seed)
        noise = 0.1 * torch.randn(int(seconds * _RATE), generator=generator)
        began = time.perf_counter()
        conversation = model.conversation(ASR).user(Audio(noise, _RATE))
        handle = model.engine.submit(
            Request(
                prompt=conversation.to_prompt(model),
                generation=Speaking(head=model.speech, mode="sequential"),
                max_tokens=tokens,
                began=began,
            )
        )
        for _ in handle:
            pass
        done = handle.done
        assert done is not None
        return {
            "seconds": time.perf_counter() - began,
            "tokens": done.usage.completion_tokens,
            "prompt_tokens": done.usage.prompt_tokens,
            "encode": done.timings.encode,
            "prefill": done.timings.prefill,
        }


def _nbytes(part: Any) -> int:
    """Bytes of a tensor, or of all tensors that a module keeps, each once."""
    import torch

    tensors = [part] if isinstance(part, torch.Tensor) else list(part.state_dict().values())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def bandwidth(size: int = 2**28, rounds: int = 5) -> float:
    """Bytes a second that all threads together read from memory, in the best of some rounds."""
    import torch

    numbers = torch.ones(size // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, size / (time.perf_counter() - began))
    return best


def serve(
    side: Any, requests: TextIO, answers: TextIO, peak: Callable[[], int] | None = None
) -> None:
    """Answer requests until there are no more; a failure is an answer, too.

    Args:
        side: What has a method for each request.
        requests: One JSON object a line.
        answers: One JSON object a line.
        peak: Tells the peak memory; None asks `workers`, which needs this package.
    """
    if peak is None:
        from lfm2_evals.bench.workers import peak_bytes

        peak = peak_bytes
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            if verb not in ("load", "answer", "hear"):
                raise ValueError(f"there is no request {verb!r}")
            answer: dict[str, Any] = {**getattr(side, verb)(**request), "peak_bytes": peak()}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Be the model."""
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        serve(Speech(), sys.stdin, answers)


if __name__ == "__main__":
    main()
