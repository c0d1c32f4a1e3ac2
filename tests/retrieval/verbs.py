"""Runs the command line in this process with the retrieval plug-in, installed or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from lfm2_mm.cli import Verbs, plugins
from lfm2_mm.cli.ask import ask
from lfm2_mm.cli.chat import chat

Run = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs `lfm2-mm` with these words."""
    found = plugins.installed()
    if not any(one.name == "retrieval" for one in found):
        from lfm2_retrieval.commands import plugin

        point = SimpleNamespace(name="retrieval", value="in these tests", load=lambda: plugin)
        both = (*found, plugins._load(point))
        monkeypatch.setattr(plugins, "installed", lambda: both)
    monkeypatch.setenv("LFM2_MM_THREADS", "1")
    verbs = [copy.copy(verb) for verb in (ask, chat)]
    for verb in verbs:
        options: list[click.Parameter] = [o for f in plugins.installed() for o in f.ask_options]
        own = {name for param in verb.params for name in param.opts}
        verb.params = [*verb.params, *(o for o in options if not own & set(o.opts))]
    group = Verbs("lfm2-mm", commands={str(verb.name): verb for verb in verbs})

    def run(*args: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(group, [str(arg) for arg in args], input=stdin)

    return run


def sentence(result: Result) -> str:
    """The one sentence of a failure."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


def write_documents(folder: Path) -> Path:
    """Four documents, one of them a table of two rows, and one that cannot be read."""
    folder.mkdir()
    (folder / "manual").mkdir()
    texts: dict[str, Any] = {
        "manual/bremse.txt": "Die Bremse am Fahrrad quietscht. Man muss sie ölen und einstellen.\n",
        "brake.md": "# The brake\n\nWhen the brake squeals, clean the rim and the pads.\n",
        "plants.csv": "name,care\nCactus,water it once a month\nBasil,water it every day\n",
        "library.txt": "La biblioteca abre a las nueve y cierra a las ocho.\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "noise.txt").write_bytes(bytes(range(256)) * 8)
    return folder
