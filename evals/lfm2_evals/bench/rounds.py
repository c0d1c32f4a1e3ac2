"""Interleaved rounds: every side does the same cases in the same minutes, in changing order.

On a shared machine only neighbours in time can be compared, so ratios are taken pair by pair
within a round; medians and the spread are reported. Knows what neither sides nor cases mean.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_mm.errors import Lfm2Error

__all__ = [
    "Measurement",
    "Spread",
    "Worker",
    "can_import",
    "interleave",
    "machine",
    "ratios",
    "spread",
]

Case = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Some measurements of one thing."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 2) -> str:
        """`1.23 (1.20 to 1.31)`; just the value if there is no spread."""
        middle = f"{self.median:.{digits}f}"
        if self.low == self.high:
            return middle
        return f"{middle} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"median": self.median, "low": self.low, "high": self.high}


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """`over / under`, pair by pair, and then the median of these.

    Raises:
        ValueError: if they do not come in pairs.
    """
    return spread([a / b for a, b in zip(over, under, strict=True)])


@dataclass(frozen=True)
class Measurement:
    """What one side measured of one case in one round."""

    round: int
    side: str
    case: str
    values: Mapping[str, float]


class Worker:
    """A side in a process of its own, spoken to in JSON lines.

    Args:
        name: What the side is called.
        command: What to start.
        environment: Variables set for it beside those of this process.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._errors.close()
            raise Lfm2Error(
                f"{name} could not be started with {command[0]!r} ({error.strerror}); name "
                "another interpreter"
            ) from None

    def call(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            Lfm2Error: if the side fails or ends.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise Lfm2Error(f"{self.name} ended during {do!r} ({self._last_words()}); run it alone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Lfm2Error(f"{self.name} failed at {do!r} ({answer['error']}); run it alone")
        return answer

    def close(self) -> None:
        """Let the process end; it is not waited for longer than a few seconds."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"exit status {code}" + (f", {lines[-1][:300]}" if lines else "")


def interleave(
    sides: Mapping[str, Callable[[Case], Mapping[str, float]]],
    cases: Mapping[str, Case],
    *,
    rounds: int,
    warm_up: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Let every side do every case in every round.

    Within a case the sides follow each other directly; who begins changes from round to round.
    An interruption (Ctrl-C) ends the rounds; those that every side finished are kept.

    Args:
        sides: How each side does a case; what it measured comes back.
        cases: What is done, by name.
        rounds: How often.
        warm_up: Rounds before these that are not kept.
        progress: Told the steps done and the steps in all.
    """
    found: list[Measurement] = []
    names, done, total = list(sides), 0, (rounds + warm_up) * len(cases) * len(sides)
    try:
        for number in range(-warm_up, rounds):
            current = []
            for case, what in cases.items():
                for side in names if number % 2 == 0 else names[::-1]:
                    values = sides[side](what)
                    current.append(Measurement(number, side, case, values))
                    done += 1
                    if progress is not None:
                        progress(done, total)
            if number >= 0:
                found += current
    except KeyboardInterrupt:
        if not found:
            raise
    return found


def machine(threads: int) -> dict[str, str]:
    """What the numbers were measured on: processor, cores, threads, load, system, Python."""
    from lfm2_mm.settings import physical_cores

    facts = {
        "processor": _processor(),
        "cores": f"{physical_cores()} physical, {threads} threads used",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def can_import(python: str, module: str) -> bool:
    """Whether an interpreter is there and finds a module; nothing of the module is run."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    try:
        done = subprocess.run(
            [python, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
