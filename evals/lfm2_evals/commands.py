"""The verbs `eval` and `bench`: what a model gets right, and how soon.

Found by the command line through the entry point `lfm2_mm.commands`; imports no torch until a verb
runs. Knows the options and the order of things; what is measured, others know.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_evals.bench.audio_verb import audio_command
from lfm2_evals.bench.encoding import encoding_command
from lfm2_evals.bench.text import text_command
from lfm2_evals.bench.verbs import retrieval_command, serving_command
from lfm2_mm.cli import terminal
from lfm2_mm.cli.options import common_options, load_model, model_options
from lfm2_mm.errors import InputError

if TYPE_CHECKING:
    from lfm2_evals.quantization import QuantizationReport
    from lfm2_evals.report import Report
    from lfm2_evals.retrieval_report import RetrievalReport
    from lfm2_evals.speech import Run as SpeechRun
    from lfm2_evals.speech_answers import AnswerRun
    from lfm2_evals.speech_report import SpeechReport
    from lfm2_evals.task import Run

__all__ = ["plugin"]

TIER_NAMES = ("core", "wordings", "more-shapes", "small", "signs", "describe")
TASKS = {
    "scenes": TIER_NAMES,
    "quantization": ("divergence", "answers", "rankings", "speech"),
    "retrieval": ("packages", "frames"),
    "speech": ("voices", "sentences", "both", "aloud", "judged", "answers", "reworded", "again"),
}
"""Tasks, with the parts that each has; the first is the default."""


@contextmanager
def _bar(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, only where a person reads it."""
    if quiet or not terminal.is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@click.command("eval")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK…")
@common_options
@model_options
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Scenes or utterances per tier; candidates per direction.",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice([*(tier for tiers in TASKS.values() for tier in tiers), "all"]),
    help="Part of the task; may be repeated.  [default: core; packages; voices]",
)
@click.option("--seed", type=int, help="Names the scenes.  [default: the published ones]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report, JSON and chart.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="JSON of an earlier run, compared question by question.",
)
def evaluate(tasks: tuple[str, ...], **params: Any) -> None:
    """Score a model on what its training never showed, beside a baseline that cannot know it.

    TASK is `scenes`: questions about drawn scenes, each asked alone, scored by exact match, beside
    a guesser who sees no picture; or `retrieval`: recall@1 of a thousand texts across languages,
    beside character trigrams (-m names a retriever; nano-colbert without); or `speech`: word error
    rate on synthetic voices and sentences held out, beside one who does not listen (wants
    espeak-ng; nano-audio without -m); or `quantization`: what changes when the embedded models are
    packed in 4 or 8 bits, beside llama.cpp's rounding. With 95 % intervals.

    \b
    lfm2-mm eval scenes
    lfm2-mm eval retrieval
    lfm2-mm eval speech --tier all --count 300
    lfm2-mm eval quantization --tier answers --count 60
    lfm2-mm eval scenes --tier all --count 300 --out report
    lfm2-mm eval scenes -m ./my-model --against report/scenes.json
    """  # noqa: D301
    for name in tasks:
        if name not in TASKS:
            raise click.BadParameter(
                f"there is no task {name!r}; the tasks are {', '.join(TASKS)}", param_hint="TASK"
            )
    known = {tier for name in tasks for tier in TASKS[name]}
    if strange := [tier for tier in params["tiers"] if tier not in known | {"all"}]:
        raise click.BadParameter(
            f"{', '.join(tasks)} has no tier {strange[0]!r}; it has {', '.join(sorted(known))}",
            param_hint="--tier",
        )
    if params["against"] is not None and "scenes" not in tasks:
        raise click.BadParameter("only scenes can be compared with", param_hint="--against")
    earlier = None if params["against"] is None else _earlier(params["against"])
    finished = True
    for name in dict.fromkeys(tasks):
        report: Report | RetrievalReport | SpeechReport | QuantizationReport
        if name == "scenes":
            report, complete = _scenes(params, earlier)
        elif name == "speech":
            report, complete = _speech(params)
        elif name == "quantization":
            report, complete = _quantization(params), True
        else:
            report, complete = _retrieval(params)
        if params["as_json"]:
            terminal.print_json(report.to_dict())
        else:
            click.echo(report.markdown(), nl=False)
        if params["out"] is not None:
            for path in report.write(params["out"], name):
                terminal.say(f"wrote {path}", quiet=params["quiet"])
        finished = finished and complete
        if not complete:
            break
    if not finished:
        raise KeyboardInterrupt


def _tiers(params: dict[str, Any], task: str) -> list[str]:
    """The tiers of a task that were asked for; its first without a word."""
    known = TASKS[task]
    chosen = [tier for tier in known if tier in params["tiers"]]
    return list(known) if "all" in params["tiers"] else chosen or [known[0]]


