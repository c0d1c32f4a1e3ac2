"""The folder of a training run: how long it is and which seed it has, written down and kept to.

A run that goes on must be the one that was begun, or the schedule and the batches would change on
the way. Knows file names and numbers; no model, and no torch, as `--help` loads what imports this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lfm2_mm.errors import InputError

__all__ = ["CHECKPOINT", "begin_run", "note_run"]

CHECKPOINT = "trainer.safetensors"
"""Name of the file in a run's folder from which it goes on."""
_FACTS = "run.json"


def begin_run(
    folder: Path,
    *,
    steps: int | None,
    seed: int | None,
    fresh: bool,
    length: int,
    also: Iterable[str] = (),
) -> tuple[int, int | None]:
    """Length and seed of a run that begins, or goes on with the folder's checkpoint.

    Args:
        folder: Of the run.
        steps: The length asked for; None for that of the run, or `length`.
        seed: The seed asked for; None for that of the run.
        fresh: Remove what was begun, but not its data.
        length: Of a new run.
        also: Further files that belong to a run.

    Returns:
        The length, and the seed or None where nothing names one.

    Raises:
        InputError: if the folder's run has another length or seed, or cannot be read.
    """
    begun = {} if fresh else _begun(folder)
    for name, wanted in (("steps", steps), ("seed", seed)):
        if wanted is not None and begun.get(name, wanted) != wanted:
            raise InputError(
                f"the run in {str(folder)!r} has {name} {begun[name]}, not {wanted}; go on without "
                f"--{name}, or begin anew with --fresh or another --out"
            )
    if fresh:
        for file in (CHECKPOINT, _FACTS, "log.jsonl", "scores.jsonl", *also):
            (folder / file).unlink(missing_ok=True)
    return steps or begun.get("steps") or length, begun.get("seed") if seed is None else seed


def note_run(folder: Path, *, steps: int, seed: int) -> None:
    """Write down what the folder's run is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"steps": steps, "seed": seed}) + "\n"
    (folder / _FACTS).write_text(text, encoding="utf-8")


def _begun(folder: Path) -> dict[str, int]:
    """Length and seed of the folder's run, as far as they can be told; empty if there is none."""
    from safetensors import SafetensorError, safe_open

    if not (folder / CHECKPOINT).exists():
        return {}
    try:
        if (folder / _FACTS).exists():
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            return {name: int(facts[name]) for name in ("steps", "seed")}
        with safe_open(folder / CHECKPOINT, framework="numpy") as file:
            schedule = json.loads((file.metadata() or {})["schedule"])
            return {"steps": int(schedule["steps"])}
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"the run in {str(folder)!r} cannot be read ({why}); begin anew with --fresh"
        ) from None
