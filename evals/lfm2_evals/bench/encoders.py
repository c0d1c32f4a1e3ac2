"""One side of the encoding benchmark, in a process of its own: documents in, times out.

Run as a script by an interpreter that has what the side needs: `python encoders.py
sentence-transformers` needs that library and nothing of ours. One JSON object a line on stdin, one
a line on stdout: `load`, `encode`. Knows no other side and no rounds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

__all__ = ["SIDES", "Ours", "SentenceTransformers", "Side", "serve"]


class Side(Protocol):
    """A library under measurement."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """Load a checkpoint in bf16, or packed as it is; the versions of what runs it."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Tensors `[n_tokens, dim]` of documents, in their order."""
        ...


class Ours:
    """lfm2_mm, through its public face."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """See `Side.load`."""
        import torch

        import lfm2_mm

        config = Path(folder) / "config.json"
        packed = config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8"))
        dtype = None if packed else "bfloat16"
        self.model = lfm2_mm.load(folder, device="cpu", dtype=dtype, threads=threads)
        return {"lfm2_mm": lfm2_mm.__version__, "torch": str(torch.__version__)}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """See `Side.encode`."""
        return list(self.model.encode_documents(texts))


class SentenceTransformers:
    """sentence-transformers' `MultiVectorEncoder`, with its own batches of 32."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """See `Side.load`."""
        torch: Any = importlib.import_module("torch")
        library: Any = importlib.import_module("sentence_transformers")
        torch.set_num_threads(threads)
        self.model = library.MultiVectorEncoder(
            folder, device="cpu", model_kwargs={"dtype": torch.bfloat16}
        )
        versions = {"sentence-transformers": library, "torch": torch}
        versions["transformers"] = importlib.import_module("transformers")
        return {name: str(module.__version__) for name, module in versions.items()}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """See `Side.encode`."""
        return list(self.model.encode_document(list(texts), show_progress_bar=False))


SIDES: dict[str, Callable[[], Side]] = {
    "lfm2_mm": Ours,
    "sentence-transformers": SentenceTransformers,
}


def serve(side: Side, requests: TextIO, answers: TextIO, peak_bytes: Callable[[], int]) -> None:
    """Answer requests until there are no more; a failure is an answer, too."""
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer: dict[str, Any] = {}
            if verb == "load":
                answer["versions"] = side.load(**request)
            elif verb == "encode":
                wall, cpu = time.perf_counter(), time.process_time()
                found = side.encode(request["texts"])
                answer["seconds"] = time.perf_counter() - wall
                answer["cpu_seconds"] = time.process_time() - cpu
                answer["vectors"] = sum(len(one) for one in found)
                answer["peak_bytes"] = peak_bytes()
            else:
                answer["error"] = f"there is no request {verb!r}"
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Be the side that the first argument names."""
    here = str(Path(__file__).parent)
    sys.path[:] = [here, *(entry for entry in sys.path if entry != here)]
    workers: Any = importlib.import_module("workers")  # its neighbour: needs nothing of ours either
    sys.path[:] = [entry for entry in sys.path if entry != here]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        serve(SIDES[sys.argv[1]](), sys.stdin, answers, workers.peak_bytes)


if __name__ == "__main__":
    main()
