"""How fast text models read and write on a CPU: ours beside transformers and llama.cpp.

Random weights of a released shape in every form, a process for each side, the same token ids in
turns. Beside the rates stand the bytes of weights that a token needs and what share that is of what
the memory gives. Knows what to measure; how is `rounds`, `generators` and `text_models`.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from lfm2_evals.bench import generators
from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench.floors import int8_rate, memory_rate
from lfm2_evals.bench.text_models import (
    BITS,
    TEXT_SHAPES,
    bytes_per_token,
    weights_per_token,
    write_forms,
)
from lfm2_evals.report import markdown_table, write_files
from lfm2_mm.cli import terminal
from lfm2_mm.errors import MissingExtra, SettingError

__all__ = ["CASES", "SIDES", "Case", "Plan", "TextBench", "measure", "text_command"]

Progress = Callable[[int, int], None]
Bar = Callable[..., AbstractContextManager[Progress | None]]


@dataclass(frozen=True, slots=True)
class Case:
    """What is generated.

    Attributes:
        prompt: Tokens of each prompt.
        tokens: Tokens written behind each.
        sequences: Prompts at once.
    """

    prompt: int
    tokens: int
    sequences: int = 1

    @property
    def prefill(self) -> bool:
        """Whether reading is measured, not writing."""
        return self.tokens == 1


CASES: Mapping[str, Case] = {
    "prefill 512": Case(512, 1),
    "prefill 2048": Case(2048, 1),
    "decode": Case(16, 65),
    "decode, 4 at once": Case(16, 65, 4),
}
SIDES: Mapping[str, tuple[str, str]] = {
    "ours int4": ("lfm2_mm", "int4"),
    "llama.cpp Q4_0": ("llama.cpp", "int4"),
    "ours int8": ("lfm2_mm", "int8"),
    "llama.cpp Q8_0": ("llama.cpp", "int8"),
    "ours bf16": ("lfm2_mm", "bf16"),
    "transformers bf16": ("transformers", "bf16"),
    "llama.cpp BF16": ("llama.cpp", "bf16"),
}
"""Sides: what runs it, and the form of the weights."""
_DEFAULT = tuple(name for name in SIDES if name not in ("ours bf16", "llama.cpp BF16"))
_TARGETS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ours int4", "llama.cpp Q4_0"): {
        "prefill 512": 2.0,
        "prefill 2048": 2.0,
        "decode": 1.15,
        "decode, 4 at once": 2.0,
    },
    ("ours int8", "llama.cpp Q8_0"): {
        "prefill 512": 2.0,
        "prefill 2048": 2.0,
        "decode": 1.25,
        "decode, 4 at once": 2.0,
    },
    ("ours int4", "transformers bf16"): {"prefill 512": 1.5, "prefill 2048": 1.5, "decode": 7.0},
}
"""Who is compared, and how many times faster issue 5 of this project demands."""
_SPARSE_TARGETS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ours int4", "llama.cpp Q4_0"): {"decode": 1.1}
}
"""The same of a mixture of experts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: Name of the shape, one of `TEXT_SHAPES`.
        sides: Some of `SIDES`.
        cases: Some of `CASES`.
        rounds: Measured rounds.
        threads: Threads of each side.
        peer_python: Interpreter that has transformers.
        llama_python: Interpreter that has llama-cpp-python; None leaves those sides out.
        models: Where the models are written and kept, or were by an earlier run; None writes them
            anew and removes them.
    """

    shapes: str = "350m"
    sides: tuple[str, ...] = _DEFAULT
    cases: tuple[str, ...] = tuple(CASES)
    rounds: int = 5
    threads: int = 2
    peer_python: str = sys.executable
    llama_python: str | None = None
    models: Path | None = None

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("shape", [self.shapes], TEXT_SHAPES),
            ("side", self.sides, SIDES),
            ("case", self.cases, CASES),
        ):
            if strange := [name for name in chosen if name not in known]:
                names = ", ".join(known)
                raise SettingError(f"there is no {what} {strange[0]!r}; choose from {names}")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def runnable(self) -> tuple[str, ...]:
        """The sides for which there is an interpreter, in the order of `SIDES`."""
        usable = {name for name in self.sides if self.llama_python or SIDES[name][0] != "llama.cpp"}
        return tuple(name for name in SIDES if name in usable)


@dataclass(frozen=True, kw_only=True)
class TextBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine and the versions.
        memory_rate: Bytes a second that `torch.sum` reads with these threads.
        int8_rate: Operations a second that `torch._int_mm` does with them.
        loading: Seconds until each side had its model.
        measurements: Every single one.
    """

    plan: Plan
    facts: Mapping[str, str]
    memory_rate: float
    int8_rate: float
    loading: Mapping[str, float]
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)

    def rates(self, side: str, case: str) -> list[float]:
        """Tokens a second of each round: of the prompt, or of what was written."""
        what = CASES[case]
        return [
            what.prompt * what.sequences / one.values["first"]
            if what.prefill
            else one.values["tokens"] / one.values["rest"]
            for one in self.measurements
            if (one.side, one.case) == (side, case)
        ]

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        sides = markdown_table(
            ["case", "side", "tokens/s", "of weights, GB/s", "of memory", "GOP/s", "of int8"],
            [row for case in self.plan.cases for row in self._rows(case)],
        )
        compared = markdown_table(
            ["case", "compared", "times faster", "target"],
            [row for case in self.plan.cases for row in self._ratios(case)],
        )
        peaks = markdown_table(
            ["side", "load, s", "peak memory, MiB", "weights read for a token, MB"],
            [self._memory(side) for side in self.loading],
        )
        note = (
            "Medians over rounds (least to greatest); ratios are taken pair by pair within a "
            f"round. `torch.sum` reads {self.memory_rate / 1e9:.1f} GB/s with as many threads, and "
            f"`torch._int_mm` does {self.int8_rate / 1e9:.0f} GOP/s in 8 bits: of memory and of "
            "int8, the shares of those. Bits are the same on both sides, head included."
        )
        title = f"# Text at the {self.plan.shapes} shapes, random weights"
        return "\n\n".join([title, facts, sides, compared, peaks, note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plan = asdict(self.plan)
        plan["models"] = None if self.plan.models is None else str(self.plan.models)
        return {
            "plan": plan,
            "facts": dict(self.facts),
            "memory_rate": self.memory_rate,
            "int8_rate": self.int8_rate,
            "loading": dict(self.loading),
            "measurements": [asdict(one) for one in self.measurements],
        }

    def _rows(self, case: str) -> list[list[str]]:
        config = TEXT_SHAPES[self.plan.shapes]
        rows = []
        for side in self.loading:
            rates = self.rates(side, case)
            if not rates:
                continue
            found = bench.spread(rates)
            steps = found.median / CASES[case].sequences
            moved = bytes_per_token(config, SIDES[side][1]) * steps
            body, head = weights_per_token(config)
            reading = CASES[case].prefill
            work = 2 * found.median * (body if reading else body + head) / 1e9
            speed = "" if reading else f"{moved / 1e9:.1f}"
            share = "" if reading else f"{100 * moved / self.memory_rate:.0f} %"
            done = f"{100e9 * work / self.int8_rate:.0f} %" if reading else ""
            rows.append([case, side, found.show(1), speed, share, f"{work:.0f}", done])
        return rows

    def _ratios(self, case: str) -> list[list[str]]:
        rows = []
        sparse = TEXT_SHAPES[self.plan.shapes].n_experts > 0
        for (ours, peer), dense in _TARGETS.items():
            targets = _SPARSE_TARGETS.get((ours, peer), {}) if sparse else dense
            over, under = self.rates(ours, case), self.rates(peer, case)
            if not over or not under:
                continue
            found, target = bench.ratios(over, under), targets.get(case)
            mark = ""
            if target is not None:
                mark = f"{target:g}, {'reached' if found.median >= target else 'missed'}"
            rows.append([case, f"{ours} / {peer}", found.show(), mark])
        return rows

    def _memory(self, side: str) -> list[str]:
        peaks = [one.values["peak_bytes"] for one in self.measurements if one.side == side]
        needed = bytes_per_token(TEXT_SHAPES[self.plan.shapes], SIDES[side][1])
        peak = f"{max(peaks) / 2**20:.0f}" if peaks else ""
        return [side, f"{self.loading[side]:.2f}", peak, f"{needed / 1e6:.0f}"]


def measure(
    plan: Plan,
    *,
    progress: Progress | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> TextBench:
    """Run the benchmark.

    Args:
        plan: What to measure.
        progress: Told the steps done and the steps in all.
        told: Told what is being written.

    Raises:
        MissingExtra: if an interpreter lacks what its side needs.
        Lfm2Error: if a side fails.
    """
    config = TEXT_SHAPES[plan.shapes]
    pythons = {"lfm2_mm": sys.executable, "transformers": plan.peer_python}
    if plan.llama_python is not None:
        pythons["llama.cpp"] = plan.llama_python
    modules = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
    for runner in dict.fromkeys(SIDES[side][0] for side in plan.runnable):
        if runner in modules:
            _check(pythons[runner], modules[runner])
    environment = {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    facts = bench.machine(plan.threads)
    with ExitStack() as stack:
        folder = plan.models
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")
            folder = Path(stack.enter_context(scratch))
        forms = tuple(dict.fromkeys(SIDES[side][1] for side in plan.runnable))
        places = write_forms(
            config,
            folder,
            tuple(form for form in forms if form in BITS),
            gguf=any(SIDES[side][0] == "llama.cpp" for side in plan.runnable),
            told=told,
        )
        sides, loading = {}, {}
        for side in plan.runnable:
            runner, form = SIDES[side]
            place = places[f"{form}.gguf" if runner == "llama.cpp" else form]
            command = [pythons[runner], generators.__file__, runner]
            worker = stack.enter_context(bench.Worker(side, command, environment))
            loaded = worker.call("load", path=str(place.resolve()), threads=plan.threads)
            loading[side] = float(loaded["seconds"])
            facts[runner] = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items())
            sides[side] = _generating(worker)
        memory, arithmetic = memory_rate(plan.threads), int8_rate(plan.threads)
        cases = {name: asdict(CASES[name]) for name in plan.cases}
        found = bench.interleave(sides, cases, rounds=plan.rounds, progress=progress)
    return TextBench(
        plan=plan,
        facts=facts,
        memory_rate=memory,
        int8_rate=arithmetic,
        loading=loading,
        measurements=found,
    )


def _check(python: str, module: str) -> None:
    if not bench.can_import(python, module):
        raise MissingExtra(
            f"{python!r} cannot import {module}; install it there (make bench-text does), name "
            "another interpreter, or leave the side out with --side"
        )


def _generating(worker: bench.Worker) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a side does a case."""

    def generate(case: Mapping[str, Any]) -> dict[str, float]:
        chance = random.Random(case["prompt"])
        prompts = [
            [chance.randrange(300, 900) for _ in range(case["prompt"])]
            for _ in range(case["sequences"])
        ]
        return worker.call("generate", prompts=prompts, tokens=case["tokens"])

    return generate


def text_command(bar: Bar) -> click.Command:
    """The verb `bench text`.

    Args:
        bar: Makes a progress bar of a text and `quiet=`.
    """

    @click.command("text")
    @click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
    @click.option(
        "--shapes",
        type=click.Choice(list(TEXT_SHAPES)),
        default="350m",
        show_default=True,
        help="Whose shapes the random weights have.",
    )
    @click.option(
        "--side",
        "sides",
        multiple=True,
        type=click.Choice(list(SIDES)),
        help="Who takes part; may be repeated.  [default: all but bf16 of ours and of llama.cpp]",
    )
    @click.option(
        "--case",
        "cases",
        multiple=True,
        type=click.Choice(list(CASES)),
        help="What is measured; may be repeated.  [default: all]",
    )
    @click.option(
        "--models",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the random models for the next run.  [default: a temporary one]",
    )
    @click.option(
        "--peer-python",
        metavar="PATH",
        help="Interpreter with transformers.  [default: this one]",
    )
    @click.option(
        "--llama-python",
        metavar="PATH",
        help="Interpreter with llama-cpp-python.  [default: llama.cpp is left out]",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    def text(**params: Any) -> None:
        """Tokens a second read and written, beside transformers and llama.cpp.

        Wants a quiet machine, and at the default size some minutes and 2 GB of disk.
        """
        plan = Plan(
            shapes=params["shapes"],
            sides=tuple(dict.fromkeys(params["sides"])) or _DEFAULT,
            cases=tuple(dict.fromkeys(params["cases"])) or tuple(CASES),
            rounds=params["rounds"],
            threads=params["threads"],
            peer_python=params["peer_python"] or sys.executable,
            llama_python=params["llama_python"],
            models=params["models"],
        )
        with bar("rounds", quiet=params["quiet"]) as progress:
            result = measure(
                plan,
                progress=progress,
                told=lambda what: terminal.say(f"writing {what}", quiet=params["quiet"]),
            )
        report = result.markdown()
        if params["as_json"]:
            terminal.print_json(result.to_dict())
        else:
            click.echo(report, nl=False)
        if params["out"] is not None:
            content = json.dumps(result.to_dict(), indent=1) + "\n"
            files = {"bench-text.md": report, "bench-text.json": content}
            for path in write_files(params["out"], files):
                terminal.say(f"wrote {path}", quiet=params["quiet"])

    return text
