"""Builds the tokenizer of nano-vl: a byte-level BPE of 1024 tokens, and its ChatML template.

Knows questions and answers as text only. It needs `tokenizers` when it builds, nothing before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .questions import ask_all, describe
from .sample import MORE_SHAPES, generate_scene, stream

__all__ = ["CHAT_TEMPLATE", "MAX_LENGTH", "SPECIAL_TOKENS", "VOCABULARY", "build_tokenizer"]

VOCABULARY = 1024
"""Tokens in all, special ones included."""
MAX_LENGTH = 4096
"""Positions the model is made for."""

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)),
)
"""The first ids, in order; those before `<image>` as in the LFM2 text vocabulary."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- else -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "image" -%}
                {{- "<image>" -}}
            {%- elif part["type"] == "text" -%}
                {{- part["text"] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""`bos`, then each turn between `<|im_start|>` and `<|im_end|>`, images as `<image>`."""

_SCENES = 400
_EVERYDAY = (
    "Hello. Hi there. Thank you very much. Please answer in one word. I can see the picture, but "
    "I do not know this. There is nothing else. What else is there? Which one is bigger, the "
    "first or the second? Who are you? Where is it? When was that? Why not? You are welcome. Yes, "
    "it is. No, it is not. There are no other objects here. The one at the top, the middle or the "
    "bottom; on the left side, in the centre or on the right side; in front, behind, between, "
    "next to, near, inside, outside. A small one, a large one, big, little, light, dark, white, "
    "grey, brown and pink. Look at the photo and say what it shows. Answer with yes or no. Give a "
    "number. Nothing, something, everything, someone, another, first, second, third, last, same, "
    "different. A person, some people, a man, a woman, children, an animal, the house, the "
    "street, the water, the world, this page, a table, a chart, the text, a line, a letter, a "
    "drawing, the background, the corner, the edge, the size, the name, the time, today, every "
    "day, a year, the way to work. We think they would want to know about these, because each has "
    "been made from many parts. Could he or she find, take, make, use, give, keep, open, close, "
    "read, write, try, help, start, stop, change, move, compare and explain more than just those? "
    "It should only be done before or after, never while, always with, often without, again, "
    "also, both, few, most, much, such, very, well, good, better, best, bad, new, old, long, "
    "short, high, low, empty, full, true, false. Once, perhaps, however, against, during, until, "
    "along, across, around, together, really, quite, almost, already, still, even, itself, "
    "himself, themselves, mother, brother, country, question, problem, reason, example, morning, "
    "evening, tomorrow, yesterday, minute, hour, week, month."
)
"""A few plain sentences, so that talk beside the scenes does not fall apart into letters."""


def build_tokenizer(out_dir: str | Path) -> None:
    """Train the tokenizer on questions and answers and write it in the official layout.

    Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
    `chat_template.jinja`; the same bytes each time. Words of signs are capitals and occur in no
    training text, so they are spelled letter by letter.

    Args:
        out_dir: Folder to write to; made if absent.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    bos = "<|startoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, SPECIAL_TOKENS.index(bos))],
    )
    missing = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "bos_token": bos,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
    }
    config = {
        **named,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
    _write(folder / "special_tokens_map.json", json.dumps(named, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def _corpus() -> Iterator[str]:
    """Questions and answers of many scenes without signs, then the everyday sentences."""
    for index in range(_SCENES):
        scene = generate_scene(0, index, split="train", profile=MORE_SHAPES)
        for qa in ask_all(scene, stream(0, index, "train", "tokenizer"), "seen"):
            yield f"{qa.question}\n{qa.answer}"
        yield describe(scene)
    yield _EVERYDAY


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
