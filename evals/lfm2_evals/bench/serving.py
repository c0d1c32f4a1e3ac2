"""What a server gives to many callers at once, and what its prefix cache saves.

Real servers of random weights at released shapes, real sockets: many clients stream beside one
client alone, in turns with llama.cpp's server where there is one; and a second question about a
picture follows the first. Knows what to measure; how is `serving_clients` and `rounds`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lfm2_evals.bench import rounds as bench
from lfm2_evals.bench.serving_clients import ServerProcess, ask, ask_together, free_port
from lfm2_evals.bench.shapes import SHAPES, write_checkpoint
from lfm2_evals.bench.text_models import BITS, TEXT_SHAPES, write_forms
from lfm2_evals.report import markdown_table
from lfm2_mm.errors import SettingError

__all__ = ["PARTS", "Plan", "ServingBench", "measure"]

OURS, PEER = "lfm2-mm serve", "llama-server"
PARTS = ("clients", "picture")
FIRST, SECOND = "first question", "second question"
_MORE, _FAIR, _SOONER = 3.0, 0.5, 8.0  # what issue 6 of this project demands
_PROMPT_ROOM = 256  # positions of a prompt at most, for a peer that is told its context


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: Name of the text model's shape, one of `TEXT_SHAPES`.
        form: How its weights are packed, one of `BITS`.
        vision: Name of the vision-language model's shape, one of `SHAPES`.
        size: Width and height of the picture.
        parts: Some of `PARTS`.
        clients: How many stream at once.
        tokens: Tokens of each answer.
        rounds: Measured rounds.
        threads: Threads of each server.
        peer_server: llama.cpp's `llama-server`; None leaves it out.
        models: Where the models are written and kept; None writes them anew and removes them.
    """

    shapes: str = "350m"
    form: str = "int4"
    vision: str = "450m"
    size: tuple[int, int] = (1920, 1080)
    parts: tuple[str, ...] = PARTS
    clients: int = 32
    tokens: int = 128
    rounds: int = 3
    threads: int = 2
    peer_server: Path | None = None
    models: Path | None = None

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("shape", [self.shapes], TEXT_SHAPES),
            ("form", [self.form], BITS),
            ("shape with vision", [self.vision], SHAPES),
            ("part", self.parts, PARTS),
        ):
            if strange := [name for name in chosen if name not in known]:
                names = ", ".join(known)
                raise SettingError(f"there is no {what} {strange[0]!r}; choose from {names}")
        for name in ("clients", "tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.clients < 2:
            raise SettingError("clients is 1; it takes at least 2 to compare them with one alone")

    @property
    def together(self) -> str:
        """Name of the case in which all stream."""
        return f"{self.clients} clients"


@dataclass(frozen=True, kw_only=True)
class ServingBench:
    """What was found.

    Attributes:
        plan: What was asked for.
        facts: The machine.
        measurements: Every single one.
        note: What is missing, as a sentence; empty if nothing is.
    """

    plan: Plan
    facts: Mapping[str, str]
    measurements: Sequence[bench.Measurement] = field(default=(), repr=False)
    note: str = ""

    def values(self, side: str, case: str, what: str) -> list[float]:
        """One value of each round."""
        return [
            one.values[what] for one in self.measurements if (one.side, one.case) == (side, case)
        ]

    def more(self, side: str, what: str = "rate") -> bench.Spread:
        """How many times the tokens a second of one client all of them get together."""
        together = self.values(side, self.plan.together, what)
        return bench.ratios(together, self.values(side, "1 client", what))

    def sooner(self, what: str = "first") -> bench.Spread:
        """How many times sooner the second question's first token is there than the first's."""
        return bench.ratios(self.values(OURS, FIRST, what), self.values(OURS, SECOND, what))

    def markdown(self) -> str:
        """The report as Markdown."""
        plan = self.plan
        parts = ["# Serving, random weights"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.facts.items()))
        if self.values(OURS, plan.together, "rate"):
            parts += self._clients()
        if self.values(OURS, SECOND, "first"):
            parts += self._picture()
        parts.append(
            "Medians over rounds (least to greatest); ratios are taken pair by pair within a "
            "round. A CPU second is one of all threads of the server; it counts where other "
            "programs run, too."
        )
        return "\n\n".join([*parts, *([self.note] if self.note else [])]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plan = asdict(self.plan)
        for name in ("models", "peer_server"):
            plan[name] = None if plan[name] is None else str(plan[name])
        return {
            "plan": plan,
            "facts": dict(self.facts),
            "note": self.note,
            "measurements": [asdict(one) for one in self.measurements],
        }

    def _clients(self) -> list[str]:
        plan, rows, ratios = self.plan, [], []
        sides = list(dict.fromkeys(one.side for one in self.measurements))
        for side in sides:
            if not self.values(side, plan.together, "rate"):
                continue
            for case in ("1 client", plan.together):
                rows.append(
                    [side, case]
                    + [
                        bench.spread(self.values(side, case, what)).show(digits)
                        for what, digits in (
                            ("rate", 1),
                            ("cpu_rate", 1),
                            ("first", 3),
                            ("fair", 2),
                        )
                    ]
                )
            own = side == OURS
            fair = bench.spread(self.values(side, plan.together, "fair"))
            ratios += [
                [f"{side}: {plan.together} / 1 client", *_judged(self.more(side), _MORE, own)],
                [f"{side}: the same, by CPU seconds", *_judged(self.more(side, "cpu_rate"))],
                [f"{side}: slowest / median client", *_judged(fair, _FAIR, own)],
            ]
        if PEER in sides:
            for case in ("1 client", plan.together):
                over, under = self.values(OURS, case, "rate"), self.values(PEER, case, "rate")
                ratios.append([f"{OURS} / {PEER}, {case}", *_judged(bench.ratios(over, under))])
        return [
            f"## {plan.together}, {plan.tokens} tokens each, {plan.shapes} shapes in {plan.form}",
            markdown_table(
                [
                    "server",
                    "case",
                    "tokens/s in all",
                    "tokens a CPU second",
                    "first token, s",
                    "slowest / median",
                ],
                rows,
            ),
            markdown_table(["compared", "ratio", "target"], ratios),
        ]

    def _picture(self) -> list[str]:
        width, height = self.plan.size
        rows = [
            [case]
            + [bench.spread(self.values(OURS, case, what)).show(3) for what in ("first", "cpu")]
            for case in (FIRST, SECOND)
        ]
        return [
            f"## Two questions about one picture of {width}x{height}, {self.plan.vision} shapes",
            markdown_table(["question", "first token, s", "CPU seconds of the server"], rows),
            markdown_table(
                ["compared", "ratio", "target"],
                [
                    [f"{FIRST} / {SECOND}", *_judged(self.sooner(), _SOONER, True)],
                    ["the same, by CPU seconds", *_judged(self.sooner("cpu"))],
                ],
            ),
        ]


def _judged(found: bench.Spread, target: float = 0.0, judge: bool = False) -> list[str]:
    if not judge:
        return [found.show(), ""]
    reached = "reached" if found.median >= target else "missed"
    return [found.show(), f"{target:g}, {reached}"]


def measure(
    plan: Plan,
    *,
    progress: Callable[[int, int], None] | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> ServingBench:
    """Run the benchmark.

    Args:
        plan: What to measure.
        progress: Told the steps done and the steps in all of a part.
        told: Told what is being written.

    Raises:
        Lfm2Error: if a server fails or an answer is not whole.
    """
    facts = bench.machine(plan.threads)
    found: list[bench.Measurement] = []
    note = ""
    with ExitStack() as stack:
        folder = plan.models
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="lfm2-mm-bench-")
            folder = Path(stack.enter_context(scratch))
        if "clients" in plan.parts:
            found += _many(plan, folder, progress, told)
            if plan.peer_server is None:
                note = f"{PEER} was not measured beside: --peer-server names one."
        if "picture" in plan.parts:
            found += _twice(plan, folder, progress, told)
    return ServingBench(plan=plan, facts=facts, measurements=found, note=note)


def _environment(plan: Plan) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _ours(plan: Plan, model: Path) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "lfm2_mm", "serve", "-m", str(model.resolve()), "-q"]
    command += ["--port", str(port), "--threads", str(plan.threads)]
    command += ["--max-running", str(max(plan.clients, 2))]
    return ServerProcess(OURS, command, port, _environment(plan))