def _retrieval(params: dict[str, Any]) -> tuple[RetrievalReport, bool]:
    from lfm2_evals.retrieval import Directions, evaluate
    from lfm2_evals.retrieval_report import RetrievalReport
    from lfm2_retrieval.reranking import DEFAULT_MODEL, load_encoder

    name = params["model"] or DEFAULT_MODEL
    flags = {flag: params[flag] for flag in ("device", "dtype", "threads", "quantize")}
    with terminal.working(f"loading {name}", quiet=params["quiet"]):
        encoder = load_encoder(name, **flags)
    runs = []
    for tier in _tiers(params, "retrieval"):
        directions = Directions(tier, count=params["count"])
        with _bar(f"retrieval/{tier}", quiet=params["quiet"]) as progress:
            runs.append(evaluate(directions, encoder, progress=progress))
        if not runs[-1].complete:
            break
    seconds = sum(one.seconds for one in runs)
    facts = {
        "command": shlex.join(["lfm2-mm", *sys.argv[1:]]),
        "model": encoder.name,
        "candidates": f"{params['count']} a direction",
        "time": f"{seconds:.0f} s for {sum(len(one.found) for one in runs)} directions",
    }
    return RetrievalReport(facts=facts, runs=runs), all(one.complete for one in runs)


def _quantization(params: dict[str, Any]) -> QuantizationReport:
    from lfm2_evals.quantization import QuantizationReport, evaluate

    began = time.perf_counter()
    with _bar("quantization", quiet=params["quiet"]) as progress:
        rows = evaluate(
            _tiers(params, "quantization"),
            count=params["count"],
            threads=params["threads"],
            progress=progress,
        )
    facts = {
        "command": shlex.join(["lfm2-mm", *sys.argv[1:]]),
        "items": f"{params['count']} scenes, queries, candidates, utterances",
        "time": f"{time.perf_counter() - began:.0f} s",
    }
    return QuantizationReport(facts=facts, rows=rows)


def _speech(params: dict[str, Any]) -> tuple[SpeechReport, bool]:
    from lfm2_audio.opening import load_audio_model
    from lfm2_evals.speech import aloud, evaluate, utterances
    from lfm2_evals.speech_answers import ANSWER_TIERS, evaluate_answers, questions
    from lfm2_evals.speech_report import SpeechReport

    model, count, quiet = load_audio_model(params), params["count"], params["quiet"]
    runs, answers, read = [], [], None
    every: list[SpeechRun | AnswerRun] = []
    tiers = _tiers(params, "speech")
    if "all" in params["tiers"] and not _has_judge():  # asked for by name, they say what is missing
        tiers = [tier for tier in tiers if tier not in {"judged", *ANSWER_TIERS}]
    for tier in tiers:
        with terminal.working(f"speaking speech/{tier}", quiet=quiet):
            if tier in ANSWER_TIERS:
                asked = questions(tier, count)
            elif tier in ("aloud", "judged"):
                spoken = read = read or aloud(model, count)
            else:
                spoken = utterances(tier, count)
        with _bar(f"speech/{tier}", quiet=quiet) as progress:
            if tier in ANSWER_TIERS:
                answers.append(evaluate_answers(tier, model, _judge(), asked, progress=progress))
                every.append(answers[-1])
            else:
                ears = _judge() if tier == "judged" else model
                runs.append(evaluate(tier, ears, spoken, progress=progress))
                every.append(runs[-1])
        if not every[-1].complete:
            break
    seconds = sum(one.seconds for one in every)
    facts = {
        "command": shlex.join(["lfm2-mm", *sys.argv[1:]]),
        "model": f"{model.name} ({str(model.dtype).removeprefix('torch.')})",
        "utterances": f"{count} a set",
        "time": f"{seconds:.0f} s",
    }
    report = SpeechReport(facts=facts, runs=runs, answers=answers)
    return report, all(one.complete for one in every)


def _has_judge() -> bool:
    from lfm2_audio.nano_judge import FILE
    from lfm2_mm.locate import locate

    return (locate("nano-audio").folder / FILE).is_file()


def _judge() -> Any:
    """The second recogniser, which ships with nano-audio."""
    from lfm2_audio.nano_judge import load_judge
    from lfm2_mm.locate import locate

    return load_judge(locate("nano-audio").folder)


