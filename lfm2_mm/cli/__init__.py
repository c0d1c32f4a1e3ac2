"""The command line: `lfm2-mm VERB …`, click verbs over the public face.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130
interrupted. Importing this package imports no torch; a running verb does.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from lfm2_mm import __version__
from lfm2_mm.cli import (
    ask,
    chat,
    demo,
    doctor,
    models,
    plugins,
    quantize,
    serve,
    terminal,
    train,
)
from lfm2_mm.errors import Lfm2Error

__all__ = ["cli", "main"]

INTERRUPTED = 130


class Verbs(click.Group):
    """Our verbs and those of plugins, and one way to end for all of them."""

    _complete = False

    def _with_plugins(self) -> None:
        """Add what plugins bring, once; where names clash, ours stay."""
        if self._complete:
            return
        self._complete = True
        for found in plugins.installed():
            for command in found.commands:
                if command.name:
                    self.commands.setdefault(command.name, command)
            for verb in (ask.ask, chat.chat):
                taken = {name for param in verb.params for name in param.opts}
                verb.params += [o for o in found.ask_options if not taken & set(o.opts)]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, ours and those of plugins."""
        self._with_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A verb by name."""
        self._with_plugins()
        return super().get_command(ctx, cmd_name)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run, and end with an exit code and at most one sentence; no traceback reaches a user."""
        words = list(sys.argv[1:] if args is None else args)
        debug = os.environ.get("LFM2_MM_LOG", "").strip().lower() == "debug"
        extra["standalone_mode"] = False
        try:
            if not {"-q", "--quiet"} & set(words):
                for found in plugins.installed():
                    if found.error:
                        terminal.warn(f"{found.error}; run lfm2-mm doctor for more")
            code = super().main(words, *rest, **extra)
            sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            terminal.say("interrupted")
            code = INTERRUPTED
        except click.ClickException as error:
            terminal.fail(" ".join(error.format_message().split()))
            if isinstance(error, click.UsageError) and error.ctx is not None:
                terminal.say(f"{error.ctx.command_path} --help explains")
            code = error.exit_code
        except BrokenPipeError:
            _forget_stdout()
            code = 1
        except Exception as error:
            code = 1
            if debug:
                traceback.print_exc()
            terminal.fail(_sentence(error))
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    """What went wrong, for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, Lfm2Error):
        return text
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename else ""
        return f"the system refused{where}: {error.strerror}; check the path, rights and free space"
    kind = type(error).__name__
    text = text[:300] + "…" if len(text) > 300 else text
    return (
        f"something unexpected happened ({kind}: {text}); set LFM2_MM_LOG=debug for the traceback"
    )


def _forget_stdout() -> None:
    """Nobody reads any more: let the interpreter's last flush go nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no real file, or closed
        pass


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Answers go to stdout, everything else to stderr. `lfm2-mm VERB --help` says more.",
)
@click.version_option(__version__, prog_name="lfm2-mm")
def cli() -> None:
    """Ask about images, chat, and look after the LFM2 models on this machine.

    \b
    lfm2-mm demo                                     see it work, without a network
    lfm2-mm ask photo.jpg "What is this?"
    lfm2-mm chat -m LiquidAI/LFM2.5-VL-450M
    """  # noqa: D301


for _verb in (
    ask.ask,
    chat.chat,
    demo.demo,
    doctor.doctor,
    models.models,
    quantize.quantize,
    serve.serve,
    train.train,
):
    cli.add_command(_verb)


def main() -> NoReturn:
    """The program `lfm2-mm`."""
    terminal.silence_libraries()
    cli.main(prog_name="lfm2-mm")
