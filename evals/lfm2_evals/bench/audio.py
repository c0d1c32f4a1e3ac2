"""Speech at released shapes: how fast it comes, how soon it begins, how fast speech is heard.

Writes a checkpoint of random weights, packed ones drawn packed, loads it in a process of its own,
and lets it answer a question and transcribe a recording in turns. What must be read from memory for
a second of speech, against what this machine's memory gives, says how far from its floor it is.
The official package may do the same in bf16, question by question in the same minutes. Knows what
to measure; how is `rounds`, `speech_worker` and `official`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lfm2_audio.prompts import ASR, CONVERSATION
from lfm2_evals.bench import official, speech_worker
from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench.official import PEER
from lfm2_evals.bench.speech_shapes import SHAPES, Reading, write_checkpoint
from lfm2_evals.report import markdown_table
from lfm2_mm.errors import SettingError

__all__ = ["AudioBench", "Plan", "Row", "measure"]

OURS = "lfm2_mm"
_ANSWER, _HEAR = "answer", "hear"
_FRAME_RATE = 12.5
_CODEC_RUN = 8  # frames that the codec is given at a time, once speech runs
_TOKENS = 3.3  # a second: 150 words of English a minute, 1.3 tokens a word
# what issue 5 of this project demands, with 4-bit weights on two cores
_RTF_TARGET, _FIRST_TARGET = 0.7, 0.6

Progress = Callable[[int, int], None]
Working = Callable[[Mapping[str, Any]], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: Name of the shapes, one of `SHAPES`.
        rounds: Measured rounds.
        threads: Threads.
        dtype: Number format of weights that are not packed.
        quantize: How weights are packed: none, int4 or int8.
        question: Seconds of the question.
        frames: Frames of the answer.
        recording: Seconds of what is transcribed.
        keep: Folder that keeps the random weights for the next run; None removes them.
        peer_python: Interpreter that has what liquid-audio needs; None measures ours alone.
        peer_wheel: Folder with the unpacked wheel of liquid-audio; None measures ours alone.
    """

    shapes: str = "1.5b"
    rounds: int = 3
    threads: int = 2
    dtype: str = "auto"
    quantize: str = "int4"
    question: float = 4.0
    frames: int = 48
    recording: float = 30.0
    keep: Path | None = None
    peer_python: str | None = None
    peer_wheel: Path | None = None

    def __post_init__(self) -> None:
        if self.shapes not in SHAPES:
            raise SettingError(f"the shapes are {self.shapes!r}; choose from {', '.join(SHAPES)}")
        for name, least in (("rounds", 1), ("threads", 1), ("frames", 2), ("question", 0.5)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 1 <= self.recording <= 30:
            raise SettingError(
                f"recording is {self.recording:g}; longer ones are cut to pieces of up to 30 "
                "seconds anyway, so give 1 to 30"
            )
        official.check(self.peer_python, self.peer_wheel)

    @property
    def tokens(self) -> int:
        """Tokens of the transcript."""
        return int(self.recording * _TOKENS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity.

    Attributes:
        what: The quantity and its unit.
        value: What was measured of ours.
        peer: What was measured of the peer; None if we ran alone, or only we can be asked.
        ratio: How many times better ours is, pair by pair.
        target: What ours should be at most; None if nothing is demanded.
        digits: Decimals to show.
    """

    what: str
    value: bench.Spread
    peer: bench.Spread | None = None
    ratio: bench.Spread | None = None
    target: float | None = None
    digits: int = 2

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        return None if self.target is None else self.value.median <= self.target


@dataclass(frozen=True, kw_only=True)
class AudioBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine and the versions.
        reading: Bytes that each kind of step reads.
        bytes_per_second: Bytes of weights read for a second of interleaved speech.
        bandwidth: Bytes a second that this machine reads.
        rows: The quantities.
        measurements: Every single one.
    """

    plan: Plan
    facts: Mapping[str, str]
    reading: Reading
    bytes_per_second: float
    bandwidth: float
    rows: Sequence[Row]
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)

    @property
    def floor(self) -> float:
        """Real-time factor at which memory alone would bound interleaved speech."""
        return self.bytes_per_second / self.bandwidth

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        compared = self.plan.peer_python is not None
        names = [OURS, PEER, "times better"] if compared else [OURS]
        table = markdown_table(["", *names, "target"], [self._cells(row) for row in self.rows])
        cells = [
            [what, f"{count / 1e6:,.1f}", f"{steps:.2f}", f"{count * steps / 1e9:.2f}"]
            for what, count, steps in self._shares()
        ]
        header = ["weights read", "MB a step", "steps a second", "GB a second of speech"]
        speech = next(row for row in self.rows if row.what.startswith("real-time"))
        bound = (
            f"A second of interleaved speech reads {self.bytes_per_second / 1e9:.1f} GB of "
            f"weights; this machine's memory gives {self.bandwidth / 1e9:.1f} GB/s, so it takes "
            f"at least {self.floor:.2f} s. Measured: {speech.value.median:.2f} s, "
            f"{100 * self.floor / speech.value.median:.0f} % of it explained by memory."
        )
        note = (
            "Medians over rounds (least to greatest). First audio: from the last sample of a "
            f"{self.plan.question:g} s question to the first samples out of the codec, system "
            "prompt computed before, silence that ends a turn not counted. Transcription: "
            f"{self.plan.recording:g} s with {_TOKENS} tokens a second. Random weights: what is "
            "said means nothing."
        )
        precision = self.plan.quantize if self.plan.quantize != "none" else self.plan.dtype
        if compared:
            precision = f"ours {precision}, theirs bf16"
            note += official.NOTE
        title = f"# Speech at the {self.plan.shapes} shapes, random weights, {precision}"
        read = markdown_table(header, cells)
        return "\n\n".join([title, facts, table, read, bound, note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        keep = None if self.plan.keep is None else str(self.plan.keep)
        wheel = None if self.plan.peer_wheel is None else str(self.plan.peer_wheel)
        return {
            "plan": {**asdict(self.plan), "keep": keep, "peer_wheel": wheel},
            "facts": dict(self.facts),
            "reading": asdict(self.reading),
            "bytes_per_second": self.bytes_per_second,
            "bandwidth": self.bandwidth,
            "floor": self.floor,
            "rows": [{**asdict(row), "reached": row.reached} for row in self.rows],
            "measurements": [asdict(one) for one in self.measurements],
        }

    def _shares(self) -> list[tuple[str, int, float]]:
        config = SHAPES[self.plan.shapes].audio
        text = _FRAME_RATE * config.interleaved_n_text / config.interleaved_n_audio
        read = self.reading
        return [
            ("backbone", read.backbone, _FRAME_RATE + text),
            ("text head", read.head, text),
            ("depthformer, a frame", read.depth, _FRAME_RATE),
            (f"codec, {_CODEC_RUN} frames", read.codec, _FRAME_RATE / _CODEC_RUN),
        ]

    def _cells(self, row: Row) -> list[str]:
        mark = {True: ", reached", False: ", missed", None: ""}[row.reached]
        target = "" if row.target is None else f"at most {row.target:g}{mark}"
        cells = [row.what, row.value.show(row.digits)]
        if self.plan.peer_python is not None:
            cells.append(row.peer.show(row.digits) if row.peer else "")
            cells.append(row.ratio.show(1) if row.ratio else "")
        return [*cells, target]


def measure(plan: Plan, *, progress: Progress | None = None) -> AudioBench:
    """Run the benchmark.

    Raises:
        Lfm2Error: if the model fails.
    """
    environment = {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    facts = bench.machine(plan.threads)
    config = SHAPES[plan.shapes].audio
    with ExitStack() as stack:
        kept = plan.keep
        if kept is None:
            scratch = tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")
            kept = Path(stack.enter_context(scratch))
        folder = _checkpoint(plan, kept, plan.quantize)
        theirs, said = None, ""
        if plan.peer_python is not None and plan.peer_wheel is not None:
            # first, for it takes most memory while it loads
            theirs, said = official.start(
                stack,
                plan.peer_python,
                plan.peer_wheel,
                _checkpoint(plan, kept, "none"),
                threads=plan.threads,
                environment=environment,
            )
        command = [sys.executable, speech_worker.__file__]
        worker = stack.enter_context(bench.Worker(OURS, command, environment))
        loaded = worker.call(
            "load",
            folder=str(folder),
            threads=plan.threads,
            dtype=plan.dtype,
            quantize="none",  # it is packed, or shall not be
        )
        facts[OURS] = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items())
        facts["loading"] = f"{loaded['seconds']:.1f} s"
        sides = {OURS: _working(worker, plan)}
        if theirs is not None:
            facts[PEER] = said
            sides[PEER] = _working(theirs, plan, told=True)
        cases = {what: {"what": what} for what in (_ANSWER, _HEAR)}
        found = bench.interleave(sides, cases, rounds=plan.rounds, progress=progress)
    official.check_prompts(found)
    facts |= _early(plan, found)
    reading = Reading(**loaded["reading"])
    per_second = reading.per_second(
        n_text=config.interleaved_n_text,
        n_audio=config.interleaved_n_audio,
        frame_rate=_FRAME_RATE,
        run=_CODEC_RUN,
    )
    return AudioBench(
        plan=plan,
        facts=facts,
        reading=reading,
        bytes_per_second=per_second,
        bandwidth=loaded["bandwidth"],
        rows=_rows(plan, found),
        measurements=found,
    )


def _checkpoint(plan: Plan, kept: Path, quantize: str) -> Path:
    """The folder of random weights in that form; written unless it is there."""
    folder = kept.resolve() / f"speech-{plan.shapes}-{quantize}"
    if not (folder / "config.json").is_file():
        write_checkpoint(SHAPES[plan.shapes], folder, quantize=quantize)
    return folder


def _working(worker: bench.Worker, plan: Plan, *, told: bool = False) -> Working:
    """How a side does a case, on other noise each time: nothing shall be remembered.

    Args:
        worker: The side.
        plan: What is asked.
        told: Whether the side must be told the system prompts.
    """
    asked: dict[str, dict[str, Any]] = {
        _ANSWER: {"seconds": plan.question, "frames": plan.frames},
        _HEAR: {"seconds": plan.recording, "tokens": plan.tokens},
    }
    if told:
        asked[_ANSWER]["system"], asked[_HEAR]["system"] = CONVERSATION, ASR
    seeds = {what: count(1) for what in asked}

    def work(case: Mapping[str, Any]) -> dict[str, float]:
        what = case["what"]
        return worker.call(what, **asked[what], seed=next(seeds[what]))

    return work


def _early(plan: Plan, found: Sequence[bench.Measurement]) -> dict[str, str]:
    """A fact about sides that ended before they had done all; random weights may say anything."""
    wanted = {_ANSWER: ("frames", plan.frames), _HEAR: ("tokens", plan.tokens)}
    short = [
        f"{one.side} after {one.values[key]:.0f} of {whole} {key}"
        for one in found
        for key, whole in [wanted[one.case]]
        if one.values[key] < whole
    ]
    return {"ended early": ", ".join(short)} if short else {}


def _rows(plan: Plan, found: Sequence[bench.Measurement]) -> list[Row]:
    compared = any(one.side == PEER for one in found)

    def row(
        what: str,
        case: str,
        value: Callable[[Mapping[str, float]], float],
        *,
        higher: bool = False,
        shared: bool = True,
        target: float | None = None,
    ) -> Row:
        """A quantity; whether more of it is better, and whether the peer can be asked for it."""
        ours, theirs = (
            [value(one.values) for one in found if one.case == case and one.side == side]
            for side in ((OURS, PEER) if compared and shared else (OURS, ""))
        )
        better = (ours, theirs) if higher else (theirs, ours)
        return Row(
            what=what,
            value=bench.spread(ours),
            peer=bench.spread(theirs) if theirs else None,
            ratio=bench.ratios(*better) if theirs else None,
            target=target,
        )

    return [
        row(
            "real-time factor of interleaved speech",
            _ANSWER,
            lambda a: a["rest"] / a["rest_audio"],
            target=_RTF_TARGET,
        ),
        row(
            "first audio after a question, s",
            _ANSWER,
            lambda a: a["first_audio"],
            target=_FIRST_TARGET,
        ),
        row("… of it hearing, s", _ANSWER, lambda a: a["encode"], shared=False),
        row("… of it prefill, s", _ANSWER, lambda a: a["prefill"], shared=False),
        row(
            "seconds transcribed per second",
            _HEAR,
            lambda h: plan.recording / h["seconds"],
            higher=True,
        ),
        _memory(found),
    ]


def _memory(found: Sequence[bench.Measurement]) -> Row:
    """Peak resident memory of each process over the whole run, loading included."""
    peaks: dict[str, float] = {}
    for one in found:
        peaks[one.side] = max(peaks.get(one.side, 0.0), one.values["peak_bytes"] / 2**20)
    ours, peer = peaks[OURS], peaks.get(PEER)
    return Row(
        what="peak memory, MiB",
        value=bench.spread([ours]),
        peer=None if peer is None else bench.spread([peer]),
        ratio=None if peer is None else bench.spread([peer / ours]),
        digits=0,
    )
