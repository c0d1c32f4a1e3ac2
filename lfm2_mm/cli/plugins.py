"""How a package adds verbs, options, recipes and demos: entry points `lfm2_mm.commands`.

An entry point names an object; whatever of `Plugin`'s attributes it has is used, so that it need
not inherit. The modules of plugins are imported for `--help`, so they must import no torch. A
plugin that fails is remembered with its reason and breaks nothing. Knows no modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lfm2_mm.chat import Prompt
    from lfm2_mm.model import Model

__all__ = [
    "COMMAND_GROUP",
    "Answered",
    "Demo",
    "Found",
    "Plugin",
    "Recipe",
    "answer_fields",
    "before_prompt",
    "installed",
    "load_options",
    "note_for",
    "tell",
]

COMMAND_GROUP = "lfm2_mm.commands"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question of a demo.

    Attributes:
        about: What was asked about, for people: `simple.png (256x256, 64 tokens)`.
        question: The text asked.
        answer: What the model said.
        truth: What is right.
        right: Whether the answer is.
        files: What was written for it, relative to the demo's folder.
    """

    about: str
    question: str
    answer: str
    truth: str
    right: bool
    files: tuple[str, ...] = ()


Demo = Callable[["Model", int, Path], Iterator[Answered]]
"""`demo(model, seed, folder)` asks, and writes its pictures into the folder."""

Recipe = Callable[..., Path]
"""`recipe(folder, *, steps, until, seed, device, workers, fresh, say)` trains or resumes in the
folder and returns where the model was exported; `steps` and `until` may be None."""


class Plugin:
    """What a plugin may offer; all of it is optional.

    Attributes:
        commands: Verbs.
        ask_options: Options that `ask` and `chat` get beside their own.
        recipes: What `train` can make, by name.
        demos: What `demo` shows.
        notes: What is to be said when an embedded model is used, by its name.
    """

    commands: Sequence[click.Command] = ()
    ask_options: Sequence[click.Option] = ()
    recipes: Mapping[str, Recipe] = {}
    demos: Sequence[Demo] = ()
    notes: Mapping[str, str] = {}

    def load_options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for `lfm2_mm.load`, from a verb's parameters; also checks them."""
        return {}

    def before_prompt(
        self, model: Model, messages: list[dict[str, Any]], params: MutableMapping[str, Any]
    ) -> list[dict[str, Any]]:
        """What the model is to be given instead of a question's messages, the last a user's.

        `params` holds the verb's parameters and `attachments` (`lfm2_mm.cli.sources.Attachment`,
        in the order of the prompt's slots); for a line of a batch also `line`, its number. All
        hooks of one question get the same mapping: what one shall know of another belongs there.
        """
        return messages

    def after_prompt(self, model: Model, prompt: Prompt, params: Mapping[str, Any]) -> None:
        """Called when a prompt is built; `params` as for `before_prompt`."""

    def after_answer(
        self, model: Model, prompt: Prompt, answer_text: str, params: Mapping[str, Any]
    ) -> None:
        """Called when an answer is complete and written; `params` as for `before_prompt`."""

    def answer_fields(self, answer_text: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields that the JSON form of an answer gets beside its own."""
        return {}


@dataclass(frozen=True)
class Found:
    """An entry point and what became of it.

    Attributes:
        name: The entry point's name.
        where: Its module and attribute.
        plugin: The object, or None where it could not be loaded.
        error: Why not, as a clause; "" where it could.
    """

    name: str
    where: str
    plugin: Any = None
    error: str = ""
    commands: tuple[click.Command, ...] = ()
    ask_options: tuple[click.Option, ...] = ()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    demos: tuple[Demo, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@cache
def installed() -> tuple[Found, ...]:
    """The installed plugins, sorted by entry-point name."""
    points = sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.name)
    return tuple(_load(point) for point in points)


def _load(point: Any) -> Found:
    try:
        plugin = point.load()
        commands = tuple(getattr(plugin, "commands", ()))
        options = tuple(getattr(plugin, "ask_options", ()))
        for wanted, given in ((click.Command, commands), (click.Option, options)):
            for item in given:
                if not isinstance(item, wanted):
                    raise TypeError(f"{item!r} is no {wanted.__name__} of click")
        return Found(
            name=point.name,
            where=point.value,
            plugin=plugin,
            commands=commands,
            ask_options=options,
            recipes=dict(getattr(plugin, "recipes", {})),
            demos=tuple(getattr(plugin, "demos", ())),
            notes=dict(getattr(plugin, "notes", {})),
        )
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        said = f"the plugin {point.name!r} ({point.value}) could not be loaded: {why}"
        return Found(name=point.name, where=point.value, error=said)


def load_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the plugins want to hand to `lfm2_mm.load`."""
    options: dict[str, Any] = {}
    for found in installed():
        if hasattr(found.plugin, "load_options"):
            options |= found.plugin.load_options(params)
    return options


def tell(hook: str, *args: Any) -> None:
    """Call a hook (`after_prompt`, `after_answer`) of every plugin that has it."""
    for found in installed():
        if hasattr(found.plugin, hook):
            getattr(found.plugin, hook)(*args)


def before_prompt(
    model: Model, messages: list[dict[str, Any]], params: MutableMapping[str, Any]
) -> list[dict[str, Any]]:
    """A question's messages, as the plugins leave them."""
    for found in installed():
        if hasattr(found.plugin, "before_prompt"):
            messages = found.plugin.before_prompt(model, messages, params)
    return messages


def answer_fields(answer_text: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the plugins add to the JSON form of an answer."""
    fields: dict[str, Any] = {}
    for found in installed():
        if hasattr(found.plugin, "answer_fields"):
            fields |= found.plugin.answer_fields(answer_text, params)
    return fields


def note_for(name: str) -> str | None:
    """What is to be said when the embedded model of this name is used."""
    return next((found.notes[name] for found in installed() if name in found.notes), None)
