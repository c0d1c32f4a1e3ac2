"""Time to first token about image files, ours beside transformers, on the same shapes.

Writes a checkpoint of random weights and real image files, starts one process a side, and lets
them answer in turns: a question with nothing remembered, then another about the same image; then
each sends 1024 patches through its tower alone. The peer computes in bf16, we do or with packed
weights, with the same threads, files, questions and number of tokens; that both see the same number
of prompt tokens is checked. Knows what to measure; how is `rounds` and `workers`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench import workers
from lfm2_evals.bench.shapes import SHAPES, Work, work, write_checkpoint
from lfm2_evals.report import markdown_table
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError

__all__ = ["Plan", "Row", "VisionBench", "draw_images", "measure", "parse_sizes"]

OURS, PEER = "lfm2_mm", "transformers"
FIRST, SECOND = "What colour is the circle?", "What shape is the red object?"
# how many times sooner than transformers, by image size: what issue 2 of this project demands, and
# with packed weights issue 5
_FIRST_TARGETS = {(256, 256): 2.5, (512, 512): 1.1, (1920, 1080): 1.1}
_PACKED_TARGETS = {(256, 256): 3.5, (512, 512): 1.4, (1920, 1080): 1.4}
_SECOND_TARGET, _MEMORY_TARGET, _TOWER_TARGET = 5.0, 1.0, 2.0
_TOWER, _GRID = "tower", (32, 32)

Size = tuple[int, int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: Name of the shapes, one of `SHAPES`.
        sizes: Width and height of each image.
        rounds: Measured rounds.
        threads: Threads of each side.
        tokens: Tokens of the first answer; the second has one.
        quantize: How our weights are packed: none (bf16), int4 or int8.
        peer_python: Interpreter that has transformers and torchvision; None measures ours alone.
    """

    shapes: str = "450m"
    sizes: tuple[Size, ...] = ((256, 256), (512, 512), (1920, 1080))
    rounds: int = 5
    threads: int = 2
    tokens: int = 33
    quantize: str = "none"
    peer_python: str | None = None

    def __post_init__(self) -> None:
        if self.shapes not in SHAPES:
            raise SettingError(f"the shapes are {self.shapes!r}; choose from {', '.join(SHAPES)}")
        for name, least in (("rounds", 1), ("threads", 1), ("tokens", 2)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.peer_python is not None and not Path(self.peer_python).is_file():
            raise MissingExtra(
                f"there is no interpreter {self.peer_python!r} to run transformers with; `make "
                "bench-peers` builds it, --peer-python names another, --alone measures ours only"
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity.

    Attributes:
        image: Size of the image, `256x256`; "all" for what belongs to the whole run.
        what: The quantity and its unit.
        ours: What we took.
        peer: What the peer took; None if we ran alone.
        ratio: How many times better ours is, pair by pair.
        target: What the ratio should reach; None if nothing is demanded.
        digits: Decimals to show.
    """

    image: str
    what: str
    ours: bench.Spread
    peer: bench.Spread | None = None
    ratio: bench.Spread | None = None
    target: float | None = None
    digits: int = 2

    @property
    def reached(self) -> bool | None:
        """Whether the median ratio reaches the target; None without either."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio.median >= self.target


@dataclass(frozen=True, kw_only=True)
class VisionBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine and the versions.
        work: Arithmetic of each image.
        rows: The quantities.
        measurements: Every single one.
    """

    plan: Plan
    facts: Mapping[str, str]
    work: Mapping[str, Work]
    rows: Sequence[Row]
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        header = ["", "", "lfm2_mm", "transformers", "times better", "target"]
        table = markdown_table(header, [self._cells(row) for row in self.rows])
        header = ["", "image tokens", "GFLOP, vision (padded)", "GFLOP, prefill", "GFLOP/s reached"]
        arithmetic = markdown_table(header, [self._speed(image) for image in self.work])
        note = (
            "Medians over rounds (least to greatest); ratios are taken pair by pair within a "
            "round. GFLOP counts what must be computed; GFLOP/s divides it by our whole time to "
            "the first token, reading the file included."
        )
        form = "bf16" if self.plan.quantize == "none" else f"ours {self.plan.quantize}, theirs bf16"
        title = f"# Questions about images at the {self.plan.shapes} shapes, random weights, {form}"
        return "\n\n".join([title, facts, table, arithmetic, note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "plan": asdict(self.plan),
            "facts": dict(self.facts),
            "work": {image: {**asdict(w), "total": w.total} for image, w in self.work.items()},
            "rows": [{**asdict(row), "reached": row.reached} for row in self.rows],
            "measurements": [asdict(one) for one in self.measurements],
        }

    @staticmethod
    def _cells(row: Row) -> list[str]:
        target = ""
        if row.target is not None:
            mark = {True: ", reached", False: ", missed", None: ""}[row.reached]
            target = f"{row.target:g}{mark}"
        peer = row.peer.show(row.digits) if row.peer else ""
        ratio = row.ratio.show() if row.ratio else ""
        return [row.image, row.what, row.ours.show(row.digits), peer, ratio, target]

    def _speed(self, image: str) -> list[str]:
        done = self.work[image]
        first = next(r for r in self.rows if r.image == image and r.what.startswith("first"))
        vision = f"{done.vision:.0f} ({done.vision_padded:.0f})"
        speed = f"{done.total / first.ours.median:.0f}"
        return [image, str(done.tokens), vision, f"{done.prefill:.0f}", speed]


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`256x256,1920x1080` as sizes.

    Raises:
        SettingError: if it is something else, or a side is not 64 to 4096 pixels.
    """
    sizes = []
    for item in text.split(","):
        width, _, height = item.strip().lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise SettingError(f"the image size is {item!r}; write it as 1920x1080")
        size = int(width), int(height)
        if not all(64 <= side <= 4096 for side in size):
            raise SettingError(f"the image size is {item!r}; sides of 64 to 4096 pixels are drawn")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def draw_images(sizes: Sequence[Size], folder: Path) -> dict[str, Path]:
    """Draw one scene of each size, as PNG up to 512x512 and as JPEG above; paths by size."""
    from lfm2_vision.scenes import Profile, generate

    paths = {}
    for index, (width, height) in enumerate(sizes):
        profile = Profile(size=(width, height), grounds=("noise",), things=(3, 5))
        image = generate(0, index, split="held_out", profile=profile).image
        suffix = "png" if width * height <= 512 * 512 else "jpg"
        path = folder / f"{width}x{height}.{suffix}"
        image.save(path)
        paths[f"{width}x{height}"] = path
    return paths


def measure(plan: Plan, *, progress: Progress | None = None) -> VisionBench:
    """Run the benchmark.

    Raises:
        Lfm2Error: if a side fails, or the sides do not see the same prompt.
    """
    environment = {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    facts = bench.machine(plan.threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")))
        checkpoint = folder / "checkpoint"
        write_checkpoint(SHAPES[plan.shapes], checkpoint)
        places = {OURS: checkpoint, PEER: checkpoint}
        if plan.quantize != "none":
            places[OURS] = folder / plan.quantize
            write_checkpoint(SHAPES[plan.shapes], places[OURS], quantize=plan.quantize)
        images = draw_images(plan.sizes, folder)
        pythons = {OURS: sys.executable}
        if plan.peer_python is not None:
            pythons[PEER] = plan.peer_python
        sides = {}
        for name, python in pythons.items():
            command = [python, workers.__file__, name]
            worker = stack.enter_context(bench.Worker(name, command, environment))
            loaded = worker.call("load", folder=str(places[name]), threads=plan.threads)
            facts[name] = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items())
            sides[name] = _asking(worker, plan.tokens)
        cases: dict[str, Mapping[str, Any]] = {
            size: {"image": str(path)} for size, path in images.items()
        }
        cases[_TOWER] = {}
        found = bench.interleave(sides, cases, rounds=plan.rounds, progress=progress)
    _check_prompts(found)
    arithmetic = {
        f"{width}x{height}": work(SHAPES[plan.shapes], width, height)
        for width, height in plan.sizes
    }
    packed = plan.quantize != "none"
    rows = [row for size in plan.sizes for row in _rows(size, found, packed=packed)]
    rows += [_tower(found, packed=packed), _memory(found)]
    return VisionBench(plan=plan, facts=facts, work=arithmetic, rows=rows, measurements=found)


def _asking(
    worker: bench.Worker, tokens: int
) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a side does a case: with nothing remembered, then another question."""

    def ask(case: Mapping[str, Any]) -> dict[str, float]:
        if "image" not in case:
            return worker.call("see", rows=_GRID[0], columns=_GRID[1])
        worker.call("forget")
        first = worker.call("ask", image=case["image"], question=FIRST, tokens=tokens)
        second = worker.call("ask", image=case["image"], question=SECOND, tokens=1)
        steps = first["tokens"] - 1
        return {
            "first": first["first_token"],
            "second": second["first_token"],
            "decode": steps / first["decode"] if steps > 0 and first["decode"] > 0 else 0.0,
            "prompt_tokens": first["prompt_tokens"],
            "second_prompt_tokens": second["prompt_tokens"],
            "peak_bytes": second["peak_bytes"],
        }

    return ask


def _check_prompts(found: Sequence[bench.Measurement]) -> None:
    for case in dict.fromkeys(one.case for one in found):
        for key in ("prompt_tokens", "second_prompt_tokens"):
            counts = {
                one.side: int(one.values[key])
                for one in found
                if one.case == case and key in one.values
            }
            if len(set(counts.values())) > 1:
                raise Lfm2Error(
                    f"the sides see prompts of different lengths for {case} ({counts}), so their "
                    "times cannot be compared; report this as a bug"
                )


def _values(found: Sequence[bench.Measurement], side: str, case: str, key: str) -> list[float]:
    return [one.values[key] for one in found if one.side == side and one.case == case]


def _rows(size: Size, found: Sequence[bench.Measurement], *, packed: bool) -> list[Row]:
    case = f"{size[0]}x{size[1]}"
    sooner = _PACKED_TARGETS if packed else _FIRST_TARGETS
    targets = {"first": sooner.get(size), "second": _SECOND_TARGET, "decode": None}
    names = {
        "first": "first token, s",
        "second": "first token of a second question, s",
        "decode": "decode, tokens/s",
    }
    rows = []
    for key, what in names.items():
        ours, peer = (_values(found, side, case, key) for side in (OURS, PEER))
        better = (ours, peer) if key == "decode" else (peer, ours)
        usable = bool(peer) and all(ours) and all(peer)
        rows.append(
            Row(
                image=case,
                what=what,
                ours=bench.spread(ours),
                peer=bench.spread(peer) if peer else None,
                ratio=bench.ratios(*better) if usable else None,
                target=targets[key],
                digits=1 if key == "decode" else 3,
            )
        )
    return rows


def _tower(found: Sequence[bench.Measurement], *, packed: bool) -> Row:
    """A view of 1024 patches through the vision tower."""
    ours, peer = (_values(found, side, _TOWER, "seconds") for side in (OURS, PEER))
    return Row(
        image=f"{_GRID[0] * _GRID[1]} patches",
        what="vision tower, s",
        ours=bench.spread(ours),
        peer=bench.spread(peer) if peer else None,
        ratio=bench.ratios(peer, ours) if peer else None,
        target=_TOWER_TARGET if packed else None,
        digits=3,
    )


def _memory(found: Sequence[bench.Measurement]) -> Row:
    """Peak resident memory of each process over the whole run."""
    peaks: dict[str, float] = {}
    for one in found:
        if "peak_bytes" in one.values:
            peaks[one.side] = max(peaks.get(one.side, 0.0), one.values["peak_bytes"] / 2**20)
    ours, peer = peaks[OURS], peaks.get(PEER)
    return Row(
        image="all",
        what="peak memory, MiB",
        ours=bench.spread([ours]),
        peer=None if peer is None else bench.spread([peer]),
        ratio=None if peer is None else bench.spread([peer / ours]),
        target=_MEMORY_TARGET,
        digits=0,
    )
