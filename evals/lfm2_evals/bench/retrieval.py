"""Search latency and recall, ours beside exact scoring and other engines, on one corpus.

Stores the corpus once a side, each in a process of its own, and lets them answer the same queries
in turns; what the exact side finds is the truth that recall is measured against. Knows what to
measure; how is `rounds`, `passages` and `searchers`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lfm2_evals.bench import passages as corpora
from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench import searchers
from lfm2_evals.report import markdown_table
from lfm2_mm.errors import SettingError

__all__ = ["SIDES", "Plan", "RetrievalBench", "SideResult", "measure"]

OURS, TRUTH = "lfm2_mm", "exact"
SIDES = tuple(searchers.SIDES)
_PEERS = {"lancedb": "lancedb", "qdrant": "qdrant_client"}
_K, _WARM_UP = 10, 5
# what issue 3 of this project demands at 100,000 passages
_LARGE = 100_000
_TARGETS = {"p50": 40.0, "sooner": 10.0, "recall": 0.97, "bytes": 75.0, "memory": 1.5}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        passages: How many.
        corpus: Folder of texts; None draws clusters of vectors.
        model: Retriever that encodes the texts.
        queries: How many different ones.
        rounds: Measured rounds; each asks every query.
        threads: Threads of each side.
        sides: Which sides, by name; ours and `exact` always take part.
        peer_python: Interpreter that may have LanceDB and Qdrant.
        keep: Folder that keeps the texts' vectors, so that another run need not encode them again,
            and one that was stopped is carried on; and our index, so that it need not be built
            again.
    """

    passages: int = 10_000
    corpus: Path | None = corpora.MANUALS
    model: str = "nano-colbert"
    queries: int = 20
    rounds: int = 3
    threads: int = 2
    sides: tuple[str, ...] = SIDES
    peer_python: str = sys.executable
    keep: Path | None = None

    def __post_init__(self) -> None:
        for name in ("passages", "queries", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in self.sides:
            if name not in SIDES:
                raise SettingError(f"there is no side {name!r}; choose from {', '.join(SIDES)}")


@dataclass(frozen=True, kw_only=True)
class SideResult:
    """What one side took.

    Attributes:
        name: The side.
        p50: Milliseconds of the middle query.
        p95: Milliseconds that 95 of 100 queries stay below.
        recall: Share of the exact side's ten best that it finds.
        build: Seconds to store the corpus; 0 for a side that stores nothing.
        build_memory: GiB resident at most while storing.
        memory: GiB resident at most while searching.
        sooner: How many times sooner ours is, query by query; None for ours.
        slowest: Of the slowest twentieth of its queries the mean milliseconds, those of them that
            its threads computed, and the page faults that waited for the disk.
        with_model: p50 and p95 with the query's encoding; None if it was not measured.
    """

    name: str
    p50: float
    p95: float
    recall: float
    build: float
    build_memory: float
    memory: float
    slowest: tuple[float, float, float]
    sooner: bench.Spread | None = None
    with_model: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class RetrievalBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine, the corpus and the versions.
        sides: Every side.
        bytes_per_token: Of our vectors, lists and codebook.
        measurements: Every single one.
    """

    plan: Plan
    facts: Mapping[str, str]
    sides: Sequence[SideResult]
    bytes_per_token: float
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)

    def targets(self) -> dict[str, tuple[float, float, bool]]:
        """What was demanded: found, wanted and whether it was reached; empty at other sizes."""
        if self.plan.passages < _LARGE or self.plan.corpus is None:
            return {}
        ours = next(side for side in self.sides if side.name == OURS)
        truth = next(side for side in self.sides if side.name == TRUTH)
        sooner = truth.sooner.median if truth.sooner else 0.0
        found = {
            "p50": ours.p50,
            "sooner": sooner,
            "recall": ours.recall,
            "bytes": self.bytes_per_token,
            "memory": ours.memory,
        }
        at_least = ("sooner", "recall")
        return {
            name: (value, wanted, value >= wanted if name in at_least else value <= wanted)
            for name, wanted in _TARGETS.items()
            for value in [found[name]]
        }

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        header = ["", "p50, ms", "p95, ms", "recall@10", "ours sooner", "build, s"]
        header += ["memory building, GiB", "memory searching, GiB"]
        table = markdown_table(header, [_cells(side) for side in self.sides])
        ours = next(side for side in self.sides if side.name == OURS)
        lines = [f"Ours takes {self.bytes_per_token:.1f} bytes a token."]
        if ours.with_model is not None:
            p50, p95 = ours.with_model
            lines.append(f"With the query's encoding: p50 {p50:.1f} ms, p95 {p95:.1f} ms.")
        wall, cpu, faults = ours.slowest
        lines.append(
            f"Our slowest twentieth: {wall:.1f} ms, of which {cpu:.1f} ms of CPU time in all "
            f"threads, and {faults:.0f} page faults that waited for the disk."
        )
        for name, (value, wanted, reached) in self.targets().items():
            mark = "reached" if reached else "missed"
            lines.append(f"Target {name}: {value:.3g} of {wanted:g}, {mark}.")
        note = (
            "Sides answer the same queries in turns. Recall: share of the exact side's ten best. "
            "Ours sooner: median of the ratios query by query (least to greatest)."
        )
        title = f"# Search in {self.plan.passages:,} passages"
        return "\n\n".join([title, facts, table, "\n".join(lines), note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plan = asdict(self.plan)
        for name in ("corpus", "keep"):
            plan[name] = None if plan[name] is None else str(plan[name])
        return {
            "plan": plan,
            "facts": dict(self.facts),
            "sides": [asdict(side) for side in self.sides],
            "bytes_per_token": self.bytes_per_token,
            "targets": {name: list(value) for name, value in self.targets().items()},
            "measurements": [asdict(one) for one in self.measurements],
        }


def _cells(side: SideResult) -> list[str]:
    sooner = side.sooner.show(1) if side.sooner else ""
    built = f"{side.build:.1f}" if side.build else ""
    memory = f"{side.build_memory:.2f}" if side.build else ""
    speed = [f"{side.p50:.1f}", f"{side.p95:.1f}", f"{side.recall:.3f}", sooner]
    return [side.name, *speed, built, memory, f"{side.memory:.2f}"]


def measure(plan: Plan, *, progress: Progress | None = None) -> RetrievalBench:
    """Run the benchmark.

    Raises:
        InputError: if the corpus holds no text.
        Lfm2Error: if a side fails.
        ModelNotFound: if there is no such model.
    """
    facts = bench.machine(plan.threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")))
        stored = _corpus(plan, folder, progress)
        source = "drawn clusters" if plan.corpus is None else f"{plan.corpus}, {plan.model}"
        facts["corpus"] = f"{stored.passages:,} passages, {stored.tokens:,} tokens ({source})"
        if stored.encoded:
            took = f"{stored.seconds:.0f} s for {stored.encoded:,} of them"
            facts["encoding"] = f"{took}, {stored.encoded / stored.seconds:.0f} a second"
        sides: dict[str, Callable[[Mapping[str, Any]], Mapping[str, float]]] = {}
        built: dict[str, dict[str, Any]] = {}
        found: dict[tuple[str, str], list[int]] = {}
        for name in _present(plan, facts):
            own = folder
            if name == OURS and plan.keep is not None:
                own = _kept(plan.keep, folder)
            if searchers.SIDES[name]().stores:
                built[name] = _build(plan, name, folder, own, facts)
            worker = stack.enter_context(_worker(plan, name))
            model = plan.model if stored.queries and name == OURS else None
            loaded = worker.call("load", corpus=str(folder), folder=str(own), model=model)
            facts[name] = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items())
            sides[name] = _asking(worker, name, found)
        texts = stored.queries or (None,) * plan.queries
        cases = {f"query {n}": {"query": n, "text": text} for n, text in enumerate(texts)}
        measured = _rounds(sides, cases, plan.rounds, progress)
    facts["load after"] = bench.machine(plan.threads).get("load before", "unknown")
    return RetrievalBench(
        plan=plan,
        facts=facts,
        sides=[_result(name, measured, built.get(name, {}), found) for name in sides],
        bytes_per_token=built[OURS]["facts"]["bytes_per_token"],
        measurements=measured,
    )


def _rounds(
    sides: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, float]]],
    cases: Mapping[str, Mapping[str, Any]],
    rounds: int,
    progress: Progress | None,
) -> list[bench.Measurement]:
    """Query by query; only a few warm up, since at 100,000 passages exact scoring takes seconds.

    An interruption (Ctrl-C) ends the rounds; what every side answered is kept.
    """
    first = dict(list(cases.items())[:_WARM_UP])
    bench.interleave(sides, first, rounds=1, warm_up=0)
    measured: list[bench.Measurement] = []
    try:
        for number in range(rounds):
            for place, (case, what) in enumerate(cases.items()):
                order = list(sides) if (number + place) % 2 == 0 else list(sides)[::-1]
                turn = {name: sides[name] for name in order}
                for one in bench.interleave(turn, {case: what}, rounds=1, warm_up=0):
                    measured.append(replace(one, round=number))
                if progress is not None:
                    progress(number * len(cases) + place + 1, rounds * len(cases))
    except KeyboardInterrupt:
        if not measured:
            raise
    return measured


def _corpus(plan: Plan, folder: Path, progress: Progress | None) -> corpora.Stored:
    if plan.corpus is None:
        return corpora.draw(plan.passages, folder, queries=plan.queries)
    import torch

    import lfm2_mm

    texts = corpora.passages(plan.corpus, plan.passages)
    encoder = lfm2_mm.load(plan.model)
    torch.set_num_threads(plan.threads)
    return corpora.encode(
        texts, encoder, folder, queries=plan.queries, cache=plan.keep, progress=progress
    )


def _kept(keep: Path, corpus: Path) -> Path:
    """Where our index of this corpus is kept, by what is in the corpus and the index's format."""
    from lfm2_retrieval.index.manifest import VERSION

    digest = hashlib.sha256((corpus / "lengths.npy").read_bytes())
    with (corpus / "vectors.f2").open("rb") as file:
        digest.update(file.read(1 << 20))
    return keep / f"index-{digest.hexdigest()[:16]}-v{VERSION}"


def _build(plan: Plan, name: str, corpus: Path, own: Path, facts: dict[str, str]) -> dict[str, Any]:
    """Let a side store the corpus, if it is not kept; what that took."""
    note = own / "built.json"
    if own != corpus and note.exists():
        facts["index"] = f"kept from an earlier run, as its build time and memory are: {own.name}"
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return found
    if own != corpus:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
    with _worker(plan, name) as builder:
        built = builder.call("build", corpus=str(corpus), folder=str(own))
    if own != corpus:
        note.write_text(json.dumps(built) + "\n", encoding="utf-8")
    return built


def _worker(plan: Plan, name: str) -> bench.Worker:
    threads = str(plan.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    python = plan.peer_python if name in _PEERS else sys.executable
    return bench.Worker(name, [python, searchers.__file__, name, threads], environment)


def _present(plan: Plan, facts: dict[str, str]) -> list[str]:
    """The sides that can take part; the others are named among the facts."""
    chosen = [name for name in SIDES if name in {*plan.sides, OURS, TRUTH}]
    for name, module in _PEERS.items():
        if name in chosen:
            command = [plan.peer_python, "-c", f"import {module}"]
            try:
                missing = subprocess.run(command, capture_output=True, timeout=120).returncode
            except (OSError, subprocess.TimeoutExpired):
                missing = 1
            if missing:
                chosen.remove(name)
                facts[name] = f"left out: {plan.peer_python} cannot import {module}"
    return chosen


def _asking(
    worker: bench.Worker, name: str, found: dict[tuple[str, str], list[int]]
) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a side does a query; what it found is kept."""

    def ask(case: Mapping[str, Any]) -> dict[str, float]:
        answer = worker.call("search", query=case["query"], k=_K)
        found[name, f"query {case['query']}"] = answer["found"]
        values = {key: answer[key] for key in ("seconds", "cpu_seconds", "faults", "peak_bytes")}
        if name == OURS and case["text"] is not None:
            values["with_model"] = worker.call("answer", text=case["text"], k=_K)["seconds"]
        return values

    return ask


def _result(
    name: str,
    measured: Sequence[bench.Measurement],
    built: Mapping[str, Any],
    found: Mapping[tuple[str, str], list[int]],
) -> SideResult:
    mine = [one for one in measured if one.side == name]
    times = [1000 * one.values["seconds"] for one in mine]
    shares = [
        len(set(found[name, case]) & set(found[TRUTH, case])) / len(found[TRUTH, case])
        for case in dict.fromkeys(one.case for one in mine)
    ]
    ours = [1000 * one.values["seconds"] for one in measured if one.side == OURS]
    worst = sorted(mine, key=lambda one: one.values["seconds"])[-max(1, len(mine) // 20) :]
    slowest = [
        statistics.mean(one.values[key] for one in worst)
        for key in ("seconds", "cpu_seconds", "faults")
    ]
    whole = [1000 * one.values["with_model"] for one in mine if "with_model" in one.values]
    return SideResult(
        name=name,
        p50=statistics.median(times),
        p95=_p95(times),
        recall=statistics.mean(shares),
        build=built.get("seconds", 0.0),
        build_memory=built.get("peak_bytes", 0) / 2**30,
        memory=max(one.values["peak_bytes"] for one in mine) / 2**30,
        slowest=(1000 * slowest[0], 1000 * slowest[1], slowest[2]),
        sooner=None if name == OURS else bench.ratios(times, ours),
        with_model=(statistics.median(whole), _p95(whole)) if whole else None,
    )


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
