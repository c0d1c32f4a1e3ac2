"""`lfm2-mm chat`: a conversation in the terminal, or one turn per line of standard input.

Lines that begin with `/` are commands; those that attach something are named after what the model
reads (`/image`). The engine's prefix cache makes follow-up questions quick. Knows no modality.
"""

from __future__ import annotations

import difflib
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.options import (
    common_options,
    generation,
    kv_cache_option,
    load_model,
    model_options,
    sampling_options,
)
from lfm2_mm.cli.sources import Attachment, encoders, noun
from lfm2_mm.cli.turn import attachments_info, result, summary
from lfm2_mm.errors import InputError, Lfm2Error

if TYPE_CHECKING:
    from lfm2_mm.model import Model, Stream

__all__ = ["chat"]

_COMMANDS = {
    "/clear": "forget the conversation",
    "/system TEXT": "set the instruction that precedes it; without TEXT remove it",
    "/save FILE": "write the conversation as JSON",
    "/stats": "what it took so far",
    "/help": "this list",
    "/exit": "leave (so does Ctrl-D)",
}


@click.command(short_help="Talk with a model in the terminal.")
@common_options
@model_options
@kv_cache_option
@sampling_options
def chat(**params: Any) -> None:
    """Talk with a model; /help lists what can be typed beside questions.

    Ctrl-C stops an answer, Ctrl-D ends the conversation. When standard input is no terminal, each
    of its lines is one turn.
    """
    model = load_model(params)
    conversation = Conversation(model, params)
    person = terminal.is_terminal(sys.stdin)
    if person:
        _use_history()
        keys = "Ctrl-C stops an answer, Ctrl-D ends"
        terminal.say(f"{model.name}: /help lists commands; {keys}", quiet=params["quiet"])
    failed = False
    for line in _lines(person):
        try:
            if conversation.take(line):
                break
        except Lfm2Error as error:
            failed = True
            terminal.fail(" ".join(str(error).split()))
    if failed and not person:
        raise click.exceptions.Exit(1)


