"""`ask --batch`: one answer line per question line, resumable, durable line by line.

A question line is known by the hash of its content, so that a second run answers only what has no
answer yet. Knows JSONL and the public face; no modality.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.options import generation, load_model
from lfm2_mm.cli.sources import Attachment, encoders, noun
from lfm2_mm.cli.turn import attachments_info, question_prompt, result
from lfm2_mm.errors import InputError, Lfm2Error

if TYPE_CHECKING:
    from lfm2_mm.model import Model

__all__ = ["run_batch"]

_OPENING = b'{"line": '


@dataclass(frozen=True)
class _Line:
    """A question line: its number from 1, its bytes, and what tells it from others."""

    number: int
    raw: bytes
    key: str

    def parse(self) -> dict[str, Any]:
        """Its fields.

        Raises:
            InputError: if it is no JSON object.
        """
        try:
            found = json.loads(self.raw)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"line {self.number} is not JSON ({error}); write one object on each line"
            ) from None
        if not isinstance(found, dict):
            raise InputError(
                f"line {self.number} holds a JSON {type(found).__name__}; write an object such as "
                '{"image": "a.png", "question": "What is this?"}'
            )
        return found

    def names(self) -> dict[str, Any]:
        """What an answer line begins with."""
        try:
            given = self.parse().get("id")
        except InputError:
            given = None
        return {"line": self.number, **({} if given is None else {"id": given}), "hash": self.key}


def run_batch(params: dict[str, Any]) -> None:
    """Answer every line that has no answer yet; exit 1 if a line failed.

    Raises:
        InputError: if the answers file belongs to something else.
    """
    source: Path = params["batch"]
    target: Path = params["output"]
    lines = _read_lines(source)
    if not lines:
        raise InputError(f"{str(source)!r} holds no question; write one JSON object on each line")
    if not target.absolute().parent.is_dir():
        raise InputError(f"there is no folder for {str(target)!r}; make it, or correct the path")
    if target.exists() and target.samefile(source):
        raise InputError(f"{str(target)!r} is the file of the questions; give another one with -o")
    earlier = _read_records(target)
    keys = {line.key for line in lines}
    if earlier and not any(record["hash"] in keys for record in earlier):
        raise InputError(
            f"{str(target)!r} holds answers to other questions; give another file with -o"
        )
    done = {r["hash"]: r for r in earlier if r["hash"] in keys and "error" not in r}
    waiting = [line for line in lines if line.key not in done]
    failed = 0
    if waiting:
        model = load_model(params)
        if other := sorted({str(r.get("model")) for r in done.values()} - {model.name}):
            raise InputError(
                f"{str(target)!r} holds answers of {other[0]}, not of {model.name}; "
                "give another file with -o"
            )
        _tidy(target, lines, done)
        try:
            failed = _answer_all(model, waiting, len(lines), source.parent, target, params)
        finally:
            _tidy(target, lines, {r["hash"]: r for r in _read_records(target)})
    else:
        _tidy(target, lines, done)
    counts = {"answered": len(waiting) - failed, "skipped": len(done), "failed": failed}
    if params["as_json"]:
        terminal.print_json({"lines": len(lines), **counts, "output": str(target)})
    words = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    told = f"{words} of {terminal.count(len(lines), 'line')}: {target}"
    terminal.say(told, quiet=params["quiet"])
    if failed:
        raise click.exceptions.Exit(1)


def _read_lines(source: Path) -> list[_Line]:
    """The question lines, blank ones left out; equal ones are told apart by their order."""
    seen: dict[bytes, int] = {}
    found = []
    for number, row in enumerate(source.read_bytes().split(b"\n"), 1):
        raw = row.strip().removeprefix(b"\xef\xbb\xbf")
        if not raw:
            continue
        nth = seen[raw] = seen.get(raw, 0) + 1
        digest = hashlib.sha256(raw).hexdigest()[:16]
        found.append(_Line(number, raw, digest if nth == 1 else f"{digest}-{nth}"))
    return found


def _read_records(target: Path) -> list[dict[str, Any]]:
    """Answer lines of an earlier run, as they lie; a torn last line is left out.

    Raises:
        InputError: if the file holds anything else.
    """
    if not target.exists():
        return []
    *rows, torn = target.read_bytes().split(b"\n")
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        try:
            record = json.loads(row)
        except (ValueError, RecursionError):
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("hash"), str)):
            raise InputError(
                f"{str(target)!r} exists and its line {number} was not written by --batch; "
                "give another file with -o"
            )
        found.append(record)
    if not found and torn[: len(_OPENING)] != _OPENING[: len(torn)]:
        raise InputError(
            f"{str(target)!r} exists and was not written by --batch; give another file with -o"
        )
    return found


def _tidy(target: Path, lines: Sequence[_Line], records: dict[str, dict[str, Any]]) -> None:
    """Make the file hold these records, one for each question line and in their order."""
    rows = [
        _encoded({**records[line.key], "line": line.number})
        for line in lines
        if line.key in records
    ]
    if (target.read_bytes() if target.exists() else b"") == b"".join(rows):
        return
    part = target.with_name(target.name + ".part")
    with part.open("wb") as file:
        file.writelines(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _answer_all(
    model: Model,
    waiting: Sequence[_Line],
    total: int,
    base: Path,
    target: Path,
    params: dict[str, Any],
) -> int:
    """Answer and write line by line; the number of those that failed."""
    options = generation(model, params)
    failed = 0
    with target.open("ab") as file, _progress(total, total - len(waiting), params["quiet"]) as tick:
        for line in waiting:
            record = line.names()
            try:
                record |= _answer(model, line, base, options, params)
            except Exception as error:  # of whatever kind: the other lines go on
                kind = "" if isinstance(error, Lfm2Error) else f"{type(error).__name__}: "
                record["error"] = kind + " ".join(str(error).split())
                failed += 1
            file.write(_encoded(record))
            file.flush()
            os.fsync(file.fileno())
            tick()
    return failed


def _answer(
    model: Model, line: _Line, base: Path, options: dict[str, Any], params: dict[str, Any]
) -> dict[str, Any]:
    began = time.perf_counter()
    fields = line.parse()
    question, system = fields.get("question"), fields.get("system", params["system"])
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"line {line.number} has the question {question!r}; give a text")
    if not isinstance(system, str | None):
        raise InputError(f"line {line.number} has the system message {system!r}; give a text")
    limit = fields.get("max_tokens", options["max_tokens"])
    if type(limit) is not int or limit < 1:
        raise InputError(f"line {line.number} has max_tokens {limit!r}; give a number from 1 on")
    attachments = _attachments(model, line.number, fields, base)
    for attachment in attachments:
        attachment.check()
    seen = {**params, "attachments": attachments, "line": line.number}
    prompt = question_prompt(model, question, attachments, seen, system=system)
    plugins.tell("after_prompt", model, prompt, seen)
    answer = model.generate(prompt, began=began, **{**options, "max_tokens": limit}).answer
    plugins.tell("after_answer", model, prompt, str(answer), seen)
    return result(model, answer, attachments_info(model, prompt, attachments), seen)


def _attachments(model: Model, number: int, fields: dict[str, Any], base: Path) -> list[Attachment]:
    """What a line is about: under the name of a kind (`image`), or its plural with a list."""
    kinds = [noun(encoder) for encoder in encoders(model)] or ["image"]
    found = []
    for kind in kinds:
        given = fields.get(f"{kind}s")
        several = [] if given is None else given if isinstance(given, list) else [given]
        for item in ([] if fields.get(kind) is None else [fields[kind]]) + several:
            if not isinstance(item, str) or not item:
                raise InputError(f"line {number} names the {kind} {item!r}; give a path or a URL")
            found.append(Attachment(item, base=base))
    return found


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    """A bar with rate and time left on the terminal; nothing elsewhere."""
    if quiet or not terminal.is_terminal(sys.stderr):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began, n = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done, rate="")

        def tick() -> None:
            nonlocal n
            n += 1
            rate = n / (time.perf_counter() - began)
            bar.update(
                task, advance=1, rate=f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
            )

        yield tick
