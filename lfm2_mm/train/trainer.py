"""The trainer: step-based schedule, AdamW, averaged weights, checkpoints that resume exactly.

It drives a loss over a stream of batches that is a pure function of the step, so that a resumed
run sees what an uninterrupted one would have. Checkpoints are safetensors and JSON. Knows no
model, no data and no modality.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm2_mm.errors import InputError
from lfm2_mm.train.memory import keep_freed_memory
from lfm2_mm.train.runs import CHECKPOINT

__all__ = ["Schedule", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then a fall.

    Attributes:
        steps: Length of the run.
        warmup: Steps in which the rate rises.
        peak: Greatest rate.
        floor: The usual fall is a cosine to this share of `peak` at `steps`.
        hold: If set, the peak holds until this step and the rate falls as one over the square root
            of the step from there on, whatever `steps` is: a shorter run is the beginning of a
            longer one.
    """

    steps: int
    warmup: int = 200
    peak: float = 1e-3
    floor: float = 0.03
    hold: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.hold is not None:
            return self.peak * min(1.0, math.sqrt(self.hold / max(1, step)))
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Minimise a loss and keep resumable checkpoints.

    Args:
        model: Holds the parameters in fp32; forward and loss run under bf16 autocast if asked.
        loss: `loss(batch) -> (scalar, {name: float})`.
        schedule: Learning rates.
        folder: Where checkpoints and `log.jsonl` go.
        autocast: Whether to compute in bf16.
        average: Decay of the exponential moving average of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], tuple[Tensor, dict[str, float]]],
        schedule: Schedule,
        folder: Path,
        *,
        autocast: bool = True,
        average: float = 0.998,
        weight_decay: float = 0.02,
        clip: float = 1.0,
    ) -> None:
        self.model, self.loss, self.schedule = model, loss, schedule
        self.folder, self.autocast, self.average, self.clip = folder, autocast, average, clip
        self.device = next(model.parameters()).device
        self.names = [name for name, _ in model.named_parameters()]
        self.params = [p for _, p in model.named_parameters()]
        self.mean = [p.detach().clone() for p in self.params]
        kept = model.state_dict(keep_vars=True)
        self.buffers = {k: v for k, v in kept.items() if not isinstance(v, nn.Parameter)}
        groups = [
            {"params": [p for p in self.params if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.params if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self._whole = True  # False while a step is being applied: no state to keep

    def run(
        self,
        batches: Iterable[Any],
        *,
        save_every: int = 500,
        log_every: int = 50,
        say: Callable[[str], None] = print,
    ) -> None:
        """Train on `batches`, which must begin with the batch of `self.step`.

        Interrupting (Ctrl-C, or the signals INT and TERM) saves a checkpoint first, and so does a
        failure.

        Raises:
            FloatingPointError: if a gradient is not finite; nothing of it is applied.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        self.model.train()
        began, seen, sums = time.perf_counter(), 0, dict[str, float]()
        before = _interrupt_on(signal.SIGINT, signal.SIGTERM)
        try:
            for batch in batches:
                for name, value in self._one(batch).items():
                    sums[name] = sums.get(name, 0.0) + value
                seen += 1
                if self.step % log_every == 0:
                    rate = seen / (time.perf_counter() - began)
                    means = {name: round(value / seen, 4) for name, value in sums.items()}
                    self._log({"step": self.step, "steps_per_s": round(rate, 2), **means}, say)
                    began, seen, sums = time.perf_counter(), 0, {}
                if self.step % save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            say(f"interrupted at step {self.step}; checkpoint kept in {self.folder}")
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._whole:
                self.save()

    def _one(self, batch: Any) -> dict[str, float]:
        step, before = self.step, [value.clone() for value in self.buffers.values()]
        try:
            return self._apply(batch)
        except BaseException:
            # the loss may have written to buffers: nothing of a step that failed stays
            if self.step == step and self._whole:
                for value, old in zip(self.buffers.values(), before, strict=True):
                    value.copy_(old)
            raise

    def _apply(self, batch: Any) -> dict[str, float]:
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss, parts = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted step may have left some
        torch.autograd.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(self.params, self.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step} is {norm} at a loss of {float(loss.detach())}; "
                "lower the peak learning rate and resume"
            )
        self._whole = False
        self.optimizer.step()
        decay = min(self.average, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.params], 1 - decay)
        self.step += 1
        self._whole = True
        return {"loss": float(loss.detach()), "grad_norm": norm, **parts}

    def averaged(self) -> dict[str, Tensor]:
        """The moving average of the weights, by parameter name."""
        return dict(zip(self.names, self.mean, strict=True))

    def save(self) -> None:
        """Write a checkpoint atomically: weights, their average, buffers, moments, the step."""
        tensors: dict[str, Tensor] = {}
        for name, p, mean in zip(self.names, self.params, self.mean, strict=True):
            tensors[f"weight.{name}"] = p.detach().contiguous()
            tensors[f"mean.{name}"] = mean.contiguous()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value.contiguous()
        for name, value in self.buffers.items():
            tensors[f"buffer.{name}"] = value.contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"step": str(self.step), "schedule": json.dumps(asdict(self.schedule))}
        part = self.folder / f"{CHECKPOINT}.part"
        save_file(tensors, part, metadata=facts)
        os.replace(part, self.folder / CHECKPOINT)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one; says whether there was.

        Raises:
            InputError: if it cannot be read, or is of another model.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        try:
            self._restore(path)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            why = " ".join(str(error).split())
            raise InputError(
                f"the checkpoint in {str(self.folder)!r} cannot be read ({why}); begin anew with "
                "--fresh"
            ) from None
        return True

    def _restore(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            step = int((file.metadata() or {})["step"])
            names = set(file.keys())
            for name, p, mean in zip(self.names, self.params, self.mean, strict=True):
                p.copy_(file.get_tensor(f"weight.{name}"))
                mean.copy_(file.get_tensor(f"mean.{name}"))
                if f"exp_avg.{name}" in names:
                    self.optimizer.state[p] = {
                        key: file.get_tensor(f"{key}.{name}").to(p.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            for name, value in self.buffers.items():
                value.copy_(file.get_tensor(f"buffer.{name}"))
        self.step = step

    def _log(self, row: dict[str, Any], say: Callable[[str], None]) -> None:
        row["lr"] = round(self.schedule.rate(self.step), 7)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        say(" ".join(f"{name} {value}" for name, value in row.items()))


def _interrupt_on(*numbers: signal.Signals) -> dict[signal.Signals, Any]:
    """Let signals interrupt as Ctrl-C does, also where a shell has them ignored in the background.

    Returns:
        What handled them before; nothing outside the main thread, where handlers cannot be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    return {number: signal.signal(number, interrupt) for number in numbers}
