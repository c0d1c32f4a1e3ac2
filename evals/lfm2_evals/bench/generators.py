"""One side of the text benchmark, in a process of its own: token ids in, times out.

Run as a script by an interpreter that has what the side needs: `python generators.py transformers`
needs torch and transformers, `python generators.py llama.cpp` llama-cpp-python, and neither needs
anything of ours. One JSON object a line on stdin, one a line on stdout: `load`, `generate`. Knows
no other side and no rounds.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

__all__ = ["SIDES", "LlamaCpp", "Ours", "Side", "Transformers", "serve"]

Times = tuple[float, float, int]
"""Seconds until every sequence has its first token, seconds of the others, and their number."""


class Side(Protocol):
    """A library under measurement."""

    def load(self, path: str, threads: int) -> dict[str, str]:
        """Load a model; the versions of what runs it."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """Continue all prompts at once, greedily, by so many tokens each."""
        ...


class Ours:
    """lfm2_mm, through its public face."""

    def load(self, path: str, threads: int) -> dict[str, str]:
        """See `Side.load`; a packed folder computes packed, any other in bf16."""
        import torch

        import lfm2_mm
        from lfm2_mm.kernels.native import status

        config = json.loads((Path(path) / "config.json").read_text("utf-8"))
        dtype = None if "quantization_config" in config else "bfloat16"
        self.model = lfm2_mm.load(path, device="cpu", dtype=dtype, threads=threads)
        kernels = status().path
        return {"lfm2_mm": lfm2_mm.__version__, "torch": torch.__version__, "kernels": kernels}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """See `Side.generate`."""
        from lfm2_mm.chat import Prompt
        from lfm2_mm.sampling import Sampling

        began = time.perf_counter()
        streams = [
            self.model.generate(
                Prompt.from_ids(list(ids)),
                max_tokens=tokens,
                sampling=Sampling(temperature=0.0),
                reuse=False,
                began=began,
            )
            for ids in prompts
        ]
        dones = [stream.answer.done for stream in streams]
        total = time.perf_counter() - began
        first = max(done.timings.first_token for done in dones)
        made = sum(done.usage.completion_tokens for done in dones)
        return first, total - first, made - len(prompts)


class _Clock:
    """A streamer of transformers that only notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called once with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called behind the last token."""


class Transformers:
    """Hugging Face transformers in bf16: `generate`, as its documentation shows it."""

    def load(self, path: str, threads: int) -> dict[str, str]:
        """See `Side.load`."""
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        return {"transformers": str(transformers.__version__), "torch": str(torch.__version__)}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """See `Side.generate`; prompts of equal length."""
        import torch

        ids = torch.tensor(prompts)
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            began = time.perf_counter()
            if len(prompts) == 1:
                clock = _Clock()
                self.model.generate(ids, max_new_tokens=tokens, streamer=clock, **options)
                first = clock.times[1] - began
            else:  # a streamer takes one sequence only
                self.model.generate(ids, max_new_tokens=1, **options)
                first = time.perf_counter() - began
                began = time.perf_counter()
                self.model.generate(ids, max_new_tokens=tokens, **options)
            total = time.perf_counter() - began
        return first, total - first, (tokens - 1) * len(prompts)


class LlamaCpp:
    """llama.cpp's own library, called as its C interface is meant to be."""

    _CONTEXT, _SEQUENCES, _ROWS = 4096, 4, 2048

    def load(self, path: str, threads: int) -> dict[str, str]:
        """See `Side.load`; reads a GGUF file."""
        self.lib: Any = importlib.import_module("llama_cpp")
        lib = self.lib
        lib.llama_backend_init()
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = self._CONTEXT
        params.n_batch = self._ROWS
        params.n_seq_max = self._SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.vocab = lib.llama_model_get_vocab(model)
        self.size = int(lib.llama_vocab_n_tokens(self.vocab))
        return {"llama-cpp-python": str(lib.__version__)}

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence and whether its scores are wanted."""
        lib = self.lib
        batch = lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if lib.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp failed at a step")
        lib.llama_batch_free(batch)

    def _best(self, row: int) -> int:
        """The likeliest token; numpy comes with llama-cpp-python."""
        import numpy as np

        scores = self.lib.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(scores, shape=(self.size,)).argmax())

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """See `Side.generate`."""
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        rows = [
            (token, position, number, position == len(ids) - 1)
            for number, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        self._decode(rows)
        ends = [i for i, row in enumerate(rows) if row[3]]
        last = [self._best(i) for i in ends]
        first = time.perf_counter() - began
        for step in range(tokens - 1):
            self._decode([(last[n], len(ids) + step, n, True) for n, ids in enumerate(prompts)])
            last = [self._best(n) for n in range(len(prompts))]
        return first, time.perf_counter() - began - first, (tokens - 1) * len(prompts)


SIDES: dict[str, Callable[[], Side]] = {
    "lfm2_mm": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def serve(side: Side, requests: TextIO, answers: TextIO, peak_bytes: Callable[[], int]) -> None:
    """Answer requests until there are no more; a failure is an answer, too."""
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer: dict[str, Any] = {}
            if verb == "load":
                began = time.perf_counter()
                answer["versions"] = side.load(**request)
                answer["seconds"] = time.perf_counter() - began
            elif verb == "generate":
                first, rest, made = side.generate(**request)
                answer |= {"first": first, "rest": rest, "tokens": made}
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