def _peer(plan: Plan, model: Path) -> ServerProcess:
    port = free_port()
    context = plan.clients * (plan.tokens + _PROMPT_ROOM)
    command = [str(plan.peer_server), "-m", str(model.resolve()), "--port", str(port)]
    command += ["--host", "127.0.0.1", "-t", str(plan.threads), "-tb", str(plan.threads)]
    command += ["-np", str(plan.clients), "-c", str(context), "--jinja"]
    return ServerProcess(PEER, command, port, _environment(plan))


# --- many clients ------------------------------------------------------------------------------


def _many(
    plan: Plan,
    folder: Path,
    progress: Callable[[int, int], None] | None,
    told: Callable[[str], None],
) -> list[bench.Measurement]:
    places = _text_models(plan, folder / f"serving-{plan.shapes}", told)
    with ExitStack() as stack:
        servers = {OURS: stack.enter_context(_ours(plan, places[plan.form]))}
        if plan.peer_server is not None:
            peer = _peer(plan, places[f"{plan.form}.gguf"])
            servers[PEER] = stack.enter_context(peer)
        asked = {side: _stories(plan, server) for side, server in servers.items()}
        cases = {"1 client": {"clients": 1}, plan.together: {"clients": plan.clients}}
        return bench.interleave(asked, cases, rounds=plan.rounds, progress=progress)


