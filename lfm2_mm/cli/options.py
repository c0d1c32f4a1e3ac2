"""Options that verbs share, and what follows from them: a model, a way to sample, a constraint.

Built on `lfm2_mm.settings` and `lfm2_mm.sampling`, which also judge the values. Knows click and
the public face of the core; no modality.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfm2_mm import settings
from lfm2_mm.cli import plugins, terminal
from lfm2_mm.errors import ConstraintError, InputError
from lfm2_mm.locate import embedded_models, locate

if TYPE_CHECKING:
    from lfm2_mm.model import Model
    from lfm2_mm.sampling import Sampling

__all__ = [
    "common_options",
    "generation",
    "kv_cache_option",
    "load_model",
    "model_options",
    "sampling",
    "sampling_options",
    "seed_option",
]

F = TypeVar("F", bound=Callable[..., Any])


def _apply(function: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def common_options(function: F) -> F:
    """`-m`, `--json` and `-q`, which every verb has."""
    return _apply(
        function,
        click.option(
            "-m",
            "--model",
            metavar="NAME",
            help="Embedded name, folder or Hub id[@revision].  [default: LFM2_MM_MODEL or nano-vl]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but answers and errors."),
    )


def model_options(function: F) -> F:
    """Where and how the model runs."""
    return _apply(
        function,
        click.option(
            "--device", metavar="auto|cpu|cuda|mps", help="Where to run.  [default: auto]"
        ),
        click.option(
            "--dtype",
            metavar="auto|float32|bfloat16|float16",
            help="Number format.  [default: auto]",
        ),
        click.option("--threads", type=int, help="CPU threads.  [default: one per physical core]"),
        click.option(
            "--quantize",
            metavar="none|int4|int8",
            help="Pack the weights while loading, for speed on a CPU.  [default: none]",
        ),
    )


kv_cache_option = click.option(
    "--kv-cache-dtype",
    metavar="auto|int8",
    help="Keep keys and values of earlier positions in bytes.  [default: auto]",
)


seed_option = click.option("--seed", type=int, help="Make random draws repeatable.")


def sampling_options(function: F) -> F:
    """How an answer is generated; what is not given, the checkpoint's own files say."""
    return _apply(
        function,
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="Length of an answer at most.",
        ),
        click.option("--temperature", type=float, help="0 always takes the likeliest token."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens up to this mass."),
        click.option("--top-k", type=int, help="Keep so many of the likeliest tokens."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
        seed_option,
        click.option("--stop", multiple=True, metavar="TEXT", help="End there; may be repeated."),
        click.option("--system", metavar="TEXT", help="Instruction that precedes the question."),
    )


def load_model(params: Mapping[str, Any]) -> Model:
    """Load the model that a verb's parameters ask for, and say what an embedded one is good for.

    Raises:
        Lfm2Error: if it cannot be found or used, or cannot answer questions.
    """
    quiet = bool(params.get("quiet"))
    extra = plugins.load_options(params)
    names = ("model", "device", "dtype", "threads", "quantize", "kv_cache_dtype")
    flags = {name: params.get(name) for name in names}
    resolved = settings.resolve(**flags)
    name = resolved.model
    if not _is_hub_id(name):
        locate(name)  # an unknown name is refused before torch is imported
    if any(model.name == name for model in embedded_models()):
        note = plugins.note_for(name)
        if note is not None:
            terminal.say(note, quiet=quiet)
    with terminal.working(f"loading {name}", quiet=quiet):
        from lfm2_mm.loading import load
        from lfm2_mm.model import Model

        model = load(
            name,
            device=params.get("device"),
            dtype=params.get("dtype"),
            threads=params.get("threads"),
            quantize=params.get("quantize"),
            kv_cache_dtype=params.get("kv_cache_dtype"),
            **extra,
        )
    if not isinstance(model, Model):
        raise InputError(f"{name} does not answer questions; use a text or vision-language model")
    return model


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def sampling(model: Model, params: Mapping[str, Any]) -> Sampling:
    """The model's own way to sample, with what the user said in its place."""
    from dataclasses import replace

    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    given = {name: params[name] for name in names if params.get(name) is not None}
    return replace(model.sampling, **given)


def generation(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `Model.generate`."""
    from lfm2_mm.constrain import Constraint

    constraint = None
    if params.get("json_schema") is not None:
        constraint = Constraint.json_schema(_schema_text(params["json_schema"]))
    elif params.get("regex") is not None:
        constraint = Constraint.regex(params["regex"])
    return {
        "max_tokens": params["max_tokens"],
        "sampling": sampling(model, params),
        "stop": tuple(params.get("stop") or ()),
        "constraint": constraint,
    }


def _schema_text(given: str) -> str:
    """A schema written on the command line, or the text of the file that holds one."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ConstraintError(
            f"the JSON schema {given!r} is neither JSON nor a readable file ({why}); "
            "give an object in braces or the path of one"
        ) from None
