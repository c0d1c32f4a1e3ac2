from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lfm2_mm import __version__
from lfm2_mm.cli import cli

VERBS = ("ask", "chat", "demo", "doctor", "models", "search", "train")
HEAVY = ("torch", "transformers", "huggingface_hub", "tokenizers", "rich", "llguidance")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from lfm2_mm.cli import cli\n"
        "for args in (['--help'], ['ask', '--help'], ['chat', '--help'], ['train', '--help']):\n"
        "    try:\n"
        "        cli.main(args, prog_name='lfm2-mm')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "--max-image-tokens" in done.stdout  # the plugin's options are among them
    assert done.stderr == ""


def test_module_runs_and_says_its_version(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lfm2_mm", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == f"lfm2-mm, version {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    for option in ("--json", "--quiet") + (() if verb == "train" else ("--model",)):
        assert option in result.stdout


@pytest.mark.parametrize("words", [[], ["ask"], ["train"], ["search"], ["index", "add"]])
def test_help_keeps_examples_on_lines_of_their_own(words: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*words, "--help"]).stdout
    assert "\\b" not in shown and "\b" not in shown
    if words != ["index", "add"]:
        assert any(line.startswith(f"  lfm2-mm {' '.join(words)}") for line in shown.splitlines())


def test_a_mistyped_verb_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["aks", "photo.jpg", "what?"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "'aks'" in result.stderr and "ask" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ask"], "no question"),
        (["ask", "   "], "the question is empty"),
        (["ask", "--nope", "q"], "--nope"),
        (["ask", "-", "-"], "only one argument can be -"),
        (["ask", "--json-schema", "{}", "--regex", "a", "q"], "exclude each other"),
        (["ask", "--batch", __file__], "--batch needs -o FILE"),
        (["ask", "--batch", __file__, "-o", "x", "word"], "leave out"),
        (["ask", "-o", "x", "q"], "-o belongs to --batch"),
        (["ask", __file__], "no question about"),
        (["ask", "--max-tokens", "0", "q"], "max-tokens"),
        (["train"], "RECIPE"),
    ],
)
def test_wrong_usage_exits_2_with_one_sentence(args: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ") and says in first
    assert len(rest) == 1 and rest[0].endswith("--help explains")