def _scenes(params: dict[str, Any], earlier: dict[str, bool] | None) -> tuple[Report, bool]:
    from lfm2_evals.report import Report, Section
    from lfm2_evals.scenes import SEED, Scenes, scores, slices
    from lfm2_evals.task import run

    names = _tiers(params, "scenes")
    seed = SEED if params["seed"] is None else params["seed"]
    model = load_model(params)
    sections, runs = [], []
    for name in names:
        task = Scenes(name, count=params["count"], seed=seed)
        with _bar(task.name, quiet=params["quiet"]) as progress:
            runs.append(run(task, model, progress=progress))
        answers = runs[-1].outcomes
        sections.append(
            Section(
                name=name,
                title=task.tier.title,
                scores=scores(task.tier, answers),
                slices=slices(task.tier, answers) if answers else {},
                complete=runs[-1].complete,
            )
        )
        if not runs[-1].complete:
            break
    seconds = sum(one.seconds for one in runs)
    asked = sum(len(one.outcomes) for one in runs)
    facts = {
        "command": shlex.join(["lfm2-mm", *sys.argv[1:]]),
        "model": f"{model.name} ({str(model.dtype).removeprefix('torch.')})",
        "scenes": f"{params['count']} a tier, held-out split, seed {seed}",
        "time": f"{seconds:.0f} s for {asked} questions",
    }
    notes = [
        "Exact match, each question asked alone, greedy. 95 %: Wilson interval. Blind: the most "
        "frequent answer given the question only, learnt from training questions, on the same "
        "questions."
    ]
    if earlier is not None:
        notes.append(_compared(runs, earlier))
    details = {"outcomes": {one.task: [o.to_dict() for o in one.outcomes] for one in runs}}
    report = Report(
        title="Held-out scenes", facts=facts, sections=sections, notes=notes, details=details
    )
    return report, all(one.complete for one in runs)


def _key(task: str, outcome: dict[str, Any]) -> str:
    return json.dumps([task, outcome["tags"].get("scene"), outcome["question"]])


def _earlier(path: Path) -> dict[str, bool]:
    """Which questions an earlier run got right."""
    try:
        outcomes = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
        return {_key(task, o): bool(o["right"]) for task, group in outcomes.items() for o in group}
    except OSError as error:
        why = error.strerror
    except (ValueError, KeyError, TypeError, AttributeError):
        why = "it is no report of this program"
    raise InputError(
        f"{str(path)!r} cannot be compared with ({why}); name the JSON that eval --out wrote"
    )


def _compared(runs: Sequence[Run], earlier: dict[str, bool]) -> str:
    from lfm2_evals.stats import compare

    pairs = [
        (earlier[key], outcome.right)
        for one in runs
        for outcome in one.outcomes
        if (key := _key(one.task, outcome.to_dict())) in earlier
    ]
    if not pairs:
        return "\nNo question was also asked in the earlier run."
    before, now = zip(*pairs, strict=True)
    found = compare(before, now)
    return (
        f"\nAgainst the earlier run, on {found.n} common questions: {100 * found.first:.1f} % "
        f"then, {100 * found.second:.1f} % now; difference {found.difference} points (95 %, "
        f"paired bootstrap), exact McNemar p = {found.p:.2g}."
    )


@click.group("bench")
def bench() -> None:
    """Measure speed beside named peers, in the same minutes."""


@bench.command("vision")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--images",
    default="256x256,512x512,1920x1080",
    show_default=True,
    metavar="WxH,…",
    help="Sizes of the image files.",
)
@click.option(
    "--shapes",
    type=click.Choice(["450m", "450m-2.5", "tiny"]),
    default="450m",
    show_default=True,
    help="Whose shapes the random weights have.",
)
@click.option(
    "--peer-python",
    default=".venv-interop/bin/python",
    show_default=True,
    metavar="PATH",
    help="Interpreter with transformers and torchvision.",
)
@click.option(
    "--quantize",
    type=click.Choice(["none", "int4", "int8"]),
    default="none",
    show_default=True,
    help="How our weights are packed; transformers computes in bf16.",
)
@click.option("--alone", is_flag=True, help="Measure ours only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report and JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
def vision(
    rounds: int,
    threads: int,
    images: str,
    shapes: str,
    peer_python: str,
    quantize: str,
    alone: bool,
    as_json: bool,
    out: Path | None,
    quiet: bool,
) -> None:
    """Time to first token about image files, beside transformers.

    Random weights at one shape, in bf16 or ours packed, the same image files, questions and
    threads; the two answer in turns. Wants a quiet machine and some minutes.
    """
    from lfm2_evals.bench.vision import Plan, measure, parse_sizes
    from lfm2_evals.report import write_files

    plan = Plan(
        shapes=shapes,
        sizes=parse_sizes(images),
        rounds=rounds,
        threads=threads,
        quantize=quantize,
        peer_python=None if alone else peer_python,
    )
    with _bar("questions", quiet=quiet) as progress:
        result = measure(plan, progress=progress)
    text = result.markdown()
    if as_json:
        terminal.print_json(result.to_dict())
    else:
        click.echo(text, nl=False)
    if out is not None:
        content = json.dumps(result.to_dict(), indent=1) + "\n"
        for path in write_files(out, {"bench-vision.md": text, "bench-vision.json": content}):
            terminal.say(f"wrote {path}", quiet=quiet)


bench.add_command(retrieval_command(_bar))
bench.add_command(encoding_command(_bar))
bench.add_command(text_command(_bar))
bench.add_command(audio_command(_bar))
bench.add_command(serving_command(_bar))


class _Plugin:
    """What the command line finds."""

    commands = (evaluate, bench)


plugin = _Plugin()
