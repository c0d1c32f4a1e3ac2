"""`lfm2-mm doctor`: what was found on this machine, where each setting comes from, what is broken.

Every check stands by itself: one that fails is reported and the others still run.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import entry_points, version
from typing import Any

import click

from lfm2_mm import __version__, settings
from lfm2_mm.cli import machine, terminal
from lfm2_mm.cli.options import common_options, kv_cache_option, model_options
from lfm2_mm.cli.plugins import installed
from lfm2_mm.errors import Lfm2Error, ModelNotFound
from lfm2_mm.frontends import FRONTEND_GROUP
from lfm2_mm.locate import embedded_models, locate

__all__ = ["doctor"]

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "llguidance")
_ESSENTIAL = ("torch", "transformers", "tokenizers", "safetensors", "llguidance")


@click.command(short_help="Say what was found and where each setting comes from.")
@common_options
@model_options
@kv_cache_option
def doctor(**params: Any) -> None:
    """Check this installation; exit 1 if something essential is broken."""
    problems: list[str] = []
    report: dict[str, Any] = {}
    checks: dict[str, Callable[[], Any]] = {
        "versions": lambda: _versions(problems),
        "machine": _machine,
        "kernels": _kernels,
        "settings": lambda: _settings(params, problems),
        "frontends": lambda: _frontends(problems),
        "plugins": _plugins,
        "models": lambda: _models(params, problems),
    }
    with terminal.working("looking", quiet=params["quiet"]):
        for name, check in checks.items():
            try:
                report[name] = check()
            except Exception as error:  # one broken check must not hide the others
                report[name] = {}
                problems.append(f"{name}: {_sentence(error)}")
    report["problems"] = problems
    if params["as_json"]:
        terminal.print_json(report)
    else:
        _print(report)
    if problems:
        raise click.exceptions.Exit(1)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Lfm2Error) else f"{type(error).__name__}: {text}"[:300]


def _versions(problems: list[str]) -> dict[str, str]:
    """What is installed, and whether the essential part of it can be imported."""
    from importlib import import_module

    found = {"lfm2_mm": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
            if name in _ESSENTIAL:
                import_module(name)
        except Exception as error:
            found[name] = "broken"
            problems.append(f"{name} cannot be imported ({_sentence(error)}); install it again")
    return found


def _machine() -> dict[str, Any]:
    import torch

    found = machine.look()
    facts: dict[str, Any] = {
        "system": found.system,
        "cpu": found.cpu,
        "cpu_features": list(found.features),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "memory": found.memory,
        "memory_available": found.available,
        "cores": settings.physical_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return facts


def _kernels() -> dict[str, Any]:
    from lfm2_mm.kernels import native

    found = native.status()
    return {
        "path": found.path,
        "reason": found.reason,
        "available": list(found.features),
    }


def _settings(params: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    names = ("model", "device", "dtype", "threads", "quantize", "kv_cache_dtype")
    flags = {name: params[name] for name in names}
    try:
        resolved = settings.resolve(**flags)
    except Lfm2Error as error:
        problems.append(_sentence(error))
        return []
    return [{"name": s.name, "value": s.value, "from": s.source} for s in resolved.rows()]


def _frontends(problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for point in sorted(entry_points(group=FRONTEND_GROUP), key=lambda p: p.name):
        row: dict[str, Any] = {"name": point.name, "where": point.value, "error": ""}
        try:
            row["options"] = sorted(point.load().options)
        except Exception as error:
            row["error"] = _sentence(error)
            problems.append(f"the frontend {point.name!r} cannot be loaded ({row['error']})")
        found.append(row)
    return found


def _plugins() -> list[dict[str, Any]]:
    return [
        {
            "name": found.name,
            "where": found.where,
            "verbs": [command.name for command in found.commands],
            "options": [option.opts[-1] for option in found.ask_options],
            "recipes": sorted(found.recipes),
            "error": found.error,
        }
        for found in installed()
    ]


def _models(params: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """Whether the embedded models load, and whether the chosen one is there."""
    from lfm2_mm.loading import load

    found = []
    for model in embedded_models():
        row: dict[str, Any] = {"name": model.name, "disk": model.size, "loads": True, "error": ""}
        try:
            load(model.name)
        except Exception as error:
            row["loads"], row["error"] = False, _sentence(error)
            problems.append(f"the embedded model {model.name} does not load: {row['error']}")
        found.append(row)
    chosen = settings.resolve(model=params["model"]).model
    try:
        locate(chosen, offline=True)
    except ModelNotFound as error:
        if chosen.count("/") != 1:  # a Hub id may still be downloaded
            problems.append(f"the model in use cannot be found: {_sentence(error)}")
    return found


def _print(report: dict[str, Any]) -> None:
    def section(title: str, rows: list[tuple[str, str]]) -> None:
        click.echo(click.style(title, bold=True))
        for name, text in rows or [("none", "")]:
            click.echo(terminal.clean(f"  {name:<17} {text}".rstrip()))

    section("versions", list(report["versions"].items()))
    facts = report["machine"]
    if facts:
        memory = [terminal.size(n) for n in (facts["memory"], facts["memory_available"]) if n]
        section(
            "machine",
            [
                ("system", facts["system"]),
                ("cpu", facts["cpu"]),
                ("features", ", ".join(facts["cpu_features"]) or "none known"),
                ("torch uses", facts["torch_cpu"]),
                ("cores", str(facts["cores"])),
                ("memory", ", ".join(memory) + (" available" if len(memory) == 2 else "")),
                ("gpu", ", ".join(facts["gpus"]) or "none"),
            ],
        )
    kernels = report["kernels"]
    if kernels:
        section(
            "native kernels",
            [
                ("path", f"{kernels['path']}, {kernels['reason']}"),
                ("can run", ", ".join(kernels["available"]) or "none"),
            ],
        )
    rows = [(row["name"], f"{row['value']}  (from {row['from']})") for row in report["settings"]]
    section("settings", rows)
    section(
        "frontends",
        [(row["name"], row["error"] or row["where"]) for row in report["frontends"]],
    )
    section("plugins", [(row["name"], row["error"] or _brings(row)) for row in report["plugins"]])
    section(
        "embedded models",
        [
            (row["name"], f"{terminal.size(row['disk'])}, {row['error'] or 'loads'}")
            for row in report["models"]
        ],
    )
    if report["problems"]:
        click.echo(click.style("problems", bold=True))
        for problem in report["problems"]:
            click.echo(f"  {terminal.clean(problem)}")
    else:
        click.echo("nothing is broken")


def _brings(row: dict[str, Any]) -> str:
    brought = [*row["verbs"], *row["options"], *(f"train {name}" for name in row["recipes"])]
    return f"{row['where']}: {', '.join(brought)}"
