"""How soon documents become vectors, ours beside sentence-transformers, on the same shapes.

Writes a retriever of random weights at a released shape, and perhaps a packed one, starts one
process a side, and lets them encode the same documents in turns; that both see the same number of
tokens is checked. Knows what to measure, and the verb; how is `rounds` and `encoders`. Imports no
torch until it runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from lfm2_evals.bench import encoders
from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench.documents import BACKBONES, LONGEST, SHORTEST, draw, write_retriever
from lfm2_evals.report import markdown_table, write_files
from lfm2_mm.cli import terminal
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError

__all__ = ["PACKED", "SETS", "EncodingBench", "Plan", "SetResult", "encoding_command", "measure"]

OURS, PEER = "lfm2_mm", "sentence-transformers"
SETS = {"128": 1.0, "512": 1.0, "mixed": 1.3}
"""Sets of documents, and how many times sooner than the peer issue 3 of this project demands."""
PACKED = {**SETS, "512": 1.3}
"""The same with packed weights, of which issue 5 speaks."""

Progress = Callable[[int, int], None]
Bar = Callable[..., AbstractContextManager[Callable[[int, int], None] | None]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: Name of the backbone, one of `BACKBONES`.
        sets: Which sets, some of `SETS`.
        documents: Documents in each.
        rounds: Measured rounds.
        threads: Threads of each side.
        quantize: How our weights are packed: none (bf16), int4 or int8.
        peer_python: Interpreter that has sentence-transformers; None measures ours alone.
        checkpoint: Where the checkpoint is written and kept, or was by an earlier run; None writes
            it anew and removes it.
    """

    shapes: str = "350m"
    sets: tuple[str, ...] = tuple(SETS)
    documents: int = 64
    rounds: int = 5
    threads: int = 2
    quantize: str = "none"
    peer_python: str | None = sys.executable
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("shape", [self.shapes], BACKBONES),
            ("set", self.sets, SETS),
        ):
            if strange := [name for name in chosen if name not in known]:
                names = ", ".join(known)
                raise SettingError(f"there is no {what} {strange[0]!r}; choose from {names}")
        for name in ("documents", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """What one set took.

    Attributes:
        name: The set.
        documents: How many.
        tokens: Of all documents, begin token and prefix included.
        ours: Our seconds.
        peer: The peer's; None if we ran alone.
        sooner: How many times sooner ours is, pair by pair; None if we ran alone.
        target: What that should reach.
    """

    name: str
    documents: int
    tokens: int
    ours: bench.Spread
    peer: bench.Spread | None
    sooner: bench.Spread | None
    target: float

    @property
    def reached(self) -> bool | None:
        """Whether the median ratio reaches the target; None if we ran alone."""
        return None if self.sooner is None else self.sooner.median >= self.target

    def cells(self) -> list[str]:
        """A line of the report's table."""
        mark = {True: ", reached", False: ", missed", None: ""}[self.reached]
        return [
            self.name,
            str(self.documents),
            f"{self.tokens:,}",
            self.ours.show(),
            self.peer.show() if self.peer else "",
            f"{self.tokens / self.ours.median:.0f}",
            f"{self.tokens / self.peer.median:.0f}" if self.peer else "",
            self.sooner.show() if self.sooner else "",
            f"{self.target:g}{mark}",
        ]


@dataclass(frozen=True, kw_only=True)
class EncodingBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine and the versions.
        sets: Every set.
        memory: The most MiB each side ever had resident.
        measurements: Every single one.
    """

    plan: Plan
    facts: Mapping[str, str]
    sets: Sequence[SetResult]
    memory: Mapping[str, float]
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        header = ["set", "documents", "tokens", f"{OURS}, s", f"{PEER}, s"]
        header += [f"{OURS}, tokens/s", f"{PEER}, tokens/s", "times sooner", "target"]
        table = markdown_table(header, [one.cells() for one in self.sets])
        peaks = ", ".join(f"{side} {peak:.0f} MiB" for side, peak in self.memory.items())
        note = (
            "Medians over rounds (least to greatest); ratios are taken pair by pair within a "
            "round. Lengths count begin token and prefix; the mixed ones are lognormal, "
            f"{SHORTEST} to {LONGEST}. {PEER} encodes in its default batches."
        )
        form = "bf16" if self.plan.quantize == "none" else f"ours {self.plan.quantize}, theirs bf16"
        title = f"# Encoding documents at the {self.plan.shapes} shapes, random weights, {form}"
        return "\n\n".join([title, facts, table, f"Peak memory: {peaks}.", note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plan = asdict(self.plan)
        plan["checkpoint"] = None if self.plan.checkpoint is None else str(self.plan.checkpoint)
        return {
            "plan": plan,
            "facts": dict(self.facts),
            "sets": [{**asdict(one), "reached": one.reached} for one in self.sets],
            "memory_mib": dict(self.memory),
            "measurements": [asdict(one) for one in self.measurements],
        }


def measure(plan: Plan, *, progress: Progress | None = None) -> EncodingBench:
    """Run the benchmark.

    Raises:
        MissingExtra: if the peer's interpreter has no sentence-transformers.
        Lfm2Error: if a side fails, or does not see the tokens that were drawn.
    """
    environment = {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    pythons = {OURS: sys.executable}
    if plan.peer_python is not None:
        _check_peer(plan.peer_python)
        pythons[PEER] = plan.peer_python
    facts = bench.machine(plan.threads)
    drawn = {name: draw(name, plan.documents) for name in plan.sets}
    with ExitStack() as stack:
        folder = plan.checkpoint
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")
            folder = Path(stack.enter_context(scratch)) / "checkpoint"
        write_retriever(BACKBONES[plan.shapes], folder)
        places = {OURS: folder, PEER: folder}
        if plan.quantize != "none":
            places[OURS] = folder.with_name(f"{folder.name}-{plan.quantize}")
            write_retriever(BACKBONES[plan.shapes], places[OURS], quantize=plan.quantize)
        sides = {}
        for name, python in pythons.items():
            command = [python, encoders.__file__, name]
            worker = stack.enter_context(bench.Worker(name, command, environment))
            loaded = worker.call("load", folder=str(places[name].resolve()), threads=plan.threads)
            facts[name] = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items())
            for texts, _ in drawn.values():
                worker.call("encode", texts=texts[:2])
            sides[name] = _encoding(worker)
        cases = {name: {"texts": texts} for name, (texts, _) in drawn.items()}
        found = bench.interleave(sides, cases, rounds=plan.rounds, warm_up=0, progress=progress)
    targets = SETS if plan.quantize == "none" else PACKED
    results = [_result(name, drawn[name][1], found, targets[name]) for name in plan.sets]
    memory = {
        name: max(one.values["peak_bytes"] for one in found if one.side == name) / 2**20
        for name in pythons
    }
    return EncodingBench(plan=plan, facts=facts, sets=results, memory=memory, measurements=found)


def _check_peer(python: str) -> None:
    if not bench.can_import(python, "sentence_transformers"):
        raise MissingExtra(
            f"{python!r} cannot import sentence-transformers; install `sentence-transformers>=6.2` "
            "there, name another interpreter with --peer-python, or measure ours only with --alone"
        )


def _encoding(worker: bench.Worker) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a side does a set."""

    def encode(case: Mapping[str, Any]) -> dict[str, float]:
        return worker.call("encode", texts=case["texts"])

    return encode


def _result(
    name: str, lengths: Sequence[int], found: Sequence[bench.Measurement], target: float
) -> SetResult:
    times: dict[str, list[float]] = {OURS: [], PEER: []}
    for one in found:
        if one.case != name:
            continue
        if one.values["vectors"] != sum(lengths):
            raise Lfm2Error(
                f"{one.side} made {one.values['vectors']} vectors of the {sum(lengths)} tokens of "
                f"{name}, so its times cannot be compared; report this as a bug"
            )
        times[one.side].append(one.values["seconds"])
    ours, peer = times[OURS], times[PEER]
    return SetResult(
        name=name,
        documents=len(lengths),
        tokens=sum(lengths),
        ours=bench.spread(ours),
        peer=bench.spread(peer) if peer else None,
        sooner=bench.ratios(peer, ours) if peer else None,
        target=target,
    )


def encoding_command(bar: Bar) -> click.Command:
    """The verb `bench encoding`.

    Args:
        bar: Makes a progress bar of a text and `quiet=`.
    """

    @click.command("encoding")
    @click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
    @click.option(
        "--documents",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="N",
        help="Documents in each set.",
    )
    @click.option(
        "--set",
        "sets",
        multiple=True,
        type=click.Choice(list(SETS)),
        help="Tokens of a document; may be repeated.  [default: all]",
    )
    @click.option(
        "--shapes",
        type=click.Choice(list(BACKBONES)),
        default="350m",
        show_default=True,
        help="Whose shapes the random weights have.",
    )
    @click.option(
        "--quantize",
        type=click.Choice(["none", "int4", "int8"]),
        default="none",
        show_default=True,
        help="How our weights are packed; the peer computes in bf16.",
    )
    @click.option(
        "--checkpoint",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the random weights for the next run.  [default: a temporary one]",
    )
    @click.option(
        "--peer-python",
        metavar="PATH",
        help="Interpreter with sentence-transformers.  [default: this one]",
    )
    @click.option("--alone", is_flag=True, help="Measure ours only.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    def encoding(**params: Any) -> None:
        """Time to encode documents, beside sentence-transformers.

        Random weights in bf16, or ours packed, the same documents and threads; the two encode in
        turns. Wants a quiet machine and, at the default size, more than half an hour.
        """
        plan = Plan(
            shapes=params["shapes"],
            sets=tuple(dict.fromkeys(params["sets"])) or tuple(SETS),
            documents=params["documents"],
            rounds=params["rounds"],
            threads=params["threads"],
            quantize=params["quantize"],
            peer_python=None if params["alone"] else params["peer_python"] or sys.executable,
            checkpoint=params["checkpoint"],
        )
        with bar("sets", quiet=params["quiet"]) as progress:
            result = measure(plan, progress=progress)
        text = result.markdown()
        if params["as_json"]:
            terminal.print_json(result.to_dict())
        else:
            click.echo(text, nl=False)
        if params["out"] is not None:
            content = json.dumps(result.to_dict(), indent=1) + "\n"
            files = {"bench-encoding.md": text, "bench-encoding.json": content}
            for path in write_files(params["out"], files):
                terminal.say(f"wrote {path}", quiet=params["quiet"])

    return encoding
