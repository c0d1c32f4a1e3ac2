"""What the verbs of speech share: which model by default, its options, and loading it.

Knows click and names; imports no torch until a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfm2_mm import settings
from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.options import kv_cache_option, model_options, seed_option
from lfm2_mm.errors import InputError
from lfm2_mm.locate import embedded_models, locate

if TYPE_CHECKING:
    from lfm2_audio.model import AudioModel

__all__ = ["DEFAULT_MODEL", "load_audio_model", "speech_options"]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "nano-audio"


def speech_options(function: F) -> F:
    """`-m`, where and how the model runs, `--seed`, `--json` and `-q`."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but answers and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
        seed_option,
    ):
        function = option(function)
    name = click.option(
        "-m",
        "--model",
        metavar="NAME",
        help="Embedded name, folder or Hub id[@revision].  [default: LFM2_MM_MODEL where that "
        f"names an audio model, else {DEFAULT_MODEL}]",
    )
    return name(model_options(kv_cache_option(function)))


def load_audio_model(params: Mapping[str, Any]) -> AudioModel:
    """Load the model that a verb's parameters ask for, and say what an embedded one is good for.

    Raises:
        Lfm2Error: if it cannot be found or used, or neither hears nor speaks.
    """
    quiet = bool(params.get("quiet"))
    name = params.get("model") or _default()
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        locate(name)  # an unknown name is refused before torch is imported
    if any(model.name == name for model in embedded_models()):
        note = plugins.note_for(name)
        if note is not None:
            terminal.say(note, quiet=quiet)
    with terminal.working(f"loading {name}", quiet=quiet):
        from lfm2_mm.loading import load

        names = ("device", "dtype", "threads", "quantize", "kv_cache_dtype")
        chosen: dict[str, Any] = {flag: params.get(flag) for flag in names}
        model = load(name, **chosen)
    if not (hasattr(model, "transcribe") and hasattr(model, "speak")):
        raise InputError(
            f"{name} neither hears nor speaks; use an audio model such as {DEFAULT_MODEL} or "
            "LiquidAI/LFM2.5-Audio-1.5B"
        )
    loaded: AudioModel = model
    return loaded


def _default() -> str:
    wanted = settings.resolve()
    given = wanted.model
    return (
        given if wanted.origin("model") != "default" and "audio" in given.lower() else DEFAULT_MODEL
    )
