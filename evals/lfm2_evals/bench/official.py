"""The official package liquid-audio as a side of `bench audio`: what it needs, its start, its note.

Knows where it is and what may be wrong with it; what it does is `official_worker`, in the
interpreter that has what the package needs, and what it is asked is `audio`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lfm2_evals.bench import official_worker
from lfm2_evals.bench import rounds as bench
from lfm2_mm.errors import Lfm2Error, MissingExtra, SettingError

__all__ = ["NOTE", "PEER", "check", "check_prompts", "start"]

PEER = "liquid-audio"

NOTE = (
    " liquid-audio: its own code on the CPU, where nothing stands in for torchaudio and `.cuda()`; "
    "bf16, its detokenizer in fp32. It keeps nothing between questions, so it reads the system "
    "prompt anew; it decodes whole answers, so here its first frame is decoded alone and all "
    "frames together at the end. Ratios are taken pair by pair within a round."
)
"""What a reader of numbers beside it must know."""


def check(python: str | None, wheel: Path | None) -> None:
    """Whether it can be started, as far as can be seen; neither is fine, too.

    Args:
        python: Interpreter that has what it needs.
        wheel: Folder with its unpacked wheel.

    Raises:
        SettingError: if one is missing, or the folder does not hold it.
        MissingExtra: if there is no such interpreter.
    """
    if python is None and wheel is None:
        return
    if python is None or wheel is None:
        raise SettingError(
            "liquid-audio needs an interpreter and its unpacked wheel; give both --peer-python "
            "and --peer-wheel, or neither to measure ours alone"
        )
    if not Path(python).is_file():
        raise MissingExtra(
            f"there is no interpreter {python!r} to run liquid-audio with; make one with "
            "`python -m venv` and name it with --peer-python"
        )
    if not wheel.is_dir():
        raise SettingError(
            f"there is no folder {str(wheel)!r} with the wheel of liquid-audio; unpack the wheel "
            "with `python -m zipfile -e` and give that folder as --peer-wheel"
        )
    if not (wheel / "liquid_audio" / "__init__.py").is_file():
        raise SettingError(
            f"the folder {str(wheel)!r} holds no package liquid_audio; give --peer-wheel the "
            "folder that the wheel was unpacked to"
        )


def start(
    stack: ExitStack,
    python: str,
    wheel: Path,
    folder: Path,
    *,
    threads: int,
    environment: Mapping[str, str],
) -> tuple[bench.Worker, str]:
    """Load a checkpoint in a process of its own; the process, and what a report says of it.

    Args:
        stack: Ends the process.
        python: Interpreter that has what it needs.
        wheel: Folder with its unpacked wheel.
        folder: The checkpoint, not packed.
        threads: Threads.
        environment: Variables set for it.

    Raises:
        Lfm2Error: if it fails.
    """
    command = [python, official_worker.__file__]
    worker = stack.enter_context(bench.Worker(PEER, command, environment))
    loaded = worker.call("load", folder=str(folder), threads=threads, wheel=str(wheel.resolve()))
    versions = ", ".join(f"{name} {version}" for name, version in loaded["versions"].items())
    peak, after = (loaded[key] / 2**20 for key in ("peak_bytes", "resident_bytes"))
    loading = f"loaded in {loaded['seconds']:.1f} s with up to {peak:.0f} MiB, {after:.0f} after"
    return worker, f"{versions}; {loading}"


def check_prompts(found: Sequence[bench.Measurement]) -> None:
    """Whether all sides saw prompts of the same length.

    Raises:
        Lfm2Error: if they did not.
    """
    for case in dict.fromkeys(one.case for one in found):
        counts = {one.side: int(one.values["prompt_tokens"]) for one in found if one.case == case}
        if len(set(counts.values())) > 1:
            raise Lfm2Error(
                f"the sides see prompts of different lengths for {case!r} ({counts}), so their "
                "times cannot be compared; report this as a bug"
            )
