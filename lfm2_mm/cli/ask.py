"""`lfm2-mm ask`: one question, about attachments or about nothing; or many of them from a file.

Streams the answer, or prints one JSON object. Knows no modality: attachments go to whichever
encoder claims them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.batch import run_batch
from lfm2_mm.cli.options import (
    common_options,
    generation,
    kv_cache_option,
    load_model,
    model_options,
    sampling_options,
)
from lfm2_mm.cli.sources import Attachment
from lfm2_mm.cli.turn import attachments_info, question_prompt, result, summary
from lfm2_mm.errors import InputError
from lfm2_mm.fetch import is_url

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = ["ask"]


@click.command(short_help="Answer a question, about images or about nothing.")
@click.argument("words", nargs=-1, metavar='[ATTACHMENT]… "QUESTION"')
@common_options
@model_options
@kv_cache_option
@sampling_options
@click.option("--json-schema", metavar="FILE|JSON", help="The answer is JSON of this schema.")
@click.option("--regex", metavar="PATTERN", help="The answer matches this regular expression.")
@click.option(
    "--batch",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Answer every line of a JSONL file instead; needs -o.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where --batch writes its answers; a second run goes on there.",
)
def ask(words: tuple[str, ...], **params: Any) -> None:
    """Answer QUESTION, which is the last argument; those before it are what it is about.

    An ATTACHMENT is a file, a URL, or - for standard input. `<image>` inside the question says
    where an image belongs; else images come first. A question of - is read from standard input.

    \b
    lfm2-mm ask photo.jpg "What is this?"
    lfm2-mm ask before.png after.png "What has changed?"
    curl -s https://example.org/cat.jpg | lfm2-mm ask - "Which animal is this?"
    lfm2-mm ask --batch questions.jsonl -o answers.jsonl

    A line of a batch is {"question": …, "image": … or "images": […], "id"?, "system"?,
    "max_tokens"?}; relative paths start at the file's folder.
    """  # noqa: D301
    if params["json_schema"] is not None and params["regex"] is not None:
        raise click.UsageError("--json-schema and --regex exclude each other: give one of them")
    if params["batch"] is not None:
        if words:
            raise click.UsageError(f"--batch takes its questions from the file: leave out {words}")
        if params["output"] is None:
            raise click.UsageError("--batch needs -o FILE for its answers")
        run_batch(params)
        return
    if params["output"] is not None:
        raise click.UsageError("-o belongs to --batch: redirect the answer with > instead")
    attachments, question = _split(words)
    for attachment in attachments:
        attachment.check()
    model = load_model(params)
    _answer(model, question, attachments, params)


def _split(words: Sequence[str]) -> tuple[list[Attachment], str]:
    """What the arguments mean."""
    if not words:
        raise click.UsageError('no question: lfm2-mm ask photo.jpg "What is this?"')
    *given, question = words
    if not given and (is_url(question) or _is_file(question)):
        raise click.UsageError(f'no question about {question}: add one, such as "What is this?"')
    if question == "-":
        if "-" in given:
            raise click.UsageError("only one argument can be - : standard input is read once")
        question = _question_from_input()
    if not question.strip():
        raise click.UsageError("the question is empty: the last argument must say something")
    return [Attachment(item) for item in given], question


def _is_file(text: str) -> bool:
    try:
        return text == "-" or Path(text).is_file()
    except (OSError, ValueError):  # too long or too odd for a path
        return False


def _question_from_input() -> str:
    if terminal.is_terminal(sys.stdin):
        raise InputError(
            "nothing is piped in, but the question is '-'; pipe a text or write it out"
        )
    try:
        return sys.stdin.buffer.read(1 << 20).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise InputError(
            "standard input holds no text, but the last argument '-' is the question; "
            "put '-' first if an image is piped in"
        ) from None


def _answer(
    model: Model, question: str, attachments: Sequence[Attachment], params: dict[str, Any]
) -> None:
    began = time.perf_counter()
    seen = {**params, "attachments": list(attachments)}
    prompt = question_prompt(model, question, attachments, seen, system=params["system"])
    plugins.tell("after_prompt", model, prompt, seen)
    stream = model.generate(prompt, began=began, **generation(model, params))
    if params["as_json"]:
        answer = stream.answer
        found = attachments_info(model, prompt, attachments)
        terminal.print_json(result(model, answer, found, seen))
    else:
        out = terminal.Answers(thinking=prompt.thinking_open, quiet=params["quiet"])
        try:
            for piece in stream:
                out.write(piece)
        finally:
            out.close()
        answer = stream.answer
    if answer.done.finish_reason == "length" and not params["as_json"]:
        terminal.dim(
            f"cut at {params['max_tokens']} tokens; --max-tokens allows more", quiet=params["quiet"]
        )
    terminal.dim(summary(model, prompt, answer.done), quiet=params["quiet"])
    plugins.tell("after_answer", model, prompt, str(answer), seen)
