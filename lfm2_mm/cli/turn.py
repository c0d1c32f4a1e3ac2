"""One turn, for `ask`, `chat` and batches: its prompt, its JSON form, its line of numbers.

Knows no modality and writes nothing.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from lfm2_mm.cli import plugins, terminal
from lfm2_mm.cli.sources import Attachment, encoders, noun

if TYPE_CHECKING:
    from lfm2_mm.chat import Prompt
    from lfm2_mm.events import Done
    from lfm2_mm.model import Answer, Model

__all__ = ["attachments_info", "peak_memory", "question_prompt", "result", "summary"]


def question_prompt(
    model: Model,
    question: str,
    attachments: Iterable[Attachment],
    params: MutableMapping[str, Any],
    *,
    system: str | None = None,
) -> Prompt:
    """The prompt of one question about these attachments; `params` is what the plugins get.

    Raises:
        InputError: if one of them, or the question, cannot be used.
    """
    from lfm2_mm.messages import question_messages

    parts = [attachment.part(model) for attachment in attachments]
    messages = question_messages(question, parts, encoders=encoders(model), system=system)
    return model.prompt(plugins.before_prompt(model, messages, params))


def attachments_info(
    model: Model, prompt: Prompt, attachments: Iterable[Attachment]
) -> dict[str, list[dict[str, Any]]]:
    """What became of the attachments, by kind: `{"images": [{"size": …, "tokens": …}]}`."""
    found: dict[str, list[dict[str, Any]]] = {}
    given = list(attachments)
    for kind in map(noun, encoders(model)):
        names = [attachment.given for attachment in given if attachment.kind == kind]
        slots = [slot for slot in prompt.slots if noun(slot.encoder) == kind]
        found[f"{kind}s"] = [
            {**slot.prepared.info, "source": name, "tokens": len(slot.positions)}
            for name, slot in zip(names, slots, strict=True)
        ]
    return found


def result(
    model: Model,
    answer: Answer,
    attachments: dict[str, list[dict[str, Any]]],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """An answer as `--json` prints it, with what the plugins add."""
    parsed, done = answer.parsed, answer.done.to_dict()
    found: dict[str, Any] = {"answer": str(answer), "model": model.name}
    if parsed.thinking is not None:
        found["thinking"] = parsed.thinking
    if parsed.tool_calls:
        found["tool_calls"] = [call.to_openai() for call in parsed.tool_calls]
    found |= {**attachments, **done}
    return {**found, **plugins.answer_fields(str(answer), params), **found}


def summary(model: Model, prompt: Prompt, done: Done) -> str:
    """`1 image (256 tokens) · 12 tokens · 83 tok/s · first token 0.21 s · 1.9 GB`."""
    kinds: dict[str, list[int]] = {}
    for slot in prompt.slots:
        kinds.setdefault(noun(slot.encoder), []).append(len(slot.positions))
    words = [f"{terminal.count(len(n), kind)} ({sum(n):,} tokens)" for kind, n in kinds.items()]
    usage = done.usage
    if usage.cached_tokens:
        words.append(f"{usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens cached")
    words.append(terminal.count(usage.completion_tokens, "token"))
    if done.tokens_per_second:
        words.append(f"{done.tokens_per_second:.0f} tok/s")
    words.append(f"first token {done.timings.first_token:.2f} s")
    words.append(terminal.size(peak_memory(model)))
    return " · ".join(words)


def peak_memory(model: Model) -> int:
    """The most memory used so far, in bytes: of the GPU where it computes there, else resident."""
    device = model.backbone.embed_tokens.weight.device
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
