"""One side of a comparison, in a process of its own: a model that is asked and measures itself.

Run as a script by an interpreter that has what the side needs: `python workers.py transformers`
needs torch, torchvision and transformers, and nothing of ours; `python workers.py lfm2_mm` needs
us. One JSON object a line on stdin, one a line on stdout: `load`, `ask`, `see`, `forget`. The sides
differ in nothing but the library. Knows no other side and no rounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

__all__ = ["SIDES", "Ours", "Side", "Transformers", "peak_bytes", "serve"]


class Side(Protocol):
    """A library under measurement."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """Load a checkpoint in bf16, or packed as it is; the versions of what runs it."""
        ...

    def see(self, rows: int, columns: int) -> float:
        """Seconds that the vision tower takes for one view of so many patches."""
        ...

    def ask(self, image: str, question: str, tokens: int) -> dict[str, float]:
        """Ask about an image file, greedily.

        Returns:
            `first_token` and `decode` (the tokens after it) in seconds, `tokens` and
            `prompt_tokens`.
        """
        ...

    def forget(self) -> None:
        """Drop everything remembered of earlier questions."""
        ...


class Ours:
    """lfm2_mm, through its public face."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """See `Side.load`."""
        import torch

        import lfm2_mm

        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        dtype = None if "quantization_config" in config else "bfloat16"
        self.model = lfm2_mm.load(folder, device="cpu", dtype=dtype, threads=threads)
        return {"lfm2_mm": lfm2_mm.__version__, "torch": str(torch.__version__)}

    def see(self, rows: int, columns: int) -> float:
        """See `Side.see`."""
        import torch

        tower: Any = next(part for name, part in self.model.parts.items() if "vision_tower" in name)
        generator = torch.Generator().manual_seed(0)
        patches = torch.rand(rows * columns, tower.config.patch_dim, generator=generator)
        patches = patches.to(tower.post_layernorm.weight.dtype)
        with torch.inference_mode():
            began = time.perf_counter()
            tower(patches, [(rows, columns)])
            return time.perf_counter() - began

    def ask(self, image: str, question: str, tokens: int) -> dict[str, float]:
        """See `Side.ask`."""
        answer = self.model.ask(question, images=[image], max_tokens=tokens)
        done = answer.done
        return {
            "first_token": done.timings.first_token,
            "decode": done.timings.decode,
            "tokens": done.usage.completion_tokens,
            "prompt_tokens": done.usage.prompt_tokens,
        }

    def forget(self) -> None:
        """See `Side.forget`."""
        self.model.engine.features.clear()
        self.model.engine.prefixes.clear()


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
    """Hugging Face transformers: processor and `generate`, as its documentation shows them."""

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """See `Side.load`."""
        import importlib

        torch: Any = importlib.import_module("torch")
        # torchvision's compiled part does not load beside a CPU build of torch; its Python part
        # needs only that these operators have schemas, and the processor calls neither
        self._schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            self._schemas.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(threads)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.bfloat16
        ).eval()
        return {"transformers": str(transformers.__version__), "torch": str(torch.__version__)}

    def see(self, rows: int, columns: int) -> float:
        """See `Side.see`."""
        import torch

        tower = self.model.model.vision_tower
        size = 3 * tower.config.patch_size**2
        generator = torch.Generator().manual_seed(0)
        patches = torch.rand(1, rows * columns, size, generator=generator).to(torch.bfloat16)
        mask = torch.ones(1, rows * columns, dtype=torch.int32)
        shapes = torch.tensor([[rows, columns]])
        with torch.inference_mode():
            began = time.perf_counter()
            tower(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
            return time.perf_counter() - began

    def ask(self, image: str, question: str, tokens: int) -> dict[str, float]:
        """See `Side.ask`."""
        import torch
        from PIL import Image

        clock = _Clock()
        began = time.perf_counter()
        # a path would be decoded by torchvision's compiled part, which is not there
        picture = Image.open(image).convert("RGB")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=clock)
        return {
            "first_token": clock.times[1] - began,
            "decode": clock.times[-1] - clock.times[1],
            "tokens": len(clock.times) - 1,
            "prompt_tokens": int(inputs["input_ids"].shape[1]),
        }

    def forget(self) -> None:
        """See `Side.forget`; transformers remembers nothing."""


SIDES: dict[str, Callable[[], Side]] = {"lfm2_mm": Ours, "transformers": Transformers}


def peak_bytes() -> int:
    """The most memory this process ever had resident.

    Read from the process itself where the system tells (Linux): `getrusage` there also counts
    what the process was started from.
    """
    try:
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def serve(side: Side, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more; a failure is an answer, too."""
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer: dict[str, Any] = {}
            if verb == "load":
                answer["versions"] = side.load(**request)
            elif verb == "ask":
                answer |= side.ask(**request)
                answer["peak_bytes"] = peak_bytes()
            elif verb == "see":
                answer["seconds"] = side.see(**request)
            elif verb == "forget":
                side.forget()
            else:
                answer["error"] = f"there is no request {verb!r}"
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Be the side that the first argument names."""
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        serve(SIDES[sys.argv[1]](), sys.stdin, answers)


if __name__ == "__main__":
    main()
