"""Runs the command line in this process with the audio plug-in, installed or not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from lfm2_mm.cli import Verbs, plugins

Run = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs `lfm2-mm` with these words; `stdin` may be text or bytes."""
    found = plugins.installed()
    if not any(one.name == "audio" for one in found):
        from lfm2_audio.commands import plugin

        point = SimpleNamespace(name="audio", value="in these tests", load=lambda: plugin)
        both = (*found, plugins._load(point))
        monkeypatch.setattr(plugins, "installed", lambda: both)
    monkeypatch.setenv("LFM2_MM_THREADS", "1")
    group = Verbs("lfm2-mm")

    def run(*args: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(group, [str(arg) for arg in args], input=stdin)

    return run


def sentence(result: Result) -> str:
    """The one sentence of a failure."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")