def _text_models(plan: Plan, folder: Path, told: Callable[[str], None]) -> dict[str, Path]:
    """Models whose every token has a text, so that every token is streamed."""
    config = TEXT_SHAPES[plan.shapes]
    places = write_forms(config, folder, (), gguf=False, told=told)
    _name_every_token(places["bf16"], config.vocab_size)
    peer = plan.peer_server is not None
    return write_forms(config, folder, (plan.form,), gguf=peer, told=told)


def _name_every_token(folder: Path, rows: int) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    words = content["model"]["vocab"]
    taken = {*words.values(), *(token["id"] for token in content["added_tokens"])}
    words.update({f"\u0120w{number}": number for number in range(rows) if number not in taken})
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    os.replace(scratch, path)


def _stories(
    plan: Plan, server: ServerProcess
) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a side does a case: fresh prompts each time, so that no cache answers."""
    chance = random.Random(server.name)

    def run(case: Mapping[str, Any]) -> dict[str, float]:
        bodies = [_story(plan, chance) for _ in range(case["clients"])]
        before = server.cpu_seconds()
        answers = asyncio.run(ask_together(server.port, bodies))
        cpu = server.cpu_seconds() - before
        tokens = sum(answer.tokens for answer in answers)
        spent = max(a.ended for a in answers) - min(a.began for a in answers)
        rates = [answer.rate for answer in answers]
        return {
            "tokens": tokens,
            "seconds": spent,
            "cpu": cpu,
            "rate": tokens / spent,
            "cpu_rate": tokens / cpu if cpu else math.nan,
            "first": statistics.median(answer.first - answer.began for answer in answers),
            "fair": min(rates) / statistics.median(rates),
        }

    return run


def _story(plan: Plan, chance: random.Random) -> dict[str, Any]:
    words = " ".join(chance.choice(("red", "blue", "green", "small", "large")) for _ in range(8))
    return {
        "messages": [{"role": "user", "content": f"{chance.randrange(10**6)}: a {words} circle"}],
        "max_tokens": plan.tokens,
        "temperature": 0,
        "ignore_eos": True,  # for the peer; the model has no token that would end it
        "cache_prompt": False,
    }


# --- two questions about a picture -------------------------------------------------------------


def _twice(
    plan: Plan,
    folder: Path,
    progress: Callable[[int, int], None] | None,
    told: Callable[[str], None],
) -> list[bench.Measurement]:
    model = folder / f"serving-vision-{plan.vision}"
    if not (model / "config.json").is_file():
        told("random weights with vision")
        write_checkpoint(SHAPES[plan.vision], model)
    cases = {
        FIRST: {"text": "What colour is the circle?", "fresh": True},
        SECOND: {"text": "How many squares are there?", "fresh": False},
    }
    with _ours(plan, model) as server:
        return bench.interleave(
            {OURS: _questions(plan, server)}, cases, rounds=plan.rounds, progress=progress
        )


def _questions(
    plan: Plan, server: ServerProcess
) -> Callable[[Mapping[str, Any]], Mapping[str, float]]:
    """How a question is asked: the first of a pair about a picture nobody has seen."""
    count, url = 0, ""

    def run(case: Mapping[str, Any]) -> dict[str, float]:
        nonlocal count, url
        if case["fresh"]:
            count += 1
            url = _picture_url(plan.size, count)
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": case["text"]},
        ]
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
        }
        before = server.cpu_seconds()
        answer = asyncio.run(ask(server.port, body))
        cpu = server.cpu_seconds() - before
        return {"first": answer.first - answer.began, "cpu": cpu}

    return run


def _picture_url(size: tuple[int, int], seed: int) -> str:
    """A JPEG picture of a smooth pattern, in base64."""
    from PIL import Image

    chance = random.Random(seed)
    few = Image.new("RGB", (16, 9))
    few.putdata([tuple(chance.randrange(256) for _ in range(3)) for _ in range(16 * 9)])
    content = io.BytesIO()
    few.resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