class Conversation:
    """Messages so far, attachments that wait for the next question, and how to go on.

    Attributes:
        turns: Role, text and attachments of each message.
    """

    def __init__(self, model: Model, params: dict[str, Any]) -> None:
        self.model, self.params = model, params
        self.quiet = bool(params["quiet"])
        self.system: str | None = params["system"]
        self.turns: list[tuple[str, str, list[Attachment]]] = []
        self.waiting: list[Attachment] = []
        self.options = generation(model, params)
        self.answers = self.tokens = 0
        self.last = ""
        self.kinds = [noun(encoder) for encoder in encoders(model)]

    def take(self, line: str) -> bool:
        """Do what a line says; True if it ends the conversation.

        Raises:
            Lfm2Error: if it cannot be done; the conversation is then as it was.
        """
        line = line.strip()
        if not line:
            return False
        if not line.startswith("/"):
            self._ask(line)
            return False
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit"):
            return True
        if word[1:] in self.kinds:
            self._attach(rest, word)
        elif word == "/clear":
            self.turns, self.waiting = [], []
            terminal.say("the conversation is forgotten", quiet=self.quiet)
        elif word == "/system":
            self.system = rest or None
            terminal.say("instruction set" if rest else "instruction removed", quiet=self.quiet)
        elif word == "/save":
            self._save(rest)
        elif word == "/stats":
            spent = f"{terminal.count(self.answers, 'answer')}, {self.tokens:,} tokens generated"
            terminal.say(f"{spent}\n{self.last}" if self.last else spent)
        elif word == "/help":
            terminal.say(self._help())
        else:
            raise InputError(self._unknown(word))
        return False

    def _help(self) -> str:
        rows = {
            f"/{kind} PATH|URL": f"attach an {kind} to the next question" for kind in self.kinds
        }
        return "\n".join(f"  {name:<18}{text}" for name, text in (rows | _COMMANDS).items())

    def _unknown(self, word: str) -> str:
        names = [*(f"/{kind}" for kind in self.kinds), *(name.split()[0] for name in _COMMANDS)]
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"there is no command {word}; {hint}there are {', '.join(names)}"

    def _attach(self, given: str, word: str) -> None:
        if not given:
            raise InputError(f"{word} needs a path or a URL: {word} photo.jpg")
        attachment = Attachment(_unquoted(given))
        attachment.check()
        encoder = next(e for e in encoders(self.model) if noun(e) == word[1:])
        attachment.kind = word[1:]
        prepared = encoder.prepare({"type": attachment.kind, attachment.kind: attachment.open()})
        self.waiting.append(attachment)
        size = prepared.info.get("size")
        shape = f"{'x'.join(map(str, size))}, " if isinstance(size, list) else ""
        terminal.say(f"{word[1:]}: {shape}{prepared.n_positions:,} tokens", quiet=self.quiet)

    def _messages(self, turns: list[tuple[str, str, list[Attachment]]]) -> list[dict[str, Any]]:
        """The conversation as the model takes it; attachments come before their question."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for role, text, attachments in turns:
            parts: list[dict[str, Any]] = [item.part(self.model) for item in attachments]
            content = [*parts, {"type": "text", "text": text}] if parts else text
            messages.append({"role": role, "content": content})
        return messages

    def _ask(self, question: str) -> None:
        began = time.perf_counter()
        turns = [*self.turns, ("user", question, self.waiting)]
        seen = {**self.params, "attachments": [item for _, _, given in turns for item in given]}
        messages = plugins.before_prompt(self.model, self._messages(turns), seen)
        prompt = self.model.prompt(messages)
        plugins.tell("after_prompt", self.model, prompt, seen)
        stream = self.model.generate(prompt, began=began, **self.options)
        out = terminal.Answers(thinking=prompt.thinking_open, quiet=self.quiet)
        with _stoppable(stream):
            for piece in stream:
                if not self.params["as_json"]:
                    out.write(piece)
        answer = stream.answer
        if self.params["as_json"]:
            found = attachments_info(self.model, prompt, seen["attachments"])
            terminal.print_json(result(self.model, answer, found, seen))
        else:
            out.close()
        self.waiting = []
        self.turns = [*turns, ("assistant", str(answer), [])]
        self.answers += 1
        self.tokens += answer.done.usage.completion_tokens
        self.last = summary(self.model, prompt, answer.done)
        stopped = "stopped · " if answer.done.finish_reason == "cancelled" else ""
        terminal.dim(stopped + self.last, quiet=self.quiet)
        plugins.tell("after_answer", self.model, prompt, str(answer), seen)

    def _save(self, given: str) -> None:
        if not given:
            raise InputError("/save needs a file: /save conversation.json")
        path = Path(_unquoted(given)).expanduser()
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for role, text, attachments in self.turns:
            parts = [{"type": item.kind, item.kind: item.given} for item in attachments]
            content = [*parts, {"type": "text", "text": text}] if parts else text
            messages.append({"role": role, "content": content})
        saved = {"model": self.model.name, "messages": messages}
        try:
            path.write_text(
                json.dumps(saved, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise InputError(
                f"{given!r} cannot be written ({error.strerror}); check the path"
            ) from None
        terminal.say(f"{terminal.count(len(messages), 'message')} in {path}", quiet=self.quiet)


def _lines(person: bool) -> Iterator[str]:
    """What is typed or piped in, to the end."""
    if not person:
        for raw in sys.stdin.buffer:
            yield raw.decode("utf-8", "replace")
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            terminal.say("")
            return
        except KeyboardInterrupt:  # at the prompt it drops the line, as in a shell
            terminal.say("")


@contextmanager
def _stoppable(stream: Stream) -> Iterator[None]:
    """Let Ctrl-C end the answer and nothing else; a second one, while it ends, interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stream.cancel()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unquoted(text: str) -> str:
    """A path as typed or dropped into a terminal: quotes and backslashes as in a shell."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text


def _use_history() -> None:
    """Arrow keys bring back earlier lines, where readline exists."""
    try:
        import readline  # noqa: F401  (its import is what changes input())
    except ImportError:
        pass
